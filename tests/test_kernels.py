"""Every kernel in Triton's interpreter, through the public operator: numbers, masks, strides, flags.

The interpreter's tiles are 32x32x32 (`tiles.choose` without a capability): sizes here cross their edges on every
axis. `tests/mutants.py` breaks each mask and each term once and sees a test here fail.
"""

import os
import subprocess
import sys
from pathlib import Path

import lanes
import pytest
import torch
import torch.nn.functional as F
from problems import NAMES, Problem, assert_as_good_as_torch, exact, grads, torch_own
from triton.runtime.interpreter import InterpreterBuilder

import tinylora.kernels.decode as decode_module
import tinylora.kernels.thin as thin_module
from tinylora.kernels import tiles
from tinylora.kernels.core import Core
from tinylora.kernels.gemm import fits_descriptors
from tinylora.kernels.thin import thin
from tinylora.ops import adapted_linear, eager, fused
from tinylora.ops.siblings import adapted_linears

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16

# Triton 3.6's interpreter makes Python numbers of arrays in a way that numpy will end: hence numpy < 2.4 there.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

# Up to 128 rows the decode kernel runs, above it the thin pass and the fused matmul; up to rank 8 decode is inline.
PROBLEMS = [
    Problem(0, 72, 40, 2),
    Problem(1, 1, 1, 1),
    Problem(1, 72, 136, 2),
    Problem(5, 77, 100, 3),
    Problem(5, 77, 100, 3, f16),
    Problem(5, 77, 100, 3, bf16),
    Problem(5, 64, 96, 8, core="none"),
    Problem(65, 40, 72, 2, bf16, core="rows"),
    Problem(37, 40, 72, 8, core="rows", bias=False),
    Problem(37, 40, 72, 3, bf16, core="diagonal"),
    Problem(37, 40, 72, 3, core="mixed"),
    Problem(37, 40, 72, 3, bf16, core="mixed-rows"),
    Problem(21, 40, 72, 5, core="mixed", u=90),  # more P than are mixed at once
    Problem(21, 40, 72, 5, bf16, core="mixed-rows", u=90),
    Problem(21, 40, 72, 13, core="mixed-rows", u=20),
    Problem(37, 40, 72, 3, bf16, factors=f32),
    Problem(5, 77, 100, 13),  # decode in two launches
    Problem(65, 40, 72, 16, f16, core="rows"),
    Problem(33, 40, 72, 64, bf16),
    Problem(33, 40, 72, 70, bf16, core="diagonal", factors=f32),
    Problem(33, 40, 72, 13, core="mixed-rows"),
    Problem(33, 40, 72, 100, bf16, core="none"),  # rank in several dots
    Problem(130, 72, 104, 2),  # bulk copies
    Problem(130, 72, 104, 2, f16),
    Problem(130, 72, 104, 2, bf16),
    Problem(130, 64, 64, 2, core="none", bias=False),  # every size a whole number of tiles but M
    Problem(130, 72, 104, 8, bf16, core="rows"),
    Problem(130, 72, 104, 13, core="diagonal"),
    Problem(130, 72, 104, 3, core="mixed"),
    Problem(130, 72, 104, 13, bf16, core="mixed-rows"),
    Problem(130, 72, 104, 16, bf16, factors=f32),
    Problem(130, 72, 104, 16, f32, factors=bf16),
    Problem(130, 72, 104, 64, f16),
    Problem(130, 72, 104, 70, core="none"),
    Problem(130, 77, 105, 2),  # rows that bulk copies refuse: pointers
    Problem(130, 77, 105, 3, bf16, core="rows"),
    Problem(130, 77, 105, 13, f16),
    Problem(130, 77, 105, 70, bf16, core="none"),
    Problem(260, 33, 40, 1, core="rows", adapters=70),
]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, poison_empty):
    """Launches run in the interpreter on NaN-poisoned buffers, and the torch path is out of reach."""

    def unreachable(*args, **kwargs):
        raise AssertionError("the torch path ran where the kernels should")

    monkeypatch.setattr(eager, "forward", unreachable)
    monkeypatch.setattr(eager, "backward", unreachable)
    with lanes.interpreter():
        yield


