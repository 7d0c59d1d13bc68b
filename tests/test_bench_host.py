"""`bench host`: every provider, pass and mode leaves a row; the stub ends at the launch and leaves nothing behind."""

import pytest
import torch

from bench import host, providers, report, rows, timing
from bench.__main__ import main
from bench.providers import Case

CPU = torch.device("cpu")


def test_host_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("triton")
    monkeypatch.setattr(timing, "MAX_ROUNDS", 6)
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 1 << 16)
    command = ["host", "--budget", "1", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    (path,) = tmp_path.glob("*.csv")
    found = {(r.layer, r.provider, r.pass_, r.mode): r for r in rows.read(path) if r.p50_ms}
    everybody = (host.FUNCTION, providers.BARE, providers.PEFT, providers.OURS, host.OPERATOR)
    seven = (providers.BARE, providers.PEFT, providers.ALONE, providers.OURS)
    ways = (host.STUBBED, host.UNPLANNED)
    stubbed = [f"{name}, {way}" for name in (providers.ALONE, providers.OURS) for way in ways]
    assert set(found) == {
        (layer, provider, pass_, mode)
        for layer, there in [
            ("layer", everybody),
            ("block of seven", seven),
            *((f"layer, {rows}", [f"ours, {way}" for way in ways]) for rows in host.KERNEL_ROWS),
            *((f"block of seven, {rows}", stubbed) for rows in host.KERNEL_ROWS),
        ]
        for provider in there
        for pass_ in host.PASSES
        for mode in (host.HOT, host.COLD)
    }
    assert all(r.ratio_to_bare == pytest.approx(1) for key, r in found.items() if key[1] == host.FUNCTION)
    printed = capsys.readouterr().out
    assert "forward, no grad, cold" in printed and "captured: not measured" in printed
    assert "Microseconds of the host" in report.markdown(rows.read(path))


@pytest.mark.parametrize(
    "M, forward, backward",
    [
        (1, ["decode_kernel"], ["decode_kernel", "core_gradient_kernel"]),
        (512, ["thin_kernel", "gemm_kernel"], ["thin_kernel", "core_gradient_kernel", "gemm_kernel"]),
    ],
)
def test_stubbed_launches_are_those_of_a_card(M, forward, backward):
    pytest.importorskip("triton")
    import triton

    case = Case(512, 512, True, torch.bfloat16, CPU, 2, 13)
    (x,), (dy,) = case.operands(M, 1)
    ours = providers.make(providers.OURS, case.linear, case.factors)
    with torch.no_grad():
        want = ours.forward(x)
    driver = triton.runtime.driver._active
    with host.launches_stubbed_out() as launched:
        y = ours.forward(x)
        assert launched == forward
        launched.clear()
        torch.autograd.grad(y, [x, ours.trains], dy)
        assert launched == backward
    assert triton.runtime.driver._active is driver
    with torch.no_grad():
        assert torch.equal(ours.forward(x), want)


@pytest.mark.parametrize("M", [1, 512])
def test_a_second_call_decides_nothing_anew(M):
    """The tiles of a shape are looked up, not chosen, from its second call on: forward and backward."""
    pytest.importorskip("triton")
    from tinylora.kernels import tiles

    case = Case(512, 512, True, torch.bfloat16, CPU, 2, 13)
    (x,), (dy,) = case.operands(M, 1)
    ours = providers.make(providers.OURS, case.linear, case.factors)
    with host.launches_stubbed_out():
        for _ in range(2):
            asked = [f.cache_info().misses for f in (tiles.choose, tiles.thin_tile, tiles.core_gradient_tile)]
            torch.autograd.grad(ours.forward(x), [x, ours.trains], dy)
    assert [f.cache_info().misses for f in (tiles.choose, tiles.thin_tile, tiles.core_gradient_tile)] == asked
    assert asked[0] > 0


def test_siblings_spare_launches():
    pytest.importorskip("triton")
    case = host._seven(512, torch.bfloat16, CPU)
    for M, alone, together in ((1, (7, 14), (4, 8)), (512, (14, 21), (8, 12))):
        (xs,), (dys,) = case.operands(M)
        for name, want in ((providers.ALONE, alone), (providers.OURS, together)):
            (ours,) = host.seven_layers(case, (name,))
            with host.launches_stubbed_out() as launched:
                ys = ours.forward(*xs)
                forward = len(launched)
                torch.autograd.grad(ys, [*xs, *ours.trains], dys)
            assert (forward, len(launched) - forward) == want, (M, name)
