"""The decode kernel: for few rows, one launch streams W once and does everything else on the way.

    Y = X Wᵀ + ((X Dᵀ) Cᵀ) Uᵀ + b, M <= 128

A slice of K is a term of both sums: X Wᵀ = Σ_j X_j W_jᵀ, and ((X Dᵀ) Cᵀ) Uᵀ = Σ_j ((X_j D_jᵀ) Cᵀ) Uᵀ. So every
program applies the core and U to its own slice's z, and no program waits for another's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .blocks import apply_core, dot_wide, last_to_arrive, load_s, load_up, sum_planes
from .core import Core, core_precision
from .launch import Launch, Places, Plan
from .scratch import workspace
from .tiles import Decode, period


@triton.jit(do_not_specialize=["M", "adapters"])
def decode_kernel(
    x,
    w,
    down,
    core,
    basis,
    ids,
    up,
    bias,
    s,
    y,
    z,
    planes,
    z_planes,
    arrived,
    M,
    adapters,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    R: tl.constexpr,
    U: tl.constexpr,
    GROUPS: tl.constexpr,
    CORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INLINE: tl.constexpr,
    WANT_Z: tl.constexpr,
    WIDTH: tl.constexpr,
    PERIOD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Y [M, N], rounded once; program (i, j) sums column block i over slice j of K, in fp32.

    The accumulator is Yᵀ's, [BLOCK_N, BLOCK_M]: W is the side that fills a tensor core's rows, and few rows of
    X are not padded to 64. INLINE: z comes from X and D on the way, and with WANT_Z program (0, j) stores it; otherwise
    s [M, WIDTH] comes from `thin`, and slice 0 alone adds it.
    SPLIT_K: the partial sums meet in planes [slices, M, N] and z_planes [slices, M, R]; the last program of a
    column block adds them from first to last.
    PDL: the launch before may still run. INLINE, nothing is read or written until it ends; otherwise it is the thin
    pass, which started when all but s was there: its end is waited for before s is read or anything written, by every
    slice, as its planes and counters are this launch's as well. The one after is never asked to come before
    this one's programs are gone: its own would take their places as they fall free, many on one multiprocessor and
    none on the next, and stay there (a chain of different layers takes 6 % longer).
    """
    if PDL and INLINE:
        gdc_wait()
    tile_n = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, WIDTH)
    rows = m[:, None] < M
    slices = tl.num_programs(1)
    k_slice = tl.cdiv(tl.cdiv(K, BLOCK_K), slices) * BLOCK_K
    k_first = tl.program_id(1) * k_slice
    k = (k_first + tl.arange(0, BLOCK_K)).to(tl.int64)
    x_at = x + m.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    # Columns beyond N wrap around: what they give is never stored.
    w_at = w + (n % N).to(tl.int64)[:, None] * stride_wn + k[None, :] * stride_wk
    d_at = down + ranks.to(tl.int64)[None, :] * stride_dr + k[:, None] * stride_dk
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    z_tile = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for k_next in range(k_first, min(k_first + k_slice, K), BLOCK_K):
        inside = tl.arange(0, BLOCK_K) < K - k_next
        if EVEN_K:
            a = tl.load(w_at, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
            b = tl.load(x_at, mask=rows, other=0.0)  # [BLOCK_M, BLOCK_K]
        else:
            a = tl.load(w_at, mask=inside[None, :], other=0.0, eviction_policy="evict_first")  # [BLOCK_N, BLOCK_K]
            b = tl.load(x_at, mask=rows & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if INLINE:
            d = tl.load(d_at, mask=(ranks[None, :] < R) & inside[:, None], other=0.0)  # [BLOCK_K, WIDTH]
            z_tile = dot_wide(b, d, z_tile, PRECISION)
            d_at += BLOCK_K * stride_dk
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
    if PDL and not INLINE:
        gdc_wait()
    z_mask = rows & (ranks[None, :] < R)
    z_at = m[:, None] * R + ranks[None, :]
    if INLINE:
        s_tile = apply_core(
            z_tile, core, basis, ids, m, M, adapters, CORE, TRANSPOSED, R, U, GROUPS, WIDTH, CORE_PRECISION
        )  # [BLOCK_M, WIDTH]
        u_tile = load_up(up, n, 0, N, stride_un, stride_ur, R, WIDTH, WIDTH, x.dtype.element_ty)  # [BLOCK_N, WIDTH]
        acc = dot_wide(u_tile, s_tile.T, acc, PRECISION)
        if WANT_Z and tile_n == 0:
            if SPLIT_K:
                tl.store(z_planes + tl.program_id(1) * M * R + z_at, z_tile, mask=z_mask)
            else:
                tl.store(z + z_at, z_tile, mask=z_mask)
    elif tl.program_id(1) == 0:
        for rank in range(0, WIDTH, BLOCK_R):
            s_tile = load_s(s, m, rank, M, WIDTH, BLOCK_R)  # [BLOCK_M, BLOCK_R]
            u_tile = load_up(up, n, rank, N, stride_un, stride_ur, R, PERIOD, BLOCK_R, s.dtype.element_ty)
            acc = tl.dot(u_tile, s_tile.T, acc, input_precision=PRECISION)  # u_tile: [BLOCK_N, BLOCK_R]
    at = m.to(tl.int64)[None, :] * N + n[:, None]  # Y and the planes are contiguous
    inside = (m[None, :] < M) & (n[:, None] < N)
    if SPLIT_K:
        plane = tl.cast(M, tl.int64) * N
        tl.store(planes + tl.program_id(1) * plane + at, acc, mask=inside)
        if last_to_arrive(arrived + tile_n, slices):
            acc = sum_planes(planes, plane, at, inside, slices)
            if HAS_BIAS:
                acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]  # [BLOCK_N, 1]
            tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)
            if WANT_Z and tile_n == 0:
                z_tile = sum_planes(z_planes, M * R, z_at, z_mask, slices)
                tl.store(z + z_at, z_tile, mask=z_mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]  # [BLOCK_N, 1]
        tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


