"""The thin pass: what the adapter needs of the long operand, reduced to rank r and through the core.

    z = X Dᵀ       s = z Cᵀ          X [M, K], D [r, K], C [r, r], z and s [M, r]

The backward calls it with the roles swapped: t = dY U and q = t C.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from .blocks import apply_core, dot_wide, last_to_arrive, sum_planes
from .columns import ColumnBlocks
from .core import Core, core_precision
from .launch import Launch, Places, Plan
from .scratch import workspace
from .tiles import Thin, period


@triton.jit
def store_rank_rows(
    z, z_tile, s, core, basis, ids, m, M, adapters,
    R: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr, CORE: tl.constexpr, TRANSPOSED: tl.constexpr,
    STORE_S: tl.constexpr, WIDTH: tl.constexpr, PERIOD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store z in fp32, and s = z Cᵀ in s's dtype with zeros up to WIDTH columns.

    Where PERIOD is half of WIDTH, s is stored as two numbers, [rounded | what rounding lost]: the dot that
    reads it pads the rank to 16 anyway, and s then arrives with twice the bits.
    """
    ranks = tl.arange(0, WIDTH)
    row = m.to(tl.int64)[:, None]
    inside = m[:, None] < M
    tl.store(z + row * R + ranks[None, :], z_tile, mask=inside & (ranks[None, :] < R))  # [BLOCK_M, WIDTH]
    if STORE_S:
        s_tile = apply_core(
            z_tile, core, basis, ids, m, M, adapters, CORE, TRANSPOSED, R, U, GROUPS, WIDTH, PRECISION
        )  # [BLOCK_M, WIDTH]
        high = s_tile.to(s.dtype.element_ty)
        at = s + row * WIDTH + ranks[None, :]
        tl.store(at, high, mask=inside & (ranks[None, :] < PERIOD))
        if PERIOD < WIDTH:
            low = (s_tile - high.to(tl.float32)).to(s.dtype.element_ty)
            tl.store(at + PERIOD, low, mask=inside & (ranks[None, :] < WIDTH - PERIOD))


