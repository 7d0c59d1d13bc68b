"""`bench layer` and its roofline: the gate of a block, the rows of a run, the model's arithmetic."""

import dataclasses

import pytest
import torch

from bench import block, check, layer, providers, report, roofline, rows, shapes, timing
from bench.__main__ import main

CPU = torch.device("cpu")
SHAPE = {"q_proj": (32, 32, True), "k_proj": (8, 32, True), "v_proj": (8, 32, True), "o_proj": (32, 32, False)}
SHAPE |= {"gate_proj": (48, 32, False), "up_proj": (48, 32, False), "down_proj": (32, 48, False)}

# Not the compiled one, which is the same function: a run of `bench layer` compiles and checks it.
CHOSEN = [name for name in block.PROVIDERS if name != providers.COMPILED_ADDMM]


@pytest.fixture
def small(monkeypatch):
    """A block of a few thousand numbers, and ceilings measured on as few."""
    monkeypatch.setattr(shapes, "projections", lambda model: SHAPE)
    monkeypatch.setattr(timing, "MAX_ROUNDS", 6)
    monkeypatch.setattr(timing, "buffers_past_cache", lambda size, device: 2)
    monkeypatch.setitem(roofline.SIZES, "cpu", (1 << 12, 32))


def gate_of(dtype, M=7):
    case = block.Case(SHAPE, dtype, CPU, 2, 5, lambda size: 2)
    xs, dys = case.operands(M)
    weights64 = {name: weight.double() for name, weight in case.weights[0].items()}
    return case, block.Gate(case, xs[0], dys[0], weights64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_provider_passes_the_gate(dtype):
    pytest.importorskip("peft")
    case, gate = gate_of(dtype)
    for name in CHOSEN:
        gate.admit(case.provider(name))


def test_a_base_of_four_bits(small, tmp_path, capsys):
    """The same operator on NF4: the gate's exact numbers are those of the weights that the packed ones stand for."""
    pytest.importorskip("bitsandbytes")
    case = block.Case(SHAPE, torch.bfloat16, CPU, 2, 5, lambda size: 2, nf4=True)
    assert case.buffers == len(case.packed) == 2 and len(case.weights) == 1
    xs, dys = case.operands(7)
    gate = block.Gate(case, xs[0], dys[0], {name: weight.double() for name, weight in case.weights[0].items()})
    for name in block.FOUR_BIT_PROVIDERS:
        gate.admit(case.provider(name))
    bare, ours = (case.provider(name).copies for name in block.FOUR_BIT_PROVIDERS)
    for i in range(2):
        for name in block.NAMES:
            assert bare[i][0].projection(name).weight is case.packed[i][name]
            assert ours[i][0].projection(name).weight.data_ptr() == case.packed[i][name].data_ptr()
    with pytest.raises(ValueError, match="'addmm', expected one of bare, ours"):
        case.provider(providers.ADDMM)
    command = ["layer", "--M", "1", "--dtypes", "nf4", "bf16", "--budget", "60", "--device", "cpu", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path), "--providers", "bare", "addmm", "ours"]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = {(r.dtype, r.pass_): r for r in rows.read(path) if r.op == "layer" and r.provider == "ours"}
    assert {r.dtype for r in rows.read(path) if r.provider == "addmm"} == {"bf16"} and len(found) == 4
    moved = {
        dtype: found[dtype, "forward"].gb_per_s * found[dtype, "forward"].p50_ms * 1e6 for dtype in ("nf4", "bf16")
    }
    numbers = sum(N * K for N, K, _ in SHAPE.values())
    assert moved["bf16"] - moved["nf4"] == pytest.approx(numbers * (2 - 0.5 - 1 / 64 - 1 / 4096), rel=1e-3)


def test_providers_share_the_weights_and_have_seven_v_each():
    pytest.importorskip("peft")
    case, _ = gate_of(torch.bfloat16)
    bare, peft = case.provider(providers.BARE), case.provider(providers.PEFT)
    for i, ((block_, none), (adapted, vs)) in enumerate(zip(bare.copies, peft.copies, strict=True)):
        assert not none and len({id(v) for v in vs}) == 7
        for name in block.NAMES:
            address = case.weights[i][name].data_ptr()
            assert block_.projection(name).weight.data_ptr() == address
            assert adapted.projection(name).get_base_layer().weight.data_ptr() == address
    assert case.weights[0]["q_proj"].data_ptr() != case.weights[1]["q_proj"].data_ptr()
    assert peft.copies[0][0].projection("q_proj").tinylora_A["default"].dtype == torch.float32


def test_siblings_run_together_in_ours_and_nowhere_else():
    case, _ = gate_of(torch.bfloat16)
    (together, _), (alone, _) = (case.provider(name).copies[0] for name in (providers.OURS, providers.ALONE))
    groups = [together.projection(name).siblings for name in block.NAMES]
    assert [None if g is None else len(g.layers) for g in groups] == [3, 3, 3, None, 2, 2, None]
    assert all(alone.projection(name).siblings is None for name in block.NAMES)
    # Moving the group's weights together must not have moved the others'.
    assert alone.projection("q_proj").weight.data_ptr() == case.weights[0]["q_proj"].data_ptr()
    assert together.projection("q_proj").weight.data_ptr() != case.weights[0]["q_proj"].data_ptr()


