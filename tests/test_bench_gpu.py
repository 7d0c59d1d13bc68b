"""`bench gpu`: a dry run of every stage; stages that fail or hang leave the others alone; a second call goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, rows, tune
from bench.__main__ import COMMANDS, main
from tinylora.ops import dispatch

CPU = torch.device("cpu")


def statuses(out) -> dict[str, str]:
    return {name: stage["status"] for name, stage in gpu.read(out)["stages"].items()}


def test_a_dry_run_of_every_stage(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    threads = torch.get_num_threads()
    try:
        done = main(["gpu", "--dry-run", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert done == 0, printed + (tmp_path / gpu.LOG).read_text()
    there = [s.name for s in gpu.STAGES if s.dry is not None]
    assert [s.name for s in gpu.STAGES if s.name not in there] == ["tune"]  # which has a dry run of its own
    assert statuses(tmp_path) == dict.fromkeys(there, gpu.FINISHED)
    assert "nothing in it is a measurement of a GPU" in printed and gpu.read(tmp_path)["dry_run"] is True
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    assert {r.op for r in found} >= {"parts", "ceilings", "linear", "layer", "host", "memory", "rollout"}
    assert {r.device for r in found} == {rows.device_name(CPU)}
    assert {r.note for r in found if r.op == "parts"} == {"launches stubbed out: not a measurement"}
    assert {r.M for r in found if r.op == "layer" and r.p50_ms} == {1, 8}  # decode's rows left layer's alone
    assert {r.pass_ for r in found if r.op == "rollout"} == {"generate", "log p", "bits"}  # of two stages
    assert "bf16, < 16 rows" in (tmp_path / gpu.TABLE).read_text()
    table = (tmp_path / "README.md").read_text()
    assert "The kernels one by one" in table and "The seven linear layers" in table and "Memory of one block" in table
    assert main(["gpu", "--dry-run", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("finished before") == len(there)


def test_every_test_of_a_card_is_in_a_stage():
    names = re.findall(r"^def (test_\w+)", (Path(__file__).parent / "test_gpu.py").read_text(), re.MULTILINE)
    words = [word for stage in gpu.STAGES if stage.tests for word in stage.tests.split(" or ")]
    assert [name for name in names if not any(word in name for word in words)] == []


class Fake:
    """A stage of `python -m timeit`, which runs a statement without importing torch."""

    bench = tests = what = keep = ""
    dry = ()

    def __init__(self, name, statement):
        self.name, self.statement = name, statement

    def arguments(self, out, dry):
        return ["timeit", "-n1", "-r1", self.statement]


def test_stages_that_fail_or_hang_leave_the_others_alone(tmp_path, monkeypatch, capsys):
    def stages(*, hanging, failing):
        return Fake("hangs", hanging), Fake("fails", failing), Fake("good", "print('the good one ran')")

    slow = f"import time; open(r'{tmp_path}/started', 'w'); time.sleep(60); open(r'{tmp_path}/survived', 'w')"
    monkeypatch.setattr(gpu, "STAGES", stages(hanging=slow, failing="1 / 0"))
    assert gpu.run(tmp_path, (), False, (), limit=4.0) == 1
    assert statuses(tmp_path) == {"hangs": gpu.LATE, "fails": gpu.FAILED, "good": gpu.FINISHED}
    assert gpu.read(tmp_path)["stages"]["fails"]["rc"] == 1
    assert "the good one ran" in capsys.readouterr().out and (tmp_path / "started").exists()
    monkeypatch.setattr(gpu, "STAGES", stages(hanging="pass", failing="1 / 0"))
    assert gpu.run(tmp_path, (), False, ()) == 1
    assert statuses(tmp_path) == {"hangs": gpu.FINISHED, "fails": gpu.FAILED, "good": gpu.FINISHED}
    assert capsys.readouterr().out.count("the good one ran") == 0  # it had finished
    assert gpu.run(tmp_path, ("good",), False, ()) == 0
    assert "the good one ran" in capsys.readouterr().out  # it was named
    assert (tmp_path / gpu.LOG).read_text().count("=== good") == 2
    assert not (tmp_path / "survived").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_with_the_run_that_is_ended(tmp_path, number):
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("Linux alone tells a process that its parent is gone")
    script = f"""
from pathlib import Path; from bench import gpu
class Stage:
    name, what, bench, keep, dry = "hangs", "", "", "", ()
    def arguments(self, out, dry):
        statement = "import os, time; print(os.getpid(), file=open(r'{tmp_path}/pid', 'w'), flush=True); time.sleep(90)"
        return ["timeit", "-n1", "-r1", statement]
