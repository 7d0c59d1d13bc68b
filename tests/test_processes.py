"""Training in several processes: two gloo processes under torchrun and accelerate launch, on the tiny model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from tiny_runs import curve, log
from two_ranks import ES, GROUP, GRPO, SFT, answers, settings

from tinylora.integrations import evolving, training
from tinylora.integrations.trl import last_checkpoint
from tinylora.nn.checkpoint import read

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# --multi_gpu is how it starts several processes, with GPUs or without; with --cpu it would start one.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
              "0"]  # fmt: skip


def environment():
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    """The folder in which two processes did all of tests/two_ranks.py: once, even if pytest-xdist spreads this file."""
    own = tmp_path_factory.getbasetemp()
    out = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "two_ranks"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            out.mkdir()
            with (out / "output").open("w") as output:
                done = subprocess.run(
                    [*TORCHRUN, str(ROOT / "tests" / "two_ranks.py"), str(tiny), str(out)],
                    stdout=output, stderr=output, timeout=400, env=environment(),
                )  # fmt: skip
            (out / "rc").write_text(str(done.returncode))
    assert (out / "rc").exists() and (out / "rc").read_text() == "0", (out / "output").read_text()[-5000:]
    return out


def of_both(two, name):
    return [json.loads((two / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def numbers(folder):
    return read(Path(folder) / "adapter.safetensors")[1]


def test_sft_in_two_processes_gives_what_one_gives(tiny, two, tmp_path):
    """The same batches in the same order: v agrees after five steps, over the end of an epoch."""
    training.run("sft", settings(tiny, **SFT), tmp_path)
    ours, theirs = numbers(two / "sft" / "adapter"), numbers(tmp_path / "adapter")
    assert ours.keys() == theirs.keys() and len(theirs) == 4
    for name, v in theirs.items():
        assert v.abs().min() > 0.01
        torch.testing.assert_close(ours[name], v, rtol=0, atol=1e-6)
    for mine, whole in zip(log(two / "sft"), log(tmp_path), strict=True):
        for name in ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "epoch"):
            assert mine[name] == pytest.approx(whole[name], rel=1e-5), name
    printed = (two / "output").read_text()
    assert printed.count("sft: 4 numbers train, 12 problems, 5 steps, 2 processes") == 1
    assert printed.count("step 4/5") == 1
    assert not (two / "sft" / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize(("name", "steps"), [("sft", 5), ("grpo", 8), ("adalora", 3), ("script", 1)])
def test_the_processes_agree_on_every_number_after_every_step(two, name, steps):
    first, second = of_both(two, name)
    assert len(first["numbers"]) == steps and first["numbers"] == second["numbers"], "bit for bit"
    assert len({tuple(n) for n in first["numbers"]}) > steps // 2, "nothing was trained"
    assert any(any(n) for n in first["numbers"])


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_gradients_are_the_mean_over_the_processes(two, name):
    first, second = of_both(two, name)
    if name == "sft":  # clipped, as the recipe says: the direction is the mean's
        mean = [unit((torch.tensor(a) + torch.tensor(b)) / 2) for a, b in both(first, second)]
        used = [unit(torch.tensor(u)) for u in first["used"]]
    else:
        mean = [(torch.tensor(a) + torch.tensor(b)) / 2 for a, b in both(first, second)]
        used = [torch.tensor(u) for u in first["used"]]
    torch.testing.assert_close(used, mean, rtol=1e-4, atol=1e-8)
    assert first["used"] == second["used"]
    assert any(a != b for a, b in both(first, second)), "the processes had the same share: this shows nothing"


def both(first, second):
    return zip(first["local"], second["local"], strict=True)


def unit(v):
    return v / v.norm()


def test_the_log_is_of_all_processes(two):
    """Rewards and groups without signal, from what the scorers gave in each process. A group spans both."""
    given = [one["rewards"] for one in of_both(two, "grpo")]
    entries = log(two / "grpo")
    assert [e["step"] for e in entries] == list(range(1, 9))
    for step, entry in enumerate(entries):
        for name in ("strict", "lenient"):
            every = given[0][name][step] + given[1][name][step]
            assert len(every) == 24
            assert entry[name] == pytest.approx(sum(every) / 24)
        every = given[0]["strict"][step] + given[1]["strict"][step]
        groups = [every[i : i + GROUP] for i in range(0, 24, GROUP)]
        assert entry["groups_without_signal"] == pytest.approx(sum(len(set(g)) == 1 for g in groups) / 3)
        assert entry["reward"] == entry["strict"]
    assert given[0] != given[1], "each process samples with random numbers of its own"
    assert len({e["reward"] for e in entries}) > 2


@pytest.mark.parametrize("how", ["es", "parallel"], ids=["shares", "one model"])
def test_evolution_in_two_processes_is_that_in_one(how, tiny, two, tmp_path):
    """Each with its share of the adapters, or both as one model (tensor parallelism)."""
    evolving.run(settings(tiny, **ES), tmp_path)
    assert any(e["spread"] > 0 for e in log(tmp_path)), "nothing evolved"
    assert log(two / how) == log(tmp_path)
    ours, theirs = numbers(two / how / "adapter"), numbers(tmp_path / "adapter")
    assert all(torch.equal(ours[name], v) and v.abs().min() > 0 for name, v in theirs.items())


@pytest.mark.parametrize("how", ["evaluated", "parallel"], ids=["shares", "one model"])
def test_each_process_answers_its_share_of_an_evaluation_and_has_the_whole(how, tiny, two):
    first, second = of_both(two, how)
    assert first == second == answers(tiny)
    assert len({c["completion"] for c in first["completions"]}) > 1


def test_all_processes_go_back_to_the_best_checkpoint(two):
    first, second = of_both(two, "best")
    assert first == second and not first["best"].endswith("checkpoint-3")
    saved = numbers(first["best"])
    assert first["numbers"] == [torch.cat([saved[f"v_{i}"] for i in range(len(saved))]).tolist()]


def test_what_several_processes_cannot_do_is_refused(two):
    for one in of_both(two, "refused"):
        reentrant, sharded = one["errors"]
        assert "use_reentrant True, expected False with 2 processes" in reentrant
        assert "fsdp is on, expected it off" in sharded and "use SFTTrainer itself with FSDP2" in sharded


def test_kill_9_of_a_process_and_resume_give_the_curve_of_an_uninterrupted_run(tiny, two, tmp_path):
    """torchrun ends the other one then, wherever it is. The launcher may be another the next time."""
    run = tmp_path / "run"
    values = {"model": tiny / "model", "data": tiny / "data", "out": run, "dtype": "float32", "n-tie": 4, "lr": 0.02,
              "group-size": GROUP, "max-completion-length": 10}  # fmt: skip
    values |= {key.replace("_", "-"): value for key, value in GRPO.items()}
    flags = [str(x) for key, value in values.items() for x in (f"--{key}", value)]
    command = ["-m", "tinylora", "train", "grpo"]
    output = tmp_path / "output"
    with output.open("a") as file:
        launcher = subprocess.Popen([*TORCHRUN, *command, *flags], stdout=file, stderr=file, env=environment())
        while launcher.poll() is None and len(log(run)) < 5:
            time.sleep(0.005)
        assert launcher.poll() is None, output.read_text()[-5000:]
        (second,) = [p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGKILL)
        assert launcher.wait(60) != 0
        assert 5 <= len(log(run)) < 8 and not (run / "adapter").exists()
        assert json.loads((run / "run.json").read_text())["processes"] == 2
        assert last_checkpoint(run) is None, "a single process has no random generators there"
        done = subprocess.run([*ACCELERATE, *command, "--out", str(run), "--resume"], stdout=file, stderr=file,
                              env=environment(), timeout=200)  # fmt: skip
    assert done.returncode == 0, output.read_text()[-5000:]
    assert output.read_text().count("resumed from checkpoint-") == 1
    assert curve(run) == curve(two / "grpo")
    ours, theirs = numbers(run / "adapter"), numbers(two / "grpo" / "adapter")
    assert all(torch.equal(ours[name], v) for name, v in theirs.items())
