"""What the kernels share: tile order, wide dots, the core at rank r, the last program to arrive, and
the sum of partial results."""

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
def dot_wide(a, b, acc, PRECISION: tl.constexpr, IN_PARTS: tl.constexpr = True):
    """acc + a b in fp32, where b may be wider than a: [m, k] x [k, n].

    A 16-bit a meets b as hi + lo, two 16-bit numbers that hold 16 bits of it or more: the tensor cores' price
    of a factor that is kept in fp32. IN_PARTS: an fp32 dot, which adds up k numbers one after another, starts from zero
    and is added as a whole; over a long K that halves the error and more, for the registers of a second sum.
    """
    if a.dtype == tl.float32 and not IN_PARTS:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    elif a.dtype == tl.float32:
        # A limit on imprecise sums, which only fp8 knows, keeps Triton from making it one long sum again.
        zero = tl.zeros_like(acc)
        acc += tl.dot(a, b.to(tl.float32), zero, input_precision=PRECISION, max_num_imprecise_acc=16)
    elif b.dtype == a.dtype:
        acc = tl.dot(a, b, acc)
    else:
        b = b.to(tl.float32)
        high = b.to(a.dtype)
        acc = tl.dot(a, high, acc)
        acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc)
    return acc


@triton.jit
def fold(t, P: tl.constexpr):
    """The first P columns of t [m, n], the others being zero: [m, P]."""
    return tl.sum(tl.reshape(t, (t.shape[0], t.shape[1] // P, P)), axis=1) if t.shape[1] > P else t


@triton.jit
def unfold(t, WIDTH: tl.constexpr):
    """t [m, P] with columns of zeros up to WIDTH."""
    if t.shape[1] < WIDTH:
        block = tl.arange(0, WIDTH // t.shape[1])[None, :, None]
        t = tl.reshape(tl.where(block == 0, t[:, None, :], 0.0), (t.shape[0], WIDTH))
    return t


@triton.jit
def load_basis(basis, a, j, i, R: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr):
    """P_a[j, i], zero beyond U and R, in the dtype of P, for a, j and i that broadcast.

    Where C has GROUPS blocks on its diagonal, P [GROUPS, U / GROUPS, R / GROUPS, R / GROUPS] is these alone: P_a is
    zero outside of block a // (U / GROUPS).
    """
    some = (a < U) & (j < R) & (i < R)
    BLOCK: tl.constexpr = R // GROUPS
    if GROUPS > 1:
        some &= (a // (U // GROUPS) == j // BLOCK) & (j // BLOCK == i // BLOCK)
        j = j % BLOCK
        i = i % BLOCK
    return tl.load(basis + a * (BLOCK * BLOCK) + j * BLOCK + i, mask=some, other=0.0)


@triton.jit
def mix_core(
    core, basis, TRANSPOSED: tl.constexpr, R: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """C of all rows, Cᵀ if TRANSPOSED: [P, P] fp32, zero beyond R.

    With U > 0 core is v, and C = Σ_a v_a P_a is summed many P at a time: one by one each would wait for memory. Of
    GROUPS blocks each has its own: row j of C reads those of its block alone.
    """
    j = tl.arange(0, P)[:, None]
    i = tl.arange(0, P)[None, :]
    if U == 0:
        at = i * R + j if TRANSPOSED else j * R + i
        mixed = tl.load(core + at, mask=(i < R) & (j < R), other=0.0).to(tl.float32)  # [P, P]
    else:
        OWN: tl.constexpr = U // GROUPS
        MOST: tl.constexpr = 4096 // (P * P)
        AT_ONCE: tl.constexpr = MOST if MOST < OWN else triton.next_power_of_2(OWN)
        mixed = tl.zeros((P, P), tl.float32)
        for first in range(0, OWN, AT_ONCE):
            a = first + tl.arange(0, AT_ONCE)[:, None, None]
            inside = a < OWN
            if GROUPS > 1:
                a += (j // (R // GROUPS) * OWN)[None, :, :]
                inside = inside & (j < R)[None, :, :]
            v = tl.load(core + a, mask=inside, other=0.0).to(tl.float32)  # [AT_ONCE, P or 1, 1]
            if TRANSPOSED:
                p = load_basis(basis, a, i[None, :, :], j[None, :, :], R, U, GROUPS)  # [AT_ONCE, P, P]
            else:
                p = load_basis(basis, a, j[None, :, :], i[None, :, :], R, U, GROUPS)
            mixed += tl.sum(v * p.to(tl.float32), axis=0)
    return mixed


@triton.jit
def mix_rows(
    z, core, basis, own, adapted,
    TRANSPOSED: tl.constexpr, R: tl.constexpr, U: tl.constexpr, GROUPS: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_M, P] of z [BLOCK_M, P] where row m's C is Σ_a v[own[m], a] P_a, or nothing unless adapted[m].

    All rows' C at once are a product of their v with the P, one row of which is a P_a: small ranks alone have the room.
    """
    AT_ONCE: tl.constexpr = 16 if U <= 16 else 32
    COLUMNS: tl.constexpr = P * P if P > 4 else 16
    f = tl.arange(0, COLUMNS)[None, :]
    j = f % P if TRANSPOSED else f // P
    i = f // P if TRANSPOSED else f % P
    mixed = tl.zeros((z.shape[0], COLUMNS), tl.float32)
    for first in range(0, U, AT_ONCE):
        a = first + tl.arange(0, AT_ONCE)
        some = adapted[:, None] & (a < U)[None, :]
        v = tl.load(core + own[:, None] * U + a[None, :], mask=some, other=0.0)  # [BLOCK_M, AT_ONCE]
        p = load_basis(basis, a[:, None], j, i, R, U, GROUPS)  # [AT_ONCE, COLUMNS]
        mixed += tl.dot(v.to(tl.float32), p.to(tl.float32), input_precision=PRECISION)
    c = tl.reshape(fold(mixed, P * P), (z.shape[0], P, P))
    return tl.sum(z[:, None, :] * c, axis=2)


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
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """s = z Cᵀ, or z C if TRANSPOSED, in fp32: [BLOCK_M, BLOCK_R], zero beyond R as z is.

    CORE "none":  s = z
    CORE "diagonal": core is C's diagonal [R]
    CORE "dense": core is C [R, R]; with U > 0 it is v [U], and C = Σ_a v_a P_a with basis P [U, R, R]; or C has
                  GROUPS blocks on its diagonal, and P is these alone
    CORE "rows":  the same with a first dimension of `adapters`: row m uses core[ids[m]], -1 gives s = 0, and an id that
                  is neither -1 nor below `adapters` reads nothing and gives NaN

    PRECISION: how rows' C are summed from their v, "ieee" or "tf32x3"; all else is multiplied in fp32.
    """
    P: tl.constexpr = BLOCK_R if R > 8 else 2 if R <= 2 else triton.next_power_of_2(R)
    ranks = tl.arange(0, BLOCK_R)
    real = ranks < R
    if CORE == "none":
        s = z
    elif CORE == "diagonal":
        s = z * tl.load(core + ranks, mask=real, other=0.0).to(tl.float32)[None, :]
    elif CORE == "dense" and P <= 8:
        c = mix_core(core, basis, TRANSPOSED, R, U, GROUPS, P)
        s = unfold(tl.sum(fold(z, P)[:, None, :] * c[None, :, :], axis=2), BLOCK_R)
    elif CORE == "dense" and P <= 32:
        s = tl.dot(z, mix_core(core, basis, TRANSPOSED, R, U, GROUPS, P).T, input_precision="ieee")
    elif CORE == "dense":  # [P, P] would not fit the registers: one rank at a time
        s = tl.zeros_like(z)
        for i in range(R):
            z_i = tl.sum(tl.where(ranks[None, :] == i, z, 0.0), axis=1)  # [BLOCK_M]
            at = i * R + ranks if TRANSPOSED else ranks * R + i  # C[i, :] or C[:, i]
            c = tl.load(core + at, mask=real, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_R]
            s += z_i[:, None] * c
    else:
        own = tl.load(ids + rows, mask=rows < M, other=-1).to(tl.int64)  # [BLOCK_M]
        adapted = (own >= 0) & (own < adapters)
        if U > 0 and P <= 8:
            folded = fold(z, P)
            s = mix_rows(folded, core, basis, own, adapted, TRANSPOSED, R, U, GROUPS, P, PRECISION)
            s = unfold(s, BLOCK_R)
        else:
            s = tl.zeros_like(z)
            for i in range(R):
                z_i = tl.sum(tl.where(ranks[None, :] == i, z, 0.0), axis=1)  # [BLOCK_M]
                if U == 0:
                    at = i * R + ranks if TRANSPOSED else ranks * R + i
                    one = adapted[:, None] & real[None, :]
                    c = tl.load(core + own[:, None] * (R * R) + at[None, :], mask=one, other=0.0)  # [BLOCK_M, BLOCK_R]
                    c = c.to(tl.float32)
                else:
                    c = tl.zeros_like(z)
                    for first in range(0, U, 16):
                        a = first + tl.arange(0, 16)
                        some = adapted[:, None] & (a < U)[None, :]
                        v = tl.load(core + own[:, None] * U + a[None, :], mask=some, other=0.0)  # [BLOCK_M, 16]
                        if TRANSPOSED:
                            p = load_basis(basis, a[:, None], i, ranks[None, :], R, U, GROUPS)  # [16, BLOCK_R]
                        else:
                            p = load_basis(basis, a[:, None], ranks[None, :], i, R, U, GROUPS)
                        c += tl.dot(v.to(tl.float32), p.to(tl.float32), input_precision=PRECISION)
                s += z_i[:, None] * c
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


@triton.jit
def sum_planes(planes, plane, at, mask, count):
    """Σ_j planes[j * plane + at] in fp32, from j = 0 to count - 1 in that order; zero where the mask is False.

    Several loads are under way together, as many as registers hold: one after another, each would wait most of a
    microsecond for L2.
    """
    numbers: tl.constexpr = at.shape[0] * at.shape[1]
    TOGETHER: tl.constexpr = 8 if numbers <= 2048 else 4 if numbers <= 4096 else 2 if numbers <= 8192 else 1
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, count, TOGETHER):
        for j in tl.static_range(TOGETHER):
            some = mask & (tl.full(at.shape, first + j, tl.int32) < count)
            total += tl.load(planes + (first + j) * plane + at, mask=some, other=0.0, cache_modifier=".cg")
    return total
