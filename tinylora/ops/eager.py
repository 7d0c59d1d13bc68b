"""The operator as torch calls: what runs on a CPU, and wherever no kernel covers the operands.

Four rules keep it fast and exact:
- Y is touched twice, by the frozen matmul and by one in-place addmm; no delta, no sum, no cast of Y exists.
- Everything at rank r (z, s, t, q: [M, r]) is fp32 even for bf16 operands. Torch has no bf16 x bf16 -> fp32
  matmul on CPUs, so `thin` upcasts a block of rows that stays in the L2 cache, never the whole of x. On a card it has
  one, and the other factor comes as two bf16 numbers: what fp32 has no tensor cores for.
- Up to rank 8 what is [M, r] lies in memory as its transpose, [r, M], which BLAS makes from x in 0.6 of the time (with
  AMX in a fourth at rank 2) and reads as fast, from FEW rows on: of 2 to 7 MKL reads it in up to ten times the time.
  Without AMX MKL has one thread for such a product, however many there are: each thread gets a panel of rows.
- s = 0 adds exact zeros: with a zero core the result is F.linear's, bit for bit.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many elements of a bf16 Y a product in fp32 takes half or less of the time of a bf16 matmul, whose
# preparation alone takes 15 to 25 microseconds; above it, it takes up to several times as long. How a row is rounded
# must not depend on how many rows there are, or rollouts would differ from training: `add_product` rounds s and Y where
# the bf16 matmul does, and gives its bits (in all but 15 to 60 of ten million). Up to TINY products torch has no
# such preparation to make.
SMALL, TINY = 1 << 15, 1 << 12

# Elements of one upcast block: 1 MiB in fp32, which fits the L2 cache of every server CPU of the last years.
BLOCK = 1 << 18

FEW = 8  # below so many rows what is [M, r] lies in rows

# Numbers in x from which on a panel for each thread is worth a batched product, whose preparation takes 5 microseconds.
PANELS = 1 << 17

# Whether this is an Intel processor of 2023 or later, where MKL is another one: a product costs a fraction of what it
# does elsewhere, beside Python's calls, and has all threads where it is thin. Sums over rows want panels of so many.
AMX = getattr(torch.cpu, "get_capabilities", dict)().get("amx_tile", False)
ROWS = 1024 if AMX else 32

ALIGNED = 64  # bytes; where torch's own tensors on a CPU start


def rank_dtype(*operands: Tensor | None) -> torch.dtype:
    """The dtype of everything at rank r: fp32, or fp64 as soon as one operand has it."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in operands) else torch.float32