def surround(t):
    """The same numbers as a view with holes into a buffer of NaN: what is read beside them shows."""
    if t is None or not t.is_floating_point() or t.numel() == 0:
        return t
    around = t.new_full([2 * n + 3 for n in t.shape], float("nan"))
    view = around[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return view.copy_(t)


def pad_rows(t):
    """The same numbers with a contiguous last dimension and NaN after each row, at a stride of whole 16 bytes."""
    if t is None or t.dim() < 2 or t.numel() == 0:
        return t
    width = (t.shape[-1] + 16) // 8 * 8
    around = t.new_full((*t.shape[:-2], t.shape[-2] + 1, width), float("nan"))
    return around[..., : t.shape[-2], : t.shape[-1]].copy_(t)


def hold(problem, choice=None, layout=lambda t: t, operator=adapted_linear):
    """Our numbers and gradients against fp64, by the one rule."""
    operands, ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to(problem.dtype)
    placed = [layout(t) for t in operands]
    leaves = [None if t is None else t.detach().requires_grad_() for t in placed]
    y = operator(*leaves, ids, basis=layout(basis))
    y.backward(layout(dy))
    ours = {"y": y.detach()} | {n: t.grad for n, t in zip(NAMES, leaves, strict=True) if t is not None}
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])
        assert value.dtype == (operands[0] if name == "y" else operands[NAMES.index(name)]).dtype, name


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_numbers(problem):
    hold(problem)


@pytest.mark.parametrize("layout", [lambda t: t, surround], ids=["plain", "surround"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(0, 72, 104, 2),
        Problem(1, 77, 105, 3, bf16, core="mixed"),
        Problem(37, 72, 104, 16, bf16, factors=f32, core="none"),
        Problem(37, 72, 104, 8, core="rows"),
        Problem(64, 77, 105, 70, f16, core="diagonal"),
        Problem(64, 40, 72, 13, bf16),
    ],
    ids=lambda p: p.id,
)
def test_added_to_what_something_else_has_multiplied(problem, layout):
    """What runs beside bitsandbytes' product (`ops/four_bit.py`)."""
    operands, ids, basis = problem.operands()
    x, weight, down, core, up, bias = operands
    dy = torch.zeros(problem.M, problem.N)
    y = F.linear(x, weight, bias)
    z = fused.add_low_rank(y, layout(x), layout(down), layout(core), layout(up), ids, layout(basis))
    assert_as_good_as_torch("y", y, exact(operands, ids, basis, dy)["y"], torch_own(operands, ids, basis, dy)["y"])
    assert_as_good_as_torch("z", z, x.double() @ down.double().T, x @ down.to(x.dtype).T)
    assert z.dtype == f32 and z.shape == (problem.M, problem.r)


@pytest.mark.parametrize("layout", [surround, pad_rows], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(5, 77, 100, 3),
        Problem(37, 40, 72, 3, bf16, core="mixed-rows"),
        Problem(5, 77, 100, 13),
        Problem(130, 72, 104, 2, f16),
        Problem(130, 77, 105, 13, core="rows"),
        Problem(33, 40, 72, 13, core="mixed-rows"),
        Problem(37, 40, 72, 3, core="none"),
        Problem(130, 72, 104, 3, core="none"),
    ],
    ids=lambda p: p.id,
)
def test_strides_and_what_lies_beside_the_operands(problem, layout):
    hold(problem, layout=layout)


def test_transposed_operands_and_a_broadcast_gradient():
    (x, weight, down, core, up, bias), ids, _ = Problem(130, 72, 104, 2).operands()
    turned = [t.T.contiguous().T for t in (x, weight, down, core, up)]
    want = F.linear(x, weight + up @ core @ down, bias)
    leaves = [t.requires_grad_() for t in (*turned, bias)]
    y = adapted_linear(*leaves)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(
        leaves[0].grad, (weight + up @ core @ down).sum(0).expand(130, 104), rtol=1e-4, atol=1e-4
    )