gpu.STAGES = (Stage(),)
gpu.run(Path(r"{tmp_path}/out"), (), False, ())
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=rows.ROOT, stdout=subprocess.DEVNULL) as run:
        pid = _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        run.send_signal(number)
    assert run.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert _wait_for(lambda: not _runs(int(pid)))
    assert statuses(tmp_path / "out") == {"hangs": gpu.STARTED}  # a second call takes it up again


def _wait_for(condition, seconds=60.0):
    deadline = time.perf_counter() + seconds
    while not (found := condition()) and time.perf_counter() < deadline:
        time.sleep(0.05)
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # nobody may have asked for a dead one's status
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_a_stage_writes_elsewhere_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "KEPT_EVERY", 1)
    kept = f"import os, time; open('tables/sm_90.json', 'w').write('[]'); there = r'{tmp_path}/out/tables'"
    # It waits for its copy, and has then more to do.
    stage = Fake("tune", f"{kept}\nwhile not os.path.exists(there): time.sleep(0.1)\nos._exit({tune.LEFT})")
    stage.keep = "tables"
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "sm_90.tmp").touch()
    monkeypatch.setattr(gpu, "STAGES", (stage,))
    assert gpu.run(tmp_path / "out", (), False, (), limit=60) == 1
    assert [p.name for p in (tmp_path / "out/tables").iterdir()] == ["sm_90.json"]
    assert statuses(tmp_path / "out") == {"tune": gpu.LATE}


def test_the_table_is_written_again_after_every_measurement(tmp_path, monkeypatch):
    table = Fake("table", f"open(r'{tmp_path}/written', 'a').write('.')")
    monkeypatch.setattr(gpu, "STAGES", (Fake("one", "pass"), Fake("two", "pass"), table))
    for names, written in (((), 1), ((), 1), (("two",), 2), (("table",), 3)):
        assert gpu.run(tmp_path / "out", names, False, ()) == 0
        assert (tmp_path / "written").read_text() == "." * written


def test_a_table_says_where_its_rows_were_measured(tmp_path, monkeypatch):
    """Another machine's cells are measured again, and until then its table stays as it is, name and all."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "compile_all", lambda *_: None)
    monkeypatch.setattr(dispatch, "capability_of", lambda device: (9, 0))
    cells = [tune.Cell(64, 32, "bf16", 2, tune.FORWARD, M) for M in (16, 64)]
    monkeypatch.setattr(tune, "cells", lambda *_: cells)
    monkeypatch.setattr(
        tune, "measure", lambda cell, *_: [tune.Row(**vars(cell), candidate=0, of=1, choice="{}", p50_ms=1.0)]
    )

    def run(device, minutes):
        monkeypatch.setattr(rows, "device_name", lambda _: device)
        left = tune.run(tmp_path, CPU, [], [], [], None, minutes)
        return left, json.loads((tmp_path / "sm_90.json").read_text())["device"]

    assert run("H200", 1) == (0, "H200")
    before = (tmp_path / "sm_90.json").stat().st_mtime_ns
    assert run("H200", 1) == (0, "H200") and run("H100", 0) == (2, "H200")
    assert (tmp_path / "sm_90.json").stat().st_mtime_ns == before
    assert run("H100", 1) == (0, "H100") and run("H200", 0) == (2, "H100")
    assert [row.device for row in tune.read(tmp_path / "sm_90.csv")] == ["H100", "H100"]


def test_a_dry_run_and_measurements_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="bench/results"):
        gpu.run(rows.RESULTS, (), True, COMMANDS)
    gpu.write(tmp_path, {"dry_run": True, "stages": {}})
    with pytest.raises(ValueError, match="holds a dry run"):
        gpu.run(tmp_path, (), False, COMMANDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_run_in_a_folder_and_a_state_that_can_be_read(tmp_path, capsys):
    command = ["gpu", "--dry-run", "--stage", "table", "--out", str(tmp_path)]
    with rows.locked(tmp_path / gpu.STATE):
        assert main(command) == 2 and "expected no other run in this folder" in capsys.readouterr().err
    (tmp_path / gpu.STATE).write_text('{"dry_run": tr')
    assert main(command) == 2 and "is not JSON" in capsys.readouterr().err
    assert main(["gpu", "--dry-run", "--out", str(rows.RESULTS)]) == 2


def test_ctrl_c_in_a_stage_of_a_dry_run_ends_the_run(tmp_path, monkeypatch):
    from bench import linear

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "run", stopped)
    assert main(["gpu", "--dry-run", "--stage", "linear", "table", "--out", str(tmp_path)]) == 130
    assert "table" not in statuses(tmp_path)


def test_without_a_gpu_nothing_is_measured(capsys):
    assert main(["gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