def row_blocks(M: int, width: int, threads: int = 1) -> Iterator[slice]:
    """Slices of M rows, each of at most BLOCK elements a thread at `width` elements a row, and of at least one row."""
    rows = max(1, BLOCK * threads // max(1, width))
    for start in range(0, M, rows):
        yield slice(start, start + rows)


def at_once(x: Tensor) -> bool:
    """Whether all of x is upcast in one piece."""
    return x.numel() <= BLOCK * torch.get_num_threads()


def in_rows(x: Tensor) -> Tensor:
    """x as [M, K]."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """A new tensor y [M, N] in the dimensions of x [..., K]; no view, which nobody may change behind autograd."""
    return y if x.dim() == 2 else y.resize_(*x.shape[:-1], y.shape[1])


def panels(x: Tensor) -> int:
    """Into how many panels of as many rows x is cut: one a thread; one if x is small or does not come out even."""
    if x.numel() < PANELS or not x.is_cpu:
        return 1
    M, threads = x.shape[0], torch.get_num_threads()
    return threads if M % threads == 0 and threads * ROWS <= M else 1


def on_tensor_cores(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether bf16 numbers are multiplied, and fp32 ones wanted, where the library does that in one product."""
    return x.is_cuda and x.dtype is torch.bfloat16 and dtype is torch.float32 and torch.version.cuda is not None


def in_two_parts(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[high; low] in dtype, as in kernels.blocks.dot_wide: rows of t rounded, and what rounding lost."""
    high = t.to(dtype)
    return torch.cat((high, (t - high).to(dtype)))


def thin(x: Tensor, down: Tensor) -> Tensor:
    """z = X Dᵀ, [M, r] in rows or in columns, in fp32 (fp64 if an operand is), whatever the dtype of x."""
    dtype = torch.float64 if torch.float64 in (x.dtype, down.dtype) else torch.float32
    if on_tensor_cores(x, dtype):
        if down.dtype is x.dtype:
            return torch.mm(x, down.t(), out_dtype=dtype)
        high, low = torch.mm(x, in_two_parts(down, x.dtype).t(), out_dtype=dtype).chunk(2, 1)
        return high + low
    if down.dtype is not dtype:
        down = down.to(dtype)
    if down.stride(1) != 1:  # BLAS takes three times as long on the [N, r] layout that Uᵀ comes in
        down = down.contiguous()
    if down.data_ptr() % ALIGNED:
        # What MKL makes of an [r, K] that lies elsewhere, as tensors of a file do, differs in its last bits.
        down = down.clone()
    if x.dtype is dtype:
        return _thin(x, down)
    if at_once(x):
        return _thin(x.to(dtype), down)
    z = x.new_empty(down.shape[0], x.shape[0], dtype=dtype).t()
    for rows in row_blocks(*x.shape, torch.get_num_threads()):
        z[rows] = _thin(x[rows].to(dtype), down)
    return z


def _thin(x: Tensor, down: Tensor) -> Tensor:
    (M, K), r = x.shape, down.shape[0]
    if M < FEW:
        return torch.mm(x, down.t())
    if AMX and x.is_cpu:  # in columns, until rank 8 of more than the L2 cache holds is slower so
        in_columns = r <= 4 or (r <= 8 and M * K <= 1 << 20)
        return torch.mm(down, x.t()).t() if in_columns else torch.mm(x, down.t())
    parts = panels(x)
    if parts > 1 and r <= 8:
        z = torch.bmm(down.expand(parts, r, K), x.view(parts, M // parts, K).mT)
        return z.transpose(0, 1).reshape(r, M).t()
    if torch.get_num_threads() > 1:
        return torch.mm(x, down.t())
    return torch.mm(down, x.t()).t()


def add_product(y: Tensor, s: Tensor, factor: Tensor, scale: float = 1.0) -> None:
    """y += scale · s F in place, for s of [M, r] and F of [r, N]."""
    dtype = y.dtype
    if dtype is torch.bfloat16 and s.dtype is torch.float32 and y.is_cpu:
        numel = y.numel()
        if numel <= SMALL and factor.numel() <= 4 * SMALL and numel * s.shape[1] > TINY:
            wide = s.to(dtype).to(torch.float32), factor if factor.dtype is torch.float32 else factor.float()
            y.copy_(torch.addmm(y.to(torch.float32), *wide, alpha=scale))
            return
    if s.dtype is not dtype:
        s = s.to(dtype)
    if factor.dtype is not dtype:  # in rows: oneDNN takes up to a third longer on columns
        factor = factor.to(dtype, memory_format=torch.contiguous_format)
    y.addmm_(s, factor, alpha=scale)


def thin_transposed(s: Tensor, x: Tensor) -> Tensor:
    """sᵀ X, [r, K], for s of [M, r]: the gradient of a thin factor, summed over rows in s's dtype."""
    if on_tensor_cores(x, s.dtype):
        high, low = torch.mm(in_two_parts(s.t(), x.dtype), x, out_dtype=s.dtype).chunk(2)
        return high + low
    if x.dtype is s.dtype:
        return _thin_transposed(s, x)
    if at_once(x):
        return _thin_transposed(s, x.to(s.dtype))
    total = s.new_zeros(s.shape[1], x.shape[1])
    for rows in row_blocks(*x.shape, torch.get_num_threads()):
        total += _thin_transposed(s[rows], x[rows].to(s.dtype))
    return total


def _thin_transposed(s: Tensor, x: Tensor) -> Tensor:
    (M, r), K = s.shape, x.shape[1]
    if (parts := panels(x)) == 1:
        return torch.mm(s.t(), x)
    return torch.bmm(s.view(parts, M // parts, r).mT, x.view(parts, M // parts, K)).sum(0)


def apply_core(
    z: Tensor, core: Tensor | None, adapter_ids: Tensor | None, transposed: bool = False, gaps: bool = True
) -> Tensor:
    """s = z Cᵀ, or z C if `transposed`; with `adapter_ids` row m meets core[adapter_ids[m]], and -1 gives 0.

    core: C, or its diagonal; gaps: whether an id may be -1
    """
    if core is None:
        return z
    if core.dtype != z.dtype:
        core = core.to(z.dtype)
    if adapter_ids is None:
        if core.dim() == 1:
            return z * core
        if z.shape[0] < FEW:
            return torch.mm(z, core if transposed else core.t())
        return torch.mm(core.t() if transposed else core, z.t()).t()
    M, r = z.shape
    chosen = adapter_ids.clamp(min=0) if gaps else adapter_ids
    parts = []
    for rows in row_blocks(M, r * r):
        c = core.index_select(0, chosen if M * r * r <= BLOCK else chosen[rows])
        parts.append(torch.bmm(c.mT if transposed else c, z[rows].unsqueeze(-1)).squeeze(-1))
    s = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(z)
    return s.masked_fill_((adapter_ids < 0).unsqueeze(-1), 0) if gaps else s


def core_gradient(t: Tensor, z: Tensor, core: Tensor, adapter_ids: Tensor | None) -> Tensor:
    """dC = tᵀ z, or with `adapter_ids` one such sum for every adapter over the rows that used it; of a diagonal core
    the diagonal."""
    if adapter_ids is None:
        return (t * z).sum(0) if core.dim() == 1 else torch.mm(t.t(), z)
    A, r, _ = core.shape
    total = t.new_zeros(A + 1, r, r)  # the last one takes the rows without an adapter
    slots = torch.where(adapter_ids < 0, A, adapter_ids)
    for rows in row_blocks(t.shape[0], r * r):
        total.index_add_(0, slots[rows], t[rows].unsqueeze(-1) * z[rows].unsqueeze(-2))
    return total[:A]


def mix(core: Tensor | None, basis: Tensor | None, beside: Tensor | None = None) -> Tensor | None:
    """C = Σᵢ vᵢ Pᵢ where a basis P [u, r, r] comes with core = v ([u], or [A, u]); else core as it is. In fp64 where
    `beside`, x or dY, is.

    With P [G, u, r, r] and v of G u numbers C has G such blocks on its diagonal: [G r, G r].
    """
    if basis is None:
        return core
    if beside is not None and beside.dtype is torch.float64:
        core, basis = core.double(), basis.double()
    if basis.dim() == 4:
        (G, u, r, _), dtype, A = basis.shape, rank_dtype(core, basis), core.shape[:-1].numel()
        v, P = core.to(dtype).reshape(A, G, u).transpose(0, 1), basis.to(dtype).reshape(G, u, r * r)
        blocks = P.new_zeros(A, G, r, G, r)
        blocks.diagonal(0, 1, 3).copy_(torch.bmm(v, P).view(G, A, r, r).permute(1, 2, 3, 0))
        return blocks.view(*core.shape[:-1], G * r, G * r)
    u, r, _ = basis.shape
    if core.dtype == basis.dtype == torch.float32:
        if core.dim() == 1:
            return torch.mv(basis.reshape(u, r * r).t(), core).view(r, r)
        return torch.mm(core, basis.reshape(u, r * r)).view(-1, r, r)
    dtype = rank_dtype(core, basis)
    return (core.to(dtype) @ basis.to(dtype).reshape(u, r * r)).view(*core.shape[:-1], r, r)


def mix_gradient(dcore: Tensor, basis: Tensor | None) -> Tensor:
    """dvᵢ = <Pᵢ, dC>; without a basis dC as it is."""
    if basis is None:
        return dcore
    if basis.dim() == 4:
        (G, u, r, _), A = basis.shape, dcore.shape[:-2].numel()
        blocks = dcore.reshape(A, G, r, G, r).diagonal(0, 1, 3).permute(3, 0, 1, 2).reshape(G, A, r * r)
        dv = torch.bmm(blocks, basis.to(dcore.dtype).reshape(G, u, r * r).transpose(1, 2))  # [G, A, u]
        return dv.transpose(0, 1).reshape(*dcore.shape[:-2], G * u)
    if dcore.dim() == 2 and dcore.dtype == basis.dtype:
        return torch.mv(basis.reshape(len(basis), -1), dcore.reshape(-1))
    return torch.matmul(dcore.flatten(-2), basis.to(dcore.dtype).flatten(-2).t())


def check_ids(adapter_ids: Tensor, adapters: int) -> bool:
    """Whether an id is -1. It reads the values: free only on a CPU.

    ValueError unless every id is -1 or below `adapters`.
    """
    if adapter_ids.numel() == 0:
        return False
    low, high = (int(i) for i in adapter_ids.aminmax())
    if low < -1 or high >= adapters:
        raise ValueError(
            f"adapter_ids holds values from {low} to {high}, expected -1 (no adapter) to {adapters - 1}: "
            f"core has {adapters} adapters"
        )
    return low < 0


def forward(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(Y, z), Y [..., N] for x of [..., K] and z [M, r]."""
    rows = in_rows(x)
    y = F.linear(rows, weight, bias)
    z = add_low_rank(y, rows, down, core, up, adapter_ids, basis)
    return like_rows(y, x), z


def add_low_rank(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
) -> Tensor:
    """Y += ((X Dᵀ) Cᵀ) Uᵀ in place, for y [M, N] and x [M, K]. Returns z [M, r]."""
    gaps = adapter_ids is not None and (not adapter_ids.is_cpu or check_ids(adapter_ids, core.shape[0]))
    core = mix(core, basis, x)
    z = thin(x, down)
    add_product(y, apply_core(z, core, adapter_ids, gaps=gaps), up.t())
    return z


def backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    need: tuple[bool, bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, down, core, up, bias), None where `need` is False, from dy of [..., N].

    dX = dY W + ((dY U) C) D, dW = dYᵀ X, dD = (t C)ᵀ X, dC = tᵀ z, dU = dYᵀ s, db = Σ_m dY, with t = dY U. Where all
    rows have one core, h = zᵀ dY, [r, N], gives dU = (C h)ᵀ and, where nothing else needs t, dC = (h U)ᵀ.
    x may be None unless dW or dD is needed, z unless dC or dU is.
    """
    need_x, need_weight, need_down, need_core, need_up, need_bias = need
    shape, core_dtype, one = dy.shape, None if core is None else core.dtype, adapter_ids is None
    core = mix(core, basis, dy)
    dx = dweight = ddown = dcore = dup = dbias = t = None
    dy = in_rows(dy)
    if need_x or need_down or (need_core and not one):
        t = thin(dy, up.t())
    if need_x or need_down:
        q = apply_core(t, core, adapter_ids, transposed=True)
    if one and (need_up or (need_core and t is None)):
        h = thin_transposed(z, dy)
    if need_x:
        dx = torch.mm(dy, weight)
        add_product(dx, q, down)
        if len(shape) != 2:
            dx = dx.view(*shape[:-1], dx.shape[-1])
    if need_weight:
        dweight = torch.mm(dy.t(), in_rows(x))
    if need_down:
        ddown = thin_transposed(q, in_rows(x)).to(down.dtype)
    if need_core:
        if t is not None:
            dcore = core_gradient(t, z, core, adapter_ids)
        elif core.dim() == 1:
            dcore = (h * up.to(h.dtype).t()).sum(1)
        else:
            dcore = torch.mm(h, up.to(h.dtype)).t()
        dcore = mix_gradient(dcore, basis).to(core_dtype)
    if need_up:
        dup = apply_core(h.t(), core, None) if one else thin_transposed(apply_core(z, core, adapter_ids), dy).t()
        dup = dup.to(up.dtype).contiguous()
    if need_bias:
        dbias = dy.sum(0)
    return dx, dweight, ddown, dcore, dup, dbias


def forward_of_parts(
    x: Tensor,
    weights: Sequence[Tensor],
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    biases: Sequence[Tensor],
    adapter_ids: Tensor | None,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """([Y_1 | .. | Y_G], z) of layers that share x, one product each, every Y_i finished while it is in the cache."""
    gaps = adapter_ids is not None and check_ids(adapter_ids, core.shape[0])
    z = thin(x, down)
    s = apply_core(z, mix(core, basis, x), adapter_ids, gaps=gaps)
    y = x.new_empty(x.shape[0], up.shape[0])
    sizes = [w.shape[0] for w in weights]
    for i, (weight, own, u) in enumerate(zip(weights, y.split(sizes, 1), up.split(sizes), strict=True)):
        if len(weight) == 1:  # torch 2.10 writes 16 bits elsewhere, where `out` is a column of a wider tensor
            own.copy_(F.linear(x, weight, biases[i] if biases else None))
        elif biases:
            torch.addmm(biases[i], x, weight.t(), out=own)
        else:
            torch.mm(x, weight.t(), out=own)
        add_product(own, s, u.t())
    return y, z


def backward_of_parts(
    dys: Sequence[Tensor],
    z: Tensor | None,
    weights: Sequence[Tensor],
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dX, dC or dv) of layers that share x: dX = Σ_i dY_i W_i + ((Σ_i dY_i U_i) C) D, dC = (Σ_i dY_i U_i)ᵀ z.

    dX is written by the first product and added to in place by the others; no sum of gradients is formed.
    """
    ups = up.split([w.shape[0] for w in weights])
    t = thin(dys[0], ups[0].t())
    for dy, u in zip(dys[1:], ups[1:], strict=True):
        t += thin(dy, u.t())
    mixed, dx, dcore = mix(core, basis, dys[0]), None, None
    if need_x:
        dx = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        add_product(dx, apply_core(t, mixed, adapter_ids, transposed=True), down)
    if need_core:
        dcore = mix_gradient(core_gradient(t, z, mixed, adapter_ids), basis).to(core.dtype)
    return dx, dcore
