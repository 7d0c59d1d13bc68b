"""The long kernel: a frozen matmul that ends with the low-rank dot and the bias.

    Y = X Wᵀ + S Uᵀ + b          X [M, K], W [N, K], S [M, r], U [N, r], b [N]

The same kernel computes dX = dY W + Q D: W is then seen through its transpose, and D takes U's place.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .blocks import load_s, load_up, tile_order
from .columns import ColumnBlocks
from .launch import Launch, Plan
from .tiles import Gemm, period

# Triton 3.9 lets no MMA of a flat loop be under way while the next one starts; 3.6 to 3.8 do.
FLAT_LOOPS = not triton.__version__.startswith("3.9")


@triton.jit
def product(
    acc,
    x,
    w,
    row,
    column,
    begin,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_MAJOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + one tile of X W[:, begin : begin + K]ᵀ in fp32: [BLOCK_M, BLOCK_N], beyond M and N undefined."""
    if DESCRIPTORS:
        for k in range(tl.cdiv(K, BLOCK_K)):
            a = x.load([row, k * BLOCK_K])  # [BLOCK_M, BLOCK_K], zero beyond M and K
            at = begin + k * BLOCK_K
            b = w.load([column, at]).T if K_MAJOR else w.load([at, column])  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a, b, acc)
    else:
        # Rows beyond M wrap around: what they give is never stored, and the loop needs no mask for them.
        m = ((row + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
        n = ((column + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        x_at = x + m[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
        w_at = w + n[None, :] * stride_wn + (begin + k).to(tl.int64)[:, None] * stride_wk
        for k_first in range(0, K, BLOCK_K):
            if EVEN_K:
                a = tl.load(x_at)  # [BLOCK_M, BLOCK_K]
                b = tl.load(w_at)  # [BLOCK_K, BLOCK_N]
            else:
                a = tl.load(x_at, mask=k[None, :] < K - k_first, other=0.0)  # [BLOCK_M, BLOCK_K]
                b = tl.load(w_at, mask=k[:, None] < K - k_first, other=0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            x_at += BLOCK_K * stride_xk
            w_at += BLOCK_K * stride_wk
    return acc


@triton.jit
def products(
    x, x1, x2, w, row, column, M, N, K, end, end1,
    stride_xm, stride_x1m, stride_x2m, stride_xk, stride_wn, stride_wk,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, K_MAJOR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of [X | X1 | X2] Wᵀ: a loop for each block of columns, one after the other into one accumulator."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = product(
        acc, x, w, row, column, 0, M, N, end, stride_xm, stride_xk, stride_wn, stride_wk,
        BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, K_MAJOR, EVEN_K, PRECISION,
    )  # fmt: skip
    if BLOCKS > 1:
        acc = product(
            acc, x1, w, row, column, end, M, N, end1 - end, stride_x1m, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, K_MAJOR, EVEN_K, PRECISION,
        )  # fmt: skip
    if BLOCKS > 2:
        acc = product(
            acc, x2, w, row, column, end1, M, N, K - end1, stride_x2m, stride_xk, stride_wn, stride_wk,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, K_MAJOR, EVEN_K, PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def store_columns(y, acc, row, column, SUBTILES: tl.constexpr):
    """Store acc through descriptor y in SUBTILES column blocks: each needs that much less shared memory."""
    if SUBTILES == 1:
        y.store([row, column], acc.to(y.dtype))
    else:
        half: tl.constexpr = acc.shape[1] // 2
        left, right = acc.reshape(acc.shape[0], 2, half).permute(0, 2, 1).split()
        store_columns(y, left, row, column, SUBTILES // 2)
        store_columns(y, right, row, column + half, SUBTILES // 2)


@triton.jit
def finish(
    y,
    acc,
    bias,
    row,
    column,
    M,
    N,
    stride_ym,
    HAS_BIAS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SUBTILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the bias to acc [BLOCK_M, BLOCK_N] and store it: Y is rounded here and nowhere else."""
    n = column + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_N]
    if DESCRIPTORS:
        store_columns(y, acc, row, column, SUBTILES)
    else:
        m = row + tl.arange(0, BLOCK_M)
        at = m.to(tl.int64)[:, None] * stride_ym + n.to(tl.int64)[None, :]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x,
    x1,
    x2,
    w,
    y,
    s,
    up,
    bias,
    M,
    N,
    K,
    end,
    end1,
    stride_xm,
    stride_x1m,
    stride_x2m,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ym,
    stride_un,
    stride_ur,
    BLOCKS: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXPAND: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_MAJOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    PDL: tl.constexpr,
    FLAT: tl.constexpr,
    SUBTILES: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Y = X Wᵀ + S Uᵀ + b, tiles of [BLOCK_M, BLOCK_N]; S [M, WIDTH] is in X's dtype, accumulation in fp32.

    DESCRIPTORS: x, w, y are tensor descriptors, and PROGRAMS programs walk over all tiles. The low-rank dot comes
    last: the main loop is the bare matmul's. FLAT: the next tile's first steps are under way while this one is stored.
    PDL: the thin pass that writes S may still run. Before it is waited for, X and W are read for the first tile's main
    loop, or Y: such a launch must follow that pass, which started when these were there. A matmul without descriptors
    waits at once.
    Otherwise x, w, y are pointers and every program owns one tile.
    X lies in BLOCKS tensors side by side: x up to column `end`, x1 up to `end1`, x2 up to K.
    EXPAND: no product of its own, Y += S Uᵀ in place: the second half of "library matmul, then one pass".
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0)
    if DESCRIPTORS:
        for tile in tl.range(first, tiles_m * tiles_n, PROGRAMS, flatten=FLAT):
            tile_m, tile_n = tile_order(tile, tiles_m, tiles_n, GROUP_M)
            row = tile_m * BLOCK_M
            column = tile_n * BLOCK_N
            acc = products(
                x, x1, x2, w, row, column, M, N, K, end, end1, 0, 0, 0, 0, 0, 0,
                BLOCKS, BLOCK_M, BLOCK_N, BLOCK_K, True, K_MAJOR, True, PRECISION,
            )  # fmt: skip
            if PDL and tile == first:
                gdc_wait()
            m = row + tl.arange(0, BLOCK_M)
            n = column + tl.arange(0, BLOCK_N)
            for rank in range(0, WIDTH, BLOCK_R):
                a = load_s(s, m, rank, M, WIDTH, BLOCK_R)  # [BLOCK_M, BLOCK_R]
                b = load_up(up, n, rank, N, stride_un, stride_ur, R, PERIOD, BLOCK_R, x.dtype)
                acc = tl.dot(a, b.T, acc)  # b: [BLOCK_N, BLOCK_R]
            finish(y, acc, bias, row, column, M, N, 0, HAS_BIAS, True, SUBTILES, BLOCK_M, BLOCK_N)
    else:
        tile_m, tile_n = tile_order(first, tiles_m, tiles_n, GROUP_M)
        row = tile_m * BLOCK_M
        column = tile_n * BLOCK_N
        m = row + tl.arange(0, BLOCK_M)
        n = column + tl.arange(0, BLOCK_N)
        if EXPAND:
            at = m.to(tl.int64)[:, None] * stride_ym + n.to(tl.int64)[None, :]
            acc = tl.load(y + at, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)  # [BLOCK_M, BLOCK_N]
            acc = acc.to(tl.float32)
            if PDL:
                gdc_wait()
        else:
            if PDL:
                gdc_wait()
            acc = products(
                x, x1, x2, w, row, column, M, N, K, end, end1,
                stride_xm, stride_x1m, stride_x2m, stride_xk, stride_wn, stride_wk,
                BLOCKS, BLOCK_M, BLOCK_N, BLOCK_K, False, K_MAJOR, EVEN_K, PRECISION,
            )  # fmt: skip
        for rank in range(0, WIDTH, BLOCK_R):
            a = load_s(s, m, rank, M, WIDTH, BLOCK_R)  # [BLOCK_M, BLOCK_R]
            b = load_up(up, n, rank, N, stride_un, stride_ur, R, PERIOD, BLOCK_R, s.dtype.element_ty)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)  # b: [BLOCK_N, BLOCK_R]
        finish(y, acc, bias, row, column, M, N, stride_ym, HAS_BIAS, False, 1, BLOCK_M, BLOCK_N)


def fits_descriptors(x: Tensor | Sequence[Tensor], w: Tensor) -> bool:
    """Whether x [M, K], w [N, K] (or a transposed view) and a contiguous Y [M, N] meet the rules of bulk copies:
    a contiguous last dimension, and a base and a row stride in whole 16 bytes. x may lie in column blocks."""

    def aligned(t: Tensor) -> bool:
        step = t.stride(0) * t.element_size()
        return t.stride(1) == 1 and step > 0 and step % 16 == 0 and t.data_ptr() % 16 == 0

    N = w.shape[0]
    xs = ColumnBlocks.of(x).tensors
    if not all(map(aligned, xs)):
        return False
    return (aligned(w) or aligned(w.T)) and N * w.element_size() % 16 == 0


def plan_gemm(
    x: Tensor | Sequence[Tensor] | None,
    w: Tensor | None,
    y: Tensor,
    width: int,
    up: Tensor,
    bias: Tensor | None,
    tile: Gemm,
    precision: str,
) -> Plan:
    """What writes Y = X Wᵀ + S Uᵀ + b into y for operands like these; without x and w, Y += S Uᵀ.

    A function of (x, w, y, s, up, bias), of which w, up and bias can stay: x [M, K], w [N, K], up [N, r] in any
    strides, y [M, N] with a contiguous last dimension; s [M, width] as `thin` writes it: width >= r, and [high | low]
    halves where width is 16 and r at most 8. x may come as up to three tensors side by side. Like these are operands
    of the same shapes, strides, dtypes and device; w, up, and x alone, may then come transposed, since nothing but
    their addresses is taken.
    """
    M, N = y.shape
    expand = x is None
    blocks = ColumnBlocks.of(y if expand else x)
    K = 0 if expand else blocks.shape[1]
    r = up.shape[1]
    tiles = -(-M // tile.m) * -(-N // tile.n)
    programs = min(tiles, tile.programs) if tile.descriptors else tiles
    k_major = expand or w.stride(1) == 1
    boxes: tuple[tuple, ...] = ()
    strides: tuple[int, ...] = (0,) * 6
    few = min(tile.rank, 32)
    if tile.descriptors:
        rows = w if k_major else w.T
        boxes = (
            *((place, t.shape, t.stride(), [tile.m, tile.k]) for place, t in enumerate(blocks.tensors)),
            (3, rows.shape, rows.stride(), [tile.n, tile.k] if k_major else [tile.k, tile.n]),
            (4, y.shape, y.stride(), [tile.m, tile.n // tile.subtiles]),
        )
    elif not expand:
        strides = (*blocks.row_strides, blocks.tensors[0].stride(1), *w.stride())
    dtype, device = y.dtype, y.device
    planned = Launch(
        gemm_kernel,
        (programs,),
        (
            M,
            N,
            K,
            *((0, 0) if expand else blocks.ends),
            *strides,
            0 if tile.descriptors else y.stride(0),
            *up.stride(),
        ),
        {
            "BLOCKS": len(blocks.tensors),
            "R": r,
            "WIDTH": width,
            "PERIOD": period(y.dtype, r),
            # 64 ranks of an fp32 U at once take more shared memory than 9.0 has left (Triton 3.6).
            "BLOCK_R": width if width <= (tile.rank if up.element_size() == 2 else few) else few,
            "HAS_BIAS": bias is not None,
            "EXPAND": expand,
            "DESCRIPTORS": tile.descriptors,
            "K_MAJOR": k_major,
            "EVEN_K": expand or blocks.divided_by(tile.k),
            "PRECISION": precision,
            "PROGRAMS": tile.programs if tile.descriptors else 0,
            "PDL": tile.pdl,
            "FLAT": tile.flat and FLAT_LOOPS,
            "SUBTILES": tile.subtiles,
            "GROUP_M": tile.group,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "maxnreg": tile.registers,
            "launch_pdl": tile.pdl,
        },
        boxes,
    )

    def run(x, w, y, s, up, bias):
        if expand:
            three, w = (y, None, None), y
        else:
            three = (x, None, None) if isinstance(x, Tensor) else ColumnBlocks.of(x).three()
        planned(*three, w, y, s, up, s if bias is None else bias.contiguous())

    def bind(w, up, bias):
        """A function of (x, x1, x2, y, s): tensors where the tile takes descriptors, else addresses, but s is one."""
        unused = torch.empty(4, dtype=dtype, device=device)
        if not (bias is None or bias.is_contiguous()):
            return None
        operands = None, None, None, w, None, None, up, unused if bias is None else bias
        launch = planned.bound(operands, (0, 3, 4, 5) if expand else (0, 1, 2, 4, 5))
        if launch is None:
            return None

        def bound(x, x1, x2, y, s: int, _unused=unused) -> bool:
            return launch(y, y, y, s) if expand else launch(x, x1, x2, y, s)

        return bound

    return Plan(run, bind)


def gemm(
    x: Tensor | Sequence[Tensor] | None,
    w: Tensor | None,
    y: Tensor,
    s: Tensor,
    up: Tensor,
    bias: Tensor | None,
    tile: Gemm,
    precision: str,
) -> None:
    """Write Y, or add to it, by a plan that is used once."""
    plan_gemm(x, w, y, s.shape[1], up, bias, tile, precision).run(x, w, y, s, up, bias)
