"""Gradients of the factors: sums over all rows, reduced in a fixed order.

    dC = tᵀ z       dv_a = <P_a, dC>       dD = qᵀ X       dU = dYᵀ s

t, z, q = t C, s = z Cᵀ: [M, r]. Rows are cut into slices, every program stores its partial sum, and the last
one to arrive adds them from first to last: no atomics on floats, the same bits on every run.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .blocks import apply_core, dot_wide, fold, last_to_arrive, load_basis, sum_planes
from .core import Core, core_precision
from .launch import Launch, Places, Plan
from .scratch import workspace
from .tiles import CoreGradient, FactorGradient


@triton.jit
def store_core_gradient(
    out, dcore, basis, adapter, i, j, R: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """Store tile (i, j) of dC, or with U > 0 dv_a = <P_a, dC>, as the gradient of one adapter's core."""
    if U == 0:
        rows = i * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        columns = j * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        out += adapter.to(tl.int64) * (R * R)
        tl.store(out + rows * R + columns, dcore.to(out.dtype.element_ty), mask=(rows < R) & (columns < R))
    else:  # then dC is one tile
        P: tl.constexpr = 2 if R <= 2 else triton.next_power_of_2(R)
        MOST: tl.constexpr = 4096 // (P * P)
        AT_ONCE: tl.constexpr = MOST if MOST < U else triton.next_power_of_2(U)
        small = fold(fold(dcore, P).T, P).T  # [P, P]
        rows = tl.arange(0, P)[None, :, None]
        columns = tl.arange(0, P)[None, None, :]
        for first in range(0, U, AT_ONCE):
            a = first + tl.arange(0, AT_ONCE)
            p = load_basis(basis, a[:, None, None], rows, columns, R, U, GROUPS)  # [AT_ONCE, P, P]
            dv = tl.sum(tl.sum(p.to(tl.float32) * small[None, :, :], axis=2), axis=1)
            tl.store(out + adapter.to(tl.int64) * U + a, dv.to(out.dtype.element_ty), mask=a < U)