def plan_decode(
    x: Tensor,
    w: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None,
    width: int | None,
    tile: Decode,
    precision: str,
) -> Plan:
    """What writes Y for operands like these: a function of (x, w, down, core, up, bias, y, z, s); w to bias can stay.

    x [M, K], w [N, K], down [r, K], up [N, r] in any strides; Y goes into y [M, N] and z into z [M, r] fp32, both
    contiguous, or z is None and nobody wants it. width: that of s from `thin`, with which z is left alone, or None.
    Like these are operands of the same shapes, strides, dtypes and device; the function may get them transposed, since
    it takes nothing but their addresses.
    """
    M, K = x.shape
    N = w.shape[0]
    r = down.shape[0]
    inline = width is None
    blocks = -(-N // tile.n)
    split = tile.split > 1
    width = width or 16
    constants = {
        "R": r,
        "U": core.u,
        "GROUPS": core.groups,
        "CORE": core.kind,
        "TRANSPOSED": core.transposed,
        "INLINE": inline,
        "WIDTH": width,
        "PERIOD": width if inline else period(x.dtype, r),
        "BLOCK_R": min(width, 16 if x.dtype == torch.float32 else 64),
        "HAS_BIAS": bias is not None,
        "EVEN_K": K % tile.k == 0,
        "PRECISION": precision,
        "CORE_PRECISION": core_precision(x.dtype, precision),
        "SPLIT_K": split,
        "PDL": tile.pdl,
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "launch_pdl": tile.pdl,
    }
    numbers = M, core.adapters, N, K, *x.stride(), *w.stride(), *down.stride(), *up.stride()
    quiet, storing = (
        Launch(decode_kernel, (blocks, tile.split), numbers, constants | {"WANT_Z": want_z})
        for want_z in (False, inline)
    )
    device, sizes = x.device, (tile.split * M * N, tile.split * M * r) if split else ()

    def run(x, w, down, core, up, bias, y, z, s=None):
        launch = quiet if z is None else storing
        if z is None:
            z, *planes = workspace(device, (M * r, *sizes), blocks if split else 0)
        elif split:
            planes = workspace(device, sizes, blocks)
        if not split:
            planes = z, z, z
        launch(
            x,
            w,
            down,
            *core.pointers(z),
            up,
            z if bias is None else bias.contiguous(),
            z if s is None else s,
            y,
            z,
            *planes,
        )

    def bind(w, down, core, up, bias):
        """A function of (x, y, z, s): addresses, and 0 for a z that nobody wants, or for no s."""
        unused = torch.empty(4, dtype=torch.float32, device=device)
        given = core.values, core.basis, core.ids, bias
        if not all(t is None or t.is_contiguous() for t in given):
            return None
        operands = None, w, down, *core.pointers(unused), up, unused if bias is None else bias, unused, *[None] * 5
        free, places = (0, 8, 9, 10, 11, 12, 13), Places()
        launches = [launch.bound(operands, free) for launch in (quiet, storing)]
        nothing = unused.data_ptr()

        def bound(x: int, y: int, z: int, s: int, _unused=unused) -> bool:
            launch = launches[z != 0]
            if launch is None:  # this one has not been compiled yet
                return False
            if not z:
                z, *planes = places.of(workspace(device, (M * r, *sizes), blocks if split else 0))
            elif split:
                planes = places.of(workspace(device, sizes, blocks))
            return launch(x, s or nothing, y, z, *(planes if split else (z, z, z)))

        return bound if any(launches) else None

    return Plan(run, bind)