GEMMS = {
    "tall": tiles.Gemm(64, 16, 32, 4, 1, True, 2, 1, 1),
    "wide, four column blocks": tiles.Gemm(16, 128, 16, 4, 1, True, 5, 4, 4),
    "one program": tiles.Gemm(32, 32, 64, 4, 1, True, 1, 2, 8),
    "pointers": tiles.Gemm(16, 64, 16, 4, 1, False, 0, 1, 3),
    "rank by 16": tiles.Gemm(32, 32, 32, 4, 1, True, 3, 1, 2, 16),
    "rank by 16, pointers": tiles.Gemm(32, 32, 32, 4, 1, False, 0, 1, 2, 16),
}


@pytest.mark.parametrize("r", [2, 16, 40])
@pytest.mark.parametrize("name", [*GEMMS, "the library, then a pass over Y"])
def test_every_way_to_multiply_many_rows(name, r, monkeypatch):
    thin_tile = tiles.Thin(32, 16, 1 if r == 16 else 5, tiles.pad(r))
    expand = tiles.Gemm(16, 32, 16, 4, 1, rank=16)
    choice = tiles.Choice(GEMMS.get(name), thin_tile, None if name in GEMMS else expand)
    monkeypatch.setattr(tiles, "choose", lambda *args: choice)
    for dtype in (f32, bf16) if r == 2 else (f16,):
        problem = Problem(130, 72, 104, r, dtype)
        hold(problem)


@pytest.mark.parametrize("name", ["tall", "rank by 16", "pointers", "the library, then a pass over Y", "decode"])
@pytest.mark.parametrize("sizes", [(48, 16, 16), (7, 66), (8, 8, 8, 48)], ids=str)
def test_dx_from_gradients_side_by_side(name, sizes):
    """Siblings: steps of K cross from one gradient into the next, rows lie apart, and NaN lies around each."""
    expand = tiles.Gemm(16, 32, 16, 4, 1, rank=16)
    many = tiles.Choice(GEMMS.get(name), tiles.Thin(32, 16, 3, 16), None if name in GEMMS else expand)
    choice = tiles.Choice(tiles.Decode(64, 16, 16, 3), None, None) if name == "decode" else many
    for dtype in (f32, bf16):
        problem = Problem(40 if name == "decode" else 70, sum(sizes), 72, 6, dtype, core="mixed", bias=False)
        (x, weight, down, v, up, _), ids, basis = problem.operands()
        dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to(dtype)
        z = eager.thin(x, down)
        with lanes.interpreter():
            bulk = name in GEMMS and GEMMS[name].descriptors
            dys = [(pad_rows if bulk else surround)(part) for part in dy.split(sizes, 1)]
            dx, dv = fused.backward_of_parts(dys, z, weight, down, v, up, None, basis, True, True, choice)
            _, alone = fused.backward_of_parts(dys, z, weight, down, v, up, None, basis, False, True)
        torch.testing.assert_close(alone, dv, rtol=1e-5, atol=1e-5)
        given = (x, weight, down, v, up, None), ids, basis, dy
        true, torchs = exact(*given), torch_own(*given)
        assert_as_good_as_torch("x", dx, true["x"], torchs["x"])
        assert_as_good_as_torch("core", dv, true["core"], torchs["core"])


BLOCKS = [
    Problem(5, 48, 72, 6, core="mixed", u=39, groups=3),
    Problem(21, 48, 72, 4, bf16, core="mixed", u=26, groups=2, factors=f32),
    Problem(21, 48, 72, 5, core="mixed", u=5, groups=5),  # one number each
    Problem(130, 48, 72, 6, f16, core="mixed", u=9, groups=3),
    Problem(33, 48, 72, 15, core="mixed", u=9, groups=3),
    Problem(21, 48, 72, 6, bf16, core="mixed-rows", u=39, groups=3),
    Problem(33, 48, 72, 10, core="mixed-rows", u=34, groups=2),
    Problem(21, 48, 72, 40, bf16, core="mixed", u=26, groups=2),  # C is mixed beforehand
]


