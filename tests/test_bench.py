"""The benchmark: shapes, the gate, what a run leaves behind, the README's tables."""

import dataclasses
import importlib.util
import sys
import time
import warnings
from functools import partial

import pytest
import torch

from bench import check, linear, providers, report, rows, shapes, timing
from bench.__main__ import main, parser
from bench.providers import Case, Provider

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
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
    base.ratio_to_bare = row.ratio_to_bare = None
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
    assert main(command) == 2 and readme.read_text() == "no marks"


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


@pytest.mark.parametrize("command", ["demo", "analysis", "svd"])
def test_out_that_is_a_file_is_refused_at_once(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([command, "--out", str(tmp_path / "file" / "below")]) == 2
    assert "expected a folder" in capsys.readouterr().err