@triton.jit
def reduce_columns(
    z_tile, x, down, m, M, first, last, begin, stride_xm, stride_xk, stride_dr, stride_dk,
    R: tl.constexpr, WIDTH: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z_tile + X[:, first:last] D[:, first:last]ᵀ for rows m, where x points at column `begin` of X."""
    ranks = tl.arange(0, WIDTH)
    real = ranks < R
    k = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
    # Rows beyond M wrap around: what they give is never stored.
    x_at = x + (m % M).to(tl.int64)[:, None] * stride_xm + (k - begin)[None, :] * stride_xk
    d_at = down + ranks.to(tl.int64)[None, :] * stride_dr + k[:, None] * stride_dk
    for k_next in range(first, last, BLOCK_K):
        inside = tl.arange(0, BLOCK_K) < last - k_next
        if EVEN_K:
            a = tl.load(x_at)  # [BLOCK_M, BLOCK_K]
            b = tl.load(d_at, mask=real[None, :], other=0.0)  # [BLOCK_K, WIDTH]
        else:
            a = tl.load(x_at, mask=inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
            b = tl.load(d_at, mask=real[None, :] & inside[:, None], other=0.0)  # [BLOCK_K, WIDTH]
        z_tile = dot_wide(a, b, z_tile, PRECISION)
        x_at += BLOCK_K * stride_xk
        d_at += BLOCK_K * stride_dk
    return z_tile


@triton.jit(do_not_specialize=["M", "adapters"])
def thin_kernel(
    x,
    x1,
    x2,
    down,
    core,
    basis,
    ids,
    z,
    s,
    planes,
    arrived,
    M,
    adapters,
    K,
    end,
    end1,
    stride_xm,
    stride_x1m,
    stride_x2m,
    stride_xk,
    stride_dr,
    stride_dk,
    BLOCKS: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    GROUPS: tl.constexpr,
    CORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STORE_S: tl.constexpr,
    WIDTH: tl.constexpr,
    PERIOD: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z [M, R] fp32 and s [M, WIDTH]; program (i, j) sums row block i over slice j of K, in fp32.

    PDL: the matmul that reads s may start as soon as every program of this launch has.

    X lies in BLOCKS tensors side by side: x up to column `end`, x1 up to `end1`, x2 up to K.

    SPLIT_K: every program stores its partial z in planes [slices, M, R], and the last one of a row block adds
    the planes from first to last, whoever it is: the same bits on every run.
    """
    if PDL:
        gdc_launch_dependents()
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, WIDTH)
    real = ranks < R
    slices = tl.num_programs(1)
    k_slice = tl.cdiv(tl.cdiv(K, BLOCK_K), slices) * BLOCK_K
    k_first = tl.program_id(1) * k_slice
    k_last = min(k_first + k_slice, K)
    z_tile = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    z_tile = reduce_columns(
        z_tile, x, down, m, M, k_first, min(k_last, end), 0, stride_xm, stride_xk, stride_dr, stride_dk,
        R, WIDTH, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    if BLOCKS > 1:
        z_tile = reduce_columns(
            z_tile, x1, down, m, M, max(k_first, end), min(k_last, end1), end, stride_x1m, stride_xk,
            stride_dr, stride_dk, R, WIDTH, EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
    if BLOCKS > 2:
        z_tile = reduce_columns(
            z_tile, x2, down, m, M, max(k_first, end1), k_last, end1, stride_x2m, stride_xk,
            stride_dr, stride_dk, R, WIDTH, EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
    if SPLIT_K:
        at = m.to(tl.int64)[:, None] * R + ranks[None, :]
        one = (m[:, None] < M) & real[None, :]
        plane = tl.cast(M, tl.int64) * R
        tl.store(planes + tl.program_id(1) * plane + at, z_tile, mask=one)
        if last_to_arrive(arrived + tl.program_id(0), slices):
            z_tile = sum_planes(planes, plane, at, one, slices)
            store_rank_rows(
                z, z_tile, s, core, basis, ids, m, M, adapters, R, U, GROUPS, CORE, TRANSPOSED, STORE_S, WIDTH, PERIOD,
                CORE_PRECISION,
            )  # fmt: skip
    else:
        store_rank_rows(
            z, z_tile, s, core, basis, ids, m, M, adapters, R, U, GROUPS, CORE, TRANSPOSED, STORE_S, WIDTH, PERIOD,
            CORE_PRECISION,
        )  # fmt: skip


def plan_thin(x: Tensor | Sequence[Tensor], down: Tensor, core: Core, tile: Thin, precision: str, want_s: bool) -> Plan:
    """What computes (z, s) for operands like these: a function of (x, down, core, want_z); down and core can stay.

    x [M, K] and down [r, K] in any strides; z [M, r] fp32, and s for `gemm`, or None in the place of what is not
    wanted. x may come as up to three tensors side by side, whose columns lie equally far apart. Like these are operands
    of the same shapes, strides, dtypes and device; down, and x alone, may then come transposed, since nothing but their
    addresses is taken.
    """
    blocks = ColumnBlocks.of(x)
    # Masked loops one after the other spill registers.
    joined = len(blocks.tensors) > 1 and not blocks.divided_by(tile.k)
    if joined:
        blocks = ColumnBlocks.of(blocks.tensors[0].new_empty(blocks.shape))  # what they will look like
    M, K = blocks.shape
    r = down.shape[0]
    first = blocks.tensors[0]
    row_blocks = -(-M // tile.m)
    split = tile.split > 1 and M > 0
    planned = Launch(
        thin_kernel,
        (row_blocks, tile.split if split else 1),
        (M, core.adapters, K, *blocks.ends, *blocks.row_strides, first.stride(1), *down.stride()),
        {
            "BLOCKS": len(blocks.tensors),
            "R": r,
            "U": core.u,
            "GROUPS": core.groups,
            "CORE": core.kind,
            "TRANSPOSED": core.transposed,
            "STORE_S": want_s,
            "WIDTH": tile.width,
            "PERIOD": period(first.dtype, r),
            "EVEN_K": blocks.divided_by(tile.k),
            "PRECISION": precision,
            "CORE_PRECISION": core_precision(first.dtype, precision),
            "SPLIT_K": split,
            "PDL": tile.pdl,
            "BLOCK_M": tile.m,
            "BLOCK_K": tile.k,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
        },
    )
    device, dtype, sizes = first.device, first.dtype, (tile.split * M * r,) if split else ()

    def run(x, down, core, want_z=True):
        if isinstance(x, Tensor):
            three = x, None, None
        else:
            three = (torch.cat(tuple(x), 1), None, None) if joined else ColumnBlocks.of(x).three()
        if want_z:
            z = torch.empty((M, r), dtype=torch.float32, device=device)
            planes = workspace(device, sizes, row_blocks) if split else (z, z)
        else:
            z, *planes = workspace(device, (M * r, *sizes), row_blocks if split else 0)
        s = torch.empty((M, tile.width), dtype=dtype, device=device) if want_s else None
        planned(*three, down, *core.pointers(z), z, z if s is None else s, *(planes or (z, z)))
        return z if want_z else None, s

    def bind(down, core):
        """A function of (x, x1, x2), addresses, and want_z that gives (z, s), or None."""
        unused = torch.empty(4, dtype=torch.float32, device=device)
        if joined or not want_s or not all(t is None or t.is_contiguous() for t in core[:3]):
            return None
        operands = None, None, None, down, *core.pointers(unused), *[None] * 4
        launch, places = planned.bound(operands, (0, 1, 2, 7, 8, 9, 10)), Places()
        if launch is None:
            return None

        def bound(x: int, x1: int, x2: int, want_z: bool, _unused=unused):
            z = None
            if want_z:
                z = torch.empty((M, r), dtype=torch.float32, device=device)
                at = z.data_ptr()
                planes = places.of(workspace(device, sizes, row_blocks)) if split else (at, at)
            else:
                at, *planes = places.of(workspace(device, (M * r, *sizes), row_blocks if split else 0))
                planes = planes or (at, at)
            s = torch.empty((M, tile.width), dtype=dtype, device=device)
            return (z, s) if launch(x, x1, x2, at, s.data_ptr(), *planes) else None

        return bound

    return Plan(run, bind)


def thin(
    x: Tensor | Sequence[Tensor], down: Tensor, core: Core, tile: Thin, precision: str, want_s: bool
) -> tuple[Tensor, Tensor | None]:
    """(z, s) by a plan that is used once."""
    return plan_thin(x, down, core, tile, precision, want_s).run(x, down, core)