@pytest.mark.parametrize("problem", BLOCKS, ids=lambda p: p.id)
def test_siblings_with_a_core_each(problem):
    """C has their blocks on its diagonal, and nothing is read of what lies between."""
    (x, weight, down, v, up, bias), ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to(problem.dtype)
    given = (x, weight, down, v, up, bias), ids, basis, dy

    def ours(x, weight, down, v, up, bias, ids, basis):
        v = torch.cat([v, v.new_full((*v.shape[:-1], 99), float("nan"))], -1)[..., : v.shape[-1]]  # NaN lies behind it
        frozen = [weight.detach()], down.detach(), v, up.detach(), [bias.detach()]
        return torch.cat(adapted_linears(x, *frozen, ids, basis, sizes=[8, 40]), -1)

    got, true, torchs = grads(ours, given[0], ids, surround(basis), dy), exact(*given), torch_own(*given)
    for name in ("y", "x", "core"):
        assert_as_good_as_torch(name, got[name], true[name], torchs[name])


@pytest.mark.parametrize("transposed", [False, True])
def test_more_p_in_a_block_than_are_mixed_at_once(transposed):
    problem = Problem(40, 8, 72, 6, core="mixed", u=140, groups=2)
    (x, _, down, v, _, _), _, basis = problem.operands()
    core = Core(v, basis, None, transposed)
    _, s = thin(x, down, core, tiles.Thin(16, 32, 2, 16), "ieee", want_s=True)
    C = eager.mix(v.double(), basis.double())
    want = x.double() @ down.double().T @ (C if transposed else C.T)
    torch.testing.assert_close(s[:, :6].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [1, 2, 9])
def test_every_split_of_k_in_decode(split, monkeypatch):
    """9 slices of 100 leave some with nothing to do."""
    for r, k in ((3, 64), (13, 16)):
        thin = None if r <= 8 else tiles.Thin(16, 32, split, 16)
        choice = tiles.Choice(tiles.Decode(16, 16, k, split), thin, None)
        monkeypatch.setattr(tiles, "choose", lambda *args, choice=choice: choice)
        hold(Problem(9, 77, 100, r, bf16, core="rows"))


@pytest.mark.parametrize("core", ["none", "dense", "diagonal", "rows", "mixed", "mixed-rows"])
@pytest.mark.parametrize("transposed, factors", [(False, bf16), (True, f32)])
def test_the_thin_pass_keeps_the_core_in_fp32(core, transposed, factors):
    """s as [rounded | remainder] and fp32 factors beside bf16 are exact to 16 bits."""
    problem = Problem(40, 8, 72, 5, bf16, core=core, factors=factors)
    (x, _, down, c, _, _), ids, basis = problem.operands()
    z, s = thin(x, down, Core(c, basis, ids, transposed), tiles.Thin(16, 32, 2, 16), "ieee", want_s=True)
    wide = None if c is None else c.double()
    mixed = eager.mix(wide, None if basis is None else basis.double())
    want_z = eager.thin(x.double(), down.double())
    want_s = eager.apply_core(want_z, mixed, ids, transposed)
    assert z.dtype == f32 and s.dtype == bf16
    torch.testing.assert_close(z.double(), want_z, rtol=0, atol=5e-5)
    torch.testing.assert_close(s[:, :5].double() + s[:, 8:13].double(), want_s, rtol=2**-14, atol=1e-4)
    assert s[:, 5:8].eq(0).all() and s[:, 13:].eq(0).all()


def test_the_thin_pass_reads_no_rank_beyond_r():
    """In one slice and without a core nothing after the load would hide it."""
    (x, _, down, *_), _, _ = Problem(40, 8, 72, 3).operands()
    _, s = thin(surround(x), surround(down), Core(), tiles.Thin(16, 32, 1, 16), "ieee", want_s=True)
    assert s.isfinite().all()