@triton.jit(do_not_specialize=["M", "slice_rows"])
def core_gradient_kernel(
    t,
    z,
    ids,
    basis,
    out,
    planes,
    arrived,
    M,
    slice_rows,
    R: tl.constexpr,
    U: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_M: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dC [R, R] = Σ_m t[m] z[m]ᵀ in fp32, or dv [U]; with ROWS one sum per adapter over the rows that used it.

    Program (a, j, tile) sums slice_rows rows from row j slice_rows on, for adapter a and one
    [BLOCK_R, BLOCK_R] tile of dC; planes: [slices, tiles, adapters, BLOCK_R, BLOCK_R] fp32.
    PDL: the launch before may still run, and the one after may start.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    adapter = tl.program_id(0)
    tiles_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    i = tl.program_id(2) // tiles_r
    j = tl.program_id(2) % tiles_r
    rank_i = i * BLOCK_R + tl.arange(0, BLOCK_R)
    rank_j = j * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * slice_rows
    dcore = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for m_next in range(first, min(first + slice_rows, M), BLOCK_M):
        m = m_next + tl.arange(0, BLOCK_M)
        own = m < M  # [BLOCK_M]
        if ROWS:
            own &= tl.load(ids + m, mask=own, other=-1) == adapter
        at = m.to(tl.int64)[:, None] * R
        if tl.max(own.to(tl.int32), axis=0) > 0:
            a = tl.load(t + at + rank_i[None, :], mask=own[:, None] & (rank_i[None, :] < R), other=0.0)
            b = tl.load(z + at + rank_j[None, :], mask=own[:, None] & (rank_j[None, :] < R), other=0.0)
            dcore = tl.dot(a.T, b, dcore, input_precision=PRECISION)  # a, b: [BLOCK_M, BLOCK_R]
    if SPLIT_M:
        slices = tl.num_programs(1)
        own_tile = adapter * tl.num_programs(2) + tl.program_id(2)
        plane = tl.cast(tl.num_programs(0), tl.int64) * tl.num_programs(2) * BLOCK_R * BLOCK_R
        at = own_tile.to(tl.int64) * BLOCK_R * BLOCK_R
        at += tl.arange(0, BLOCK_R)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(planes + tl.program_id(1) * plane + at, dcore)
        if last_to_arrive(arrived + own_tile, slices):
            dcore = sum_planes(planes, plane, at, at >= 0, slices)
            store_core_gradient(out, dcore, basis, adapter, i, j, R, U, GROUPS, BLOCK_R)
    else:
        store_core_gradient(out, dcore, basis, adapter, i, j, R, U, GROUPS, BLOCK_R)


def plan_core_gradient(t: Tensor, z: Tensor, like: Tensor, core: Core, tile: CoreGradient) -> Plan:
    """What computes the gradient of `like` (C or v, one or one per adapter), in its dtype: a function of (t, z, core),
    of which the core can stay.

    t, z: [M, r] fp32, contiguous; later ones have the same shapes, and a later core is of the same kind.
    """
    M, r = t.shape
    adapters = like.shape[0] if core.kind == "rows" else 1
    tiles = (-(-r // tile.r)) ** 2
    slices = max(1, -(-M // tile.rows))
    planned = Launch(
        core_gradient_kernel,
        (adapters, slices, tiles),
        (M, tile.rows),
        {
            "R": r,
            "U": core.u,
            "GROUPS": core.groups,
            "ROWS": core.kind == "rows",
            "PRECISION": tile.precision,
            "SPLIT_M": slices > 1,
            "PDL": tile.pdl,
            "BLOCK_M": tile.m,
            "BLOCK_R": tile.r,
            "num_warps": tile.warps,
            "launch_pdl": tile.pdl,
        },
    )
    device, shape, dtype = t.device, like.shape, like.dtype
    sizes = (slices * adapters * tiles * tile.r * tile.r,)

    def run(t, z, core):
        out = torch.empty(shape, dtype=dtype, device=device)
        planes = workspace(device, sizes, adapters * tiles) if slices > 1 else (out, out)
        _, basis, ids = core.pointers(t)
        planned(t, z, ids, basis, out, *planes)
        return out

    def bind(core):
        """A function of (t, z) that gives the gradient, or None."""
        unused = torch.empty(4, dtype=torch.float32, device=device)
        _, basis, ids = core.pointers(unused)
        if not all(t is None or t.is_contiguous() for t in core[1:3]):
            return None
        launch, places = planned.bound((None, None, ids, basis, None, None, None), (0, 1, 4, 5, 6)), Places()
        if launch is None:
            return None

        def bound(t: Tensor, z: Tensor, _unused=unused) -> Tensor | None:
            out = torch.empty(shape, dtype=dtype, device=device)
            at = out.data_ptr()
            planes = places.of(workspace(device, sizes, adapters * tiles)) if slices > 1 else (at, at)
            return out if launch(t.data_ptr(), z.data_ptr(), at, *planes) else None

        return bound

    return Plan(run, bind)


@triton.jit(do_not_specialize=["M", "adapters", "slice_rows"])
def factor_gradient_kernel(
    z,
    core,
    basis,
    ids,
    x,
    out,
    planes,
    arrived,
    M,
    adapters,
    slice_rows,
    C,
    stride_xm,
    stride_xc,
    stride_or,
    stride_oc,
    R: tl.constexpr,
    U: tl.constexpr,
    GROUPS: tl.constexpr,
    CORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    SPLIT_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out [R, C] = sᵀ X with s = z Cᵀ (z C if TRANSPOSED): dD from (t, X), dU from (z, dY).

    Program (i, j) owns BLOCK_C columns and sums slice_rows rows from row j slice_rows on, in fp32, as outᵀ
    [BLOCK_C, BLOCK_R]; planes: [slices, C, R] fp32.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ranks = tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * slice_rows
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for m_next in range(first, min(first + slice_rows, M), BLOCK_M):
        m = m_next + tl.arange(0, BLOCK_M)
        row = m.to(tl.int64)[:, None]
        z_tile = tl.load(z + row * R + ranks[None, :], mask=(m[:, None] < M) & (ranks[None, :] < R), other=0.0)
        s_tile = apply_core(
            z_tile, core, basis, ids, m, M, adapters, CORE, TRANSPOSED, R, U, GROUPS, BLOCK_R, CORE_PRECISION
        )  # [BLOCK_M, BLOCK_R]
        x_at = x + row * stride_xm + c.to(tl.int64)[None, :] * stride_xc
        x_tile = tl.load(x_at, mask=(m[:, None] < M) & (c[None, :] < C), other=0.0)  # [BLOCK_M, BLOCK_C]
        acc = dot_wide(x_tile.T, s_tile, acc, PRECISION, IN_PARTS=False)
    inside = (c[:, None] < C) & (ranks[None, :] < R)
    out_at = out + ranks[None, :] * stride_or + c.to(tl.int64)[:, None] * stride_oc
    if SPLIT_M:
        slices = tl.num_programs(1)
        plane = tl.cast(C, tl.int64) * R
        at = c.to(tl.int64)[:, None] * R + ranks[None, :]
        tl.store(planes + tl.program_id(1) * plane + at, acc, mask=inside)
        if last_to_arrive(arrived + tl.program_id(0), slices):
            acc = sum_planes(planes, plane, at, inside, slices)
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)


def plan_factor_gradient(
    z: Tensor, core: Core, x: Tensor, out: Tensor, tile: FactorGradient, precision: str
) -> Callable[[Tensor, Core, Tensor, Tensor], None]:
    """What writes sᵀ X into out [r, C] (any strides), z [M, r] fp32 and x [M, C] in any strides, for operands like
    these: a function of (z, core, x, out)."""
    M, C = x.shape
    r = z.shape[1]
    blocks = -(-C // tile.c)
    slices = max(1, -(-M // tile.rows))
    launch = Launch(
        factor_gradient_kernel,
        (blocks, slices),
        (M, core.adapters, tile.rows, C, *x.stride(), *out.stride()),
        {
            "R": r,
            "U": core.u,
            "GROUPS": core.groups,
            "CORE": core.kind,
            "TRANSPOSED": core.transposed,
            "PRECISION": precision,
            "CORE_PRECISION": core_precision(x.dtype, precision),
            "SPLIT_M": slices > 1,
            "BLOCK_M": tile.m,
            "BLOCK_C": tile.c,
            "BLOCK_R": tile.width,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        },
    )
    device, sizes = x.device, (slices * C * r,)

    def run(z, core, x, out):
        planes = workspace(device, sizes, blocks) if slices > 1 else (z, z)
        launch(z, *core.pointers(z), x, out, *planes)

    return run
