"""The operator on a CPU with rows that do not know of each other: `batch_invariant=True` without kernels.

MKL and oneDNN choose how a product is cut, and so how each sum is rounded, by the number of rows. Here every product
has ROWS rows, the last block filled up with zeros, so a row meets the same code however many others there are. Two
more things had to be measured, since no library promises them (docs/LOG.md):
- within a block the place of a row changes nothing, if the rows of the other operand start at whole multiples of
  MULTIPLE numbers; where they do not (a K that 16 does not divide), MKL rounds by place, and all operands are copied;
- what happens at rank r is written out, one rank at a time in elementwise operations, which round each number by
  itself. One core for all rows and a core per row then give the same bits, too, as they do in the kernels.

dX is as independent as Y. The gradients of weight, down, core, up and bias are sums over all rows and cannot be.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.ops import eager

# A product of 32 rows is as fast as one of 16 for a single token in bf16, and half as long for hundreds of rows.
ROWS = 32
MULTIPLE = 16


def up_to(n: int) -> int:
    """The least multiple of MULTIPLE that is not below n."""
    return -(-n // MULTIPLE) * MULTIPLE


def lies_aligned(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, lie whole multiples of MULTIPLE numbers apart in memory."""
    rows, columns = matrix.stride()
    apart = rows if columns == 1 else columns if rows == 1 else 1
    return apart > 0 and apart % MULTIPLE == 0


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """`matrix` with zeros up to this shape; itself if it has it."""
    if matrix.shape == (rows, columns):
        return matrix
    wide = matrix.new_zeros(rows, columns)
    wide[: matrix.shape[0], : matrix.shape[1]] = matrix
    return wide


def mix(core: Tensor | None, basis: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`eager.mix`, with the sum over i in its own order for every adapter: C = Σᵢ vᵢ Pᵢ."""
    if basis is None:
        return None if core is None else core.to(dtype)
    core, basis = core.to(dtype), basis.to(dtype)
    mixed = core.new_zeros(*core.shape[:-1], *basis.shape[1:])
    for v, p in zip(core.unbind(-1), basis, strict=True):
        mixed += v[..., None, None] * p
    return mixed


def apply_core(z: Tensor, r: int, core: Tensor | None, adapter_ids: Tensor | None, transposed: bool) -> Tensor:
    """`eager.apply_core`, one rank after the other: s = Σᵢ z[:, i] C[:, i], for one core or one per row.

    z and s [M, width], s with zeros beyond the rank r.
    """
    s = torch.zeros_like(z)
    real = s[:, :r]
    if core is None:
        real.copy_(z[:, :r])
        return s
    if adapter_ids is None and core.dim() == 1:
        torch.mul(z[:, :r], core, out=real)
        return s
    if adapter_ids is not None:
        core = core[adapter_ids.clamp(min=0)]  # [M, r, r]
    for i in range(r):
        real += z[:, i : i + 1] * (core[..., i, :] if transposed else core[..., i])
    return s if adapter_ids is None else s.masked_fill_((adapter_ids < 0).unsqueeze(-1), 0)


def product(
    x: Tensor,
    w: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """(Y, z) with Y = X w + b + s up, z = X down and s = z Cᵀ (z C if `transposed`).

    x [..., K], w [K, N], down [K, r], up [r, N] in any strides; core is mixed already, in the dtype of z.
    returns Y [..., N] and z [M, r].
    """
    given, x = x, eager.in_rows(x)
    M, (K, N), r = x.shape[0], w.shape, down.shape[1]
    dtype = eager.rank_dtype(x, down)
    inner, outer, width = K, N, up_to(r)
    if not (lies_aligned(w) and lies_aligned(down)):
        inner, outer = up_to(K), up_to(N)
        bias = None if bias is None else F.pad(bias, (0, outer - N))
    w, down = padded(w, inner, outer), padded(down.to(dtype), inner, width)
    up = padded(up.to(x.dtype), width, up_to(outer))
    y, z = x.new_empty(M, N), x.new_empty(M, r, dtype=dtype)
    for start in range(0, M, ROWS):
        count = min(ROWS, M - start)
        rows = slice(start, start + count)
        block, ids = padded(x[rows], ROWS, inner).contiguous(), None
        if block.data_ptr() % eager.ALIGNED:  # as a row by itself would lie
            block = block.clone()
        if adapter_ids is not None:
            ids = F.pad(adapter_ids[rows], (0, ROWS - count), value=-1)
        own_z = torch.mm(block.to(dtype), down)
        own = torch.mm(block, w) if bias is None else torch.addmm(bias, block, w)
        s = apply_core(own_z, r, core, ids, transposed).to(y.dtype)
        if up.shape[1] == outer:
            own.addmm_(s, up)
        else:  # U's own rows would start anywhere
            own += torch.mm(s, up)[:, :outer]
        y[rows], z[rows] = own[:count, :N], own_z[:count, :r]
    return eager.like_rows(y, given), z


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
    if adapter_ids is not None:
        eager.check_ids(adapter_ids, core.shape[0])
    core = mix(core, basis, eager.rank_dtype(x, down))
    return product(x, weight.t(), down.t(), core, up.t(), bias, adapter_ids, transposed=False)


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
    """`eager.backward`, with a dX whose rows do not know of each other."""
    dx = None
    if need[0]:
        mixed = mix(core, basis, eager.rank_dtype(dy, up))
        dx, _ = product(dy, weight, up, mixed, down, None, adapter_ids, transposed=True)
    _, *sums = eager.backward(dy, x, z, weight, down, core, up, adapter_ids, basis, (False, *need[1:]))
    return dx, *sums