@pytest.mark.parametrize("M, r", [(5, 3), (5, 13), (130, 13)])
def test_no_number_behind_a_diagonal_is_read(M, r):
    (x, weight, down, core, up, bias), *_ = Problem(M, 72, 104, r, bf16, core="diagonal").operands()
    behind = torch.full((64,), float("nan"))
    behind[:r] = core
    y = adapted_linear(x, weight, down, behind[:r], up, bias)
    assert torch.equal(y, adapted_linear(x, weight, down, core, up, bias)) and y.isfinite().all()


@pytest.mark.parametrize("M, N, K", [(20, 40, 72), (130, 72, 104), (130, 77, 105)], ids=["decode", "bulk", "pointers"])
@pytest.mark.parametrize("factors", [bf16, f32], ids=str)
def test_rank_r_arrives_in_y_with_more_bits_than_bf16_has(M, N, K, factors):
    """Without a base layer Y is s Uᵀ rounded once: s alone rounded to bf16 would miss the nearest number often."""
    (x, weight, down, core, up, _), _, _ = Problem(M, N, K, 5, bf16, factors=factors).operands()
    up = up.bfloat16()
    with torch.no_grad():
        y = adapted_linear(x, torch.zeros_like(weight), down, core, up)
    want = x.double() @ (up.double() @ core.double() @ down.double()).T
    assert (y == want.bfloat16()).double().mean() > 0.97


def test_rows_without_an_adapter_are_the_base_layer_whatever_the_others_hold():
    for M in (33, 130):
        (x, weight, down, core, up, bias), ids, _ = Problem(M, 72, 104, 2, f16, core="rows").operands()
        core[0] = float("nan")
        with torch.no_grad():
            y = adapted_linear(x, weight, down, core, up, bias, ids)
            base = adapted_linear(x, weight, down, torch.zeros_like(core), up, bias, ids)
        assert torch.equal(y[ids == -1], base[ids == -1]) and (ids == -1).any()
        assert y[ids == 0].isnan().any(1).all()


@pytest.mark.parametrize(
    "M, r, core", [(9, 3, "rows"), (9, 13, "mixed-rows"), (130, 2, "mixed-rows"), (130, 3, "rows")]
)
def test_an_id_out_of_range_reads_nothing_and_gives_nan(M, r, core, monkeypatch):
    """As on a GPU, where nobody looks at the ids first."""
    monkeypatch.setattr(eager, "check_ids", lambda *_: None)
    (x, weight, down, c, up, bias), ids, basis = Problem(M, 40, 72, r, core=core).operands()
    leaves = [t.requires_grad_() for t in (x, down, c, up)]
    good = adapted_linear(x, weight, down, c, up, bias, ids, basis=basis)
    want = torch.autograd.grad(good.sum(), leaves)
    wrong, bad = ids.clone(), torch.zeros(M, dtype=torch.bool)
    for m, id in ((1, len(c)), (2, -2), (5, 1 << 40), (8, -(1 << 40))):
        wrong[m], bad[m] = id, True
    y = adapted_linear(x, weight, down, c, up, bias, wrong, basis=basis)
    assert y[bad].isnan().all() and torch.equal(y[~bad], good[~bad])
    dx, ddown, dc, dup = torch.autograd.grad(y.sum(), leaves)
    assert dx[bad].isnan().all() and torch.equal(dx[~bad], want[0][~bad])
    assert ddown.isnan().all() and dup.isnan().all()  # sums over all rows
    kept = ids.masked_fill(bad, -1)
    without = adapted_linear(x, weight, down, c, up, bias, kept, basis=basis)
    torch.testing.assert_close(dc, torch.autograd.grad(without.sum(), c)[0])