@pytest.mark.parametrize("name", block.NAMES)
@pytest.mark.parametrize("fault", ["y", "dx", "dv"])
def test_the_gate_sees_one_wrong_layer(name, fault):
    case, gate = gate_of(torch.float32)
    good = case.provider(providers.ADDMM)
    place = block.NAMES.index(name)
    reads = next(i for i, group in enumerate(shapes.SIBLINGS) if name in group)

    def wrong(forward, vs):
        def call(*xs):
            ys = list(forward(*xs))
            if fault == "y":
                ys[place] = ys[place] * 1.001
            elif fault == "dx":
                ys[place] = ys[place] + 1e-3 * (xs[reads] - xs[reads].detach()).sum()
            else:
                ys[place] = ys[place] + 1e-3 * (vs[place] - vs[place].detach()).sum()
            return tuple(ys)

        return call, vs

    gate.admit(good)
    with pytest.raises(check.WrongResult, match={"y": f"y of {name}", "dx": "dx of", "dv": f"dv of {name}"}[fault]):
        gate.admit(dataclasses.replace(good, copies=[good.copies[0], wrong(*good.copies[1])]))


def test_a_provider_that_trains_less_is_refused():
    case, gate = gate_of(torch.float32)
    good = case.provider(providers.ADDMM)
    fewer = [(forward, vs[:-1]) for forward, vs in good.copies]
    with pytest.raises(check.WrongResult, match="6 of 7"):
        gate.admit(dataclasses.replace(good, copies=fewer))


def test_layer_from_the_command_line(small, tmp_path, capsys):
    pytest.importorskip("peft")
    command = ["layer", "--M", "1", "16", "--budget", "60", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main([*command, "--providers", *CHOSEN]) == 0
    (path,) = tmp_path.glob("*.csv")
    found = [r for r in rows.read(path) if r.op == "layer" and r.p50_ms]
    # 2 Ms x 2 passes x (all providers in bf16, one fewer in fp32, where PEFT has one dtype only)
    assert {r.provider for r in found} == set(CHOSEN) and len(found) == 4 * len(CHOSEN) + 4 * (len(CHOSEN) - 1)
    assert all(r.mode == layer.EAGER and r.bound_ms > 0 and r.rounds >= timing.MIN_ROUNDS for r in found)
    ceilings = [r for r in rows.read(path) if r.op == "ceilings"]
    assert {r.pass_ for r in ceilings} == {"copy", "read", "matmul bf16", "matmul fp32"}
    printed = capsys.readouterr().out
    assert "At M ≥ 16" in printed and "addmm" in printed.split("At M ≥ 16")[1].splitlines()[0]
    assert "ours / PEFT" in printed and "captured: not measured: CUDA graphs need a GPU" in printed
    assert "The seven linear layers of one transformer block" in report.markdown(rows.read(path))


def test_the_bound_of_qwen_7b():
    """Against sums by hand: 8192 rows are bound by operations, one row by bytes."""
    work = roofline.groups("Qwen2.5-7B")
    assert [(g.K, g.Ns) for g in work] == [
        (3584, (3584, 512, 512)),
        (3584, (3584,)),
        (3584, (18944, 18944)),
        (18944, (3584,)),
    ]
    parameters = 3584 * (3584 + 512 + 512 + 3584 + 3 * 18944)
    many = roofline.bound(work, 8192, 0, "bf16", 2, roofline.H200, "forward")
    assert many == pytest.approx(2 * 8192 * parameters / 790e12)
    one = roofline.bound(work, 1, 0, "bf16", 2, roofline.H200, "forward")
    numbers = parameters + 3 * 3584 + 18944 + 3584 + 2 * 512 + 3584 + 2 * 18944 + 3584
    assert one == pytest.approx(2 * numbers / 4.3e12)
    assert roofline.bound(work, 1, 0, "bf16", 2, roofline.H200, "forward+backward") == pytest.approx(2 * one)
    assert roofline.bound(work, 1, 2, "bf16", 2, roofline.H200, "forward") > one


def test_the_model_counts_passes_and_launches():
    """One layer, by hand; the order that the ways have; siblings read x once."""
    work = (roofline.Group(4096, (4096,)),)
    added = roofline.modelled("addmm", work, 8192, roofline.H200, "forward") - roofline.bound(
        work, 8192, 0, "bf16", 2, roofline.H200, "forward"
    )
    assert added == pytest.approx((2 + 4) * 8192 * 4096 / 4.3e12 + 4 * 1.5e-6 + 6 * 1e-6)
    block_ = roofline.groups("Qwen2.5-7B")
    for pass_ in ("forward", "forward+backward"):
        times = [roofline.modelled(name, block_, 2048, roofline.H200, pass_) for name in roofline.EXTRA]
        bare, peft, same, addmm, alone, ours = times
        assert bare < ours < alone < addmm < same < peft
    assert "nothing here is measured" in report.roofline_table(["Qwen2.5-7B"], [1, 8192])
