"""What the kernels share: tile order, wide dots, the core at rank r, and the last program to arrive."""

import triton
import triton.language as tl


@triton.jit
def tile_order(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of a tile, column by column within groups of GROUP_M rows: neighbours share operands in L2."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + tile % height, tile % per_group // height


@triton.jit
def dot_wide(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in fp32, where b may be wider than a: [m, k] x [k, n].

    A 16-bit a meets b as hi + lo, two 16-bit numbers that hold 16 bits of it or more: the tensor cores' price
    of a factor that is kept in fp32.
    """
    if a.dtype == tl.float32:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    elif b.dtype == a.dtype:
        acc = tl.dot(a, b, acc)
    else:
        b = b.to(tl.float32)
        high = b.to(a.dtype)
        acc = tl.dot(a, high, acc)
        acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc)
    return acc


@triton.jit
def apply_core(
    z,
    core,
    basis,
    ids,
    rows,
    M,
    adapters,
    CORE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    R: tl.constexpr,
    U: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """s = z Cᵀ, or z C if TRANSPOSED, in fp32: [BLOCK_M, BLOCK_R], zero beyond R as z is.

    CORE "none":  s = z
    CORE "dense": core is C [R, R]; with U > 0 it is v [U], and C = Σ_a v_a P_a with basis P [U, R, R]
    CORE "rows":  the same with a first dimension of `adapters`: row m uses core[ids[m]], -1 gives s = 0, and an id that
                  is neither -1 nor below `adapters` reads nothing and gives NaN

    One rank at a time, so that nothing larger than z lives in registers and no dot rounds.
    """
    if CORE == "none":
        s = z
    else:
        ranks = tl.arange(0, BLOCK_R)
        real = ranks < R
        if CORE == "rows":
            own = tl.load(ids + rows, mask=rows < M, other=-1).to(tl.int64)  # [BLOCK_M]
            adapted = (own >= 0) & (own < adapters)
        s = tl.zeros_like(z)
        for i in range(R):
            z_i = tl.sum(tl.where(ranks[None, :] == i, z, 0.0), axis=1)  # [BLOCK_M]
            at = i * R + ranks if TRANSPOSED else ranks * R + i  # C[i, :] or C[:, i]
            if U == 0:
                if CORE == "rows":
                    one = adapted[:, None] & real[None, :]
                    c = tl.load(core + own[:, None] * (R * R) + at[None, :], mask=one, other=0.0)  # [BLOCK_M, BLOCK_R]
                    c = c.to(tl.float32)
                else:
                    c = tl.load(core + at, mask=real, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_R]
                s += z_i[:, None] * c
            else:
                c = tl.zeros_like(z)
                for a in range(U):
                    p = tl.load(basis + a * (R * R) + at, mask=real, other=0.0).to(tl.float32)  # [BLOCK_R]
                    if CORE == "rows":
                        v = tl.load(core + own * U + a, mask=adapted, other=0.0).to(tl.float32)  # [BLOCK_M]
                        c += v[:, None] * p[None, :]
                    else:
                        c += tl.load(core + a).to(tl.float32) * p[None, :]
                s += z_i[:, None] * c
        if CORE == "rows":
            s = tl.where(((own < -1) | (own >= adapters))[:, None], float("nan"), s)
    return s


@triton.jit
def load_s(s, rows, first, M, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):
    """Columns first .. first + BLOCK_R of s [M, WIDTH], zero beyond M: [BLOCK_M, BLOCK_R]."""
    at = rows.to(tl.int64)[:, None] * WIDTH + first + tl.arange(0, BLOCK_R)[None, :]
    return tl.load(s + at, mask=rows[:, None] < M, other=0.0)


@triton.jit
def load_up(
    up, columns, first, N, stride_n, stride_r, R: tl.constexpr, PERIOD: tl.constexpr, BLOCK_R: tl.constexpr, dtype
):
    """What meets s: U[n, rank], zero beyond N and R: [BLOCK_N, BLOCK_R] in `dtype`.

    The rank repeats with PERIOD: where s holds [high | low] halves of fp32 numbers, U meets both.
    """
    ranks = (first + tl.arange(0, BLOCK_R)) % PERIOD
    at = columns.to(tl.int64)[:, None] * stride_n + ranks.to(tl.int64)[None, :] * stride_r
    return tl.load(up + at, mask=(columns[:, None] < N) & (ranks[None, :] < R), other=0.0).to(dtype)


@triton.jit
def last_to_arrive(counter, programs):
    """Whether this program is the last of `programs` to call; it then sees what all of them have stored.

    The counter is zero again afterwards, so no launch has to clear it and a CUDA graph may replay it.
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's atomic
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