@pytest.mark.parametrize("problem", [Problem(130, 72, 104, 2, bf16), Problem(17, 77, 100, 3, bf16)], ids=lambda p: p.id)
def test_bitwise_repeatable_and_the_counters_return_to_zero(problem, monkeypatch):
    from tinylora.kernels import scratch

    handed_out = []

    def counters(n, device):
        handed_out.append(torch.zeros(n, dtype=torch.int32))
        return handed_out[-1]

    monkeypatch.setattr(scratch, "counters", counters)
    operands, ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N).to(problem.dtype)
    first, second = (grads(adapted_linear, operands, ids, basis, dy) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert handed_out and not torch.cat(handed_out).any()


@pytest.mark.parametrize("asked", [(n,) for n in NAMES] + [("down", "up"), ("core", "down")], ids="+".join)
def test_gradients_one_by_one(asked):
    for M in (20, 130):
        operands, ids, basis = Problem(M, 40, 72, 2).operands()
        want = exact(operands, ids, basis, torch.ones(M, 40))
        leaves = [t.detach().requires_grad_(n in asked) for n, t in zip(NAMES, operands, strict=True)]
        adapted_linear(*leaves).backward(torch.ones(M, 40))
        for name, leaf in zip(NAMES, leaves, strict=True):
            assert (leaf.grad is not None) == (name in asked)
            if name in asked:
                torch.testing.assert_close(leaf.grad.double(), want[name], rtol=1e-4, atol=1e-4)


def test_a_large_basis_is_mixed_by_torch():
    problem = Problem(20, 40, 72, 40, core="mixed", u=20)
    assert problem.r * problem.u > fused.MIXED_INSIDE
    hold(problem)


def test_offsets_past_two_to_the_31():
    """Row strides that no int32 product reaches: only the first and the last row are backed by memory."""
    M, N, K, r = 3, 16, 8, 2
    far = (1 << 31) // 2 + 8
    (x, weight, down, core, up, _), _, _ = Problem(M, N, K, r).operands()
    try:
        room = torch.UntypedStorage(4 * (far * (M - 1) + K))
    except RuntimeError:
        pytest.skip("needs 8 GiB of address space")
    wide = torch.empty(0).set_(room, 0, (M, K), (far, 1)).copy_(x)
    with torch.no_grad():
        y = adapted_linear(wide, weight, down, core, up)
        # through the thin pass and the pointer matmul, too
        choice = tiles.Choice(tiles.Gemm(16, 16, 16, 4, 1), tiles.Thin(16, 16, 1, 16), None)
        again, _ = fused.forward(wide, weight, down, core, up, None, None, None, choice)
    want = F.linear(x, weight + up @ core @ down)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)


def test_steps_past_two_to_the_31():
    """Columns so far apart that a block of them passes int32: of x, and of W as dX sees it."""
    M, N, K, r = 2, 16, 100, 2
    far = 1 << 26
    (x, weight, down, core, up, _), _, _ = Problem(M, N, K, r, torch.float16).operands()
    try:
        room = torch.UntypedStorage(2 * far * K)
    except RuntimeError:
        pytest.skip("needs 13 GB of address space")

    def spread(t, strides):
        return torch.empty(0, dtype=t.dtype).set_(room, 0, t.shape, strides).copy_(t)

    with torch.no_grad():
        y = adapted_linear(spread(x, (1, far)), weight, down, core, up)
    torch.testing.assert_close(y, adapted_linear(x, weight, down, core, up), rtol=0, atol=0)
    turned, dy = weight.T.contiguous(), x
    found = []
    for w in (turned, spread(turned, (far, 1))):
        a = torch.zeros(M, N, dtype=x.dtype, requires_grad=True)
        found += torch.autograd.grad(adapted_linear(a, w, up.T.contiguous(), None, down.T.contiguous()), a, dy)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


SCRIPT = """
import torch
from tinylora.ops import adapted_linear, reference, eager
def fail(*a): raise AssertionError("the torch path ran")
eager.forward = eager.backward = fail
g = torch.Generator().manual_seed(0)
for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
    for M, N, K, r in ((5, 40, 72, 2), (130, 40, 72, 3)):
        shapes = (M, K), (N, K), (r, K), (r, r), (N, r), (N,)
        operands = [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in shapes]
        wide = [t.detach().double().requires_grad_() for t in operands]
        y, want = adapted_linear(*operands), reference.adapted_linear(*wide)
        dy = torch.randn(M, N, generator=g).to(dtype)
        y.backward(dy), want.backward(dy.double())
        for ours, exact in ((y, want), *((a.grad, b.grad) for a, b in zip(operands, wide))):
            assert (ours.double() - exact).norm() <= rtol * exact.norm(), (dtype, M, ours.shape)
print("ran")
"""


def test_the_environment_variable_alone_is_enough():
    """TRITON_INTERPRET=1 set before Python starts: the public operator runs the kernels on CPU tensors."""
    root = Path(__file__).parents[1]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ran", done.stderr[-2000:]


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "beside"])
@pytest.mark.parametrize("split", [1, 3])
def test_nothing_is_written_before_the_launch_before_is_waited_for(split, inline, monkeypatch):
    """Launches of one stream share planes and counters: a program of decode that starts early must touch neither."""
    events = []
    for module in (decode_module, thin_module):
        for name in ("gdc_wait", "gdc_launch_dependents"):
            monkeypatch.setattr(module, name, lambda *a, name=name, **k: events.append(name), raising=False)
    for name in ("create_masked_store", "create_store", "create_atomic_rmw"):
        before = getattr(InterpreterBuilder, name)
        monkeypatch.setattr(
            InterpreterBuilder, name, lambda *a, before=before, **k: (events.append("writes"), before(*a, **k))[1]
        )
    before = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda *a: (events.append("program"), before(*a))[1])
    thin_tile = None if inline else tiles.Thin(16, 32, 2, 16, 4, 1, pdl=True)
    choice = tiles.Choice(tiles.Decode(16, 32, 32, split, 4, 1, pdl=True), thin_tile, None)
    (x, w, d, c, u, b), _, _ = Problem(9, 72, 200, 2).operands()
    fused.forward(x, w, d, c, u, b, None, None, choice)
    programs = " ".join(events).split("program")[1:]
    decode = [p.split() for p in programs if "gdc_launch_dependents" not in p]
    assert len(decode) == -(-72 // 32) * split
    for program in decode:
        assert program[0] == "gdc_wait" and "writes" in program


@pytest.mark.parametrize("wanted", ["core", "down", "up"])
@pytest.mark.parametrize("core", ["dense", "mixed", "rows"])
def test_no_rows_and_an_x_without_a_gradient(core, wanted):
    operands, ids, basis = Problem(0, 72, 256, 2, core=core).operands()
    operands[NAMES.index(wanted)].requires_grad_()
    adapted_linear(*operands, ids, basis=basis).sum().backward()
    assert operands[NAMES.index(wanted)].grad.abs().sum() == 0


def test_a_v_of_many_ranks():
    """dC of up to 32 ranks stays in one tile where v is made of it."""
    hold(Problem(20, 40, 72, 24, core="mixed", u=3))


@pytest.mark.parametrize("of", ["x", "dy"])
def test_the_library_s_y_has_the_dimensions_of_x(of, monkeypatch):
    """Where leading dimensions do not fold into one, on the way that the interpreter never chooses."""
    (x, w, d, c, u, b), _, _ = Problem(48, 72, 104, 2).operands()
    thin_tile, expand = tiles.added(48, 104, 2, f32, None)
    monkeypatch.setattr(tiles, "choose", lambda *a, **k: tiles.Choice(None, thin_tile, expand))
    shape = (2, 24, 104)
    x = x.view(24, 2, 104).transpose(0, 1) if of == "x" else x.view(shape)
    x = x.detach().requires_grad_()
    y = adapted_linear(x, w, d, c, u, b)
    assert y.shape == (2, 24, 72)
    torch.testing.assert_close(y, F.linear(x, w + u @ c @ d, b), rtol=1e-4, atol=1e-4)
    dy = torch.randn(24, 2, 72).transpose(0, 1) if of == "dy" else torch.randn(2, 24, 72)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy @ (w + u @ c @ d), rtol=1e-4, atol=1e-4)


def test_a_weight_of_one_row_seen_as_many_takes_no_bulk_copies():
    w = torch.randn(1, 104).expand(72, 104)
    assert not fits_descriptors(torch.randn(130, 104), w) and not fits_descriptors(torch.randn(130, 72), w.T)
