"""The core as the kernels take it: which kind, which pointers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Core(NamedTuple):
    """C of s = z Cᵀ: none (the identity), one for all rows, or one per row by ids; C itself, or v with P.

    values: None, C [r, r], the diagonal of one [r], v [u], or one per adapter: [A, r, r], [A, u]
    basis:  P [u, r, r] where values is v; or [G, u, b, b] with b = r / G, for a C of G blocks on its diagonal and
            nothing between them, of which block g is Σ_a v[g u + a] P[g, a]: layers side by side
    ids:    [M] where there is one per adapter; -1 is no adapter, and what names none gives NaN
    transposed: s = z C instead, which is what the backward needs
    """

    values: Tensor | None = None
    basis: Tensor | None = None
    ids: Tensor | None = None
    transposed: bool = False

    @property
    def kind(self) -> str:
        if self.values is None:
            return "none"
        if self.ids is not None:
            return "rows"
        return "diagonal" if self.basis is None and self.values.dim() == 1 else "dense"

    @property
    def u(self) -> int:
        """How many numbers v has."""
        return 0 if self.basis is None else self.basis.shape[:-2].numel()

    @property
    def groups(self) -> int:
        """How many blocks C has."""
        return self.basis.shape[0] if self.basis is not None and self.basis.dim() == 4 else 1

    @property
    def adapters(self) -> int:
        """How many there are to choose from by ids."""
        return 0 if self.ids is None else self.values.shape[0]

    def pointers(self, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(values, basis, ids), each contiguous; `unused` stands where there is none."""
        values, basis, ids, _ = self
        return (
            unused if values is None else values.contiguous(),
            unused if basis is None else basis.contiguous(),
            unused if ids is None else ids.contiguous(),
        )


def core_precision(dtype: torch.dtype, precision: str) -> str:
    """How rows' cores are mixed beside operands of `dtype`: as fp32 operands are, or by tensor cores in three parts of
    11 bits, which lose less than 16-bit operands had."""
    return precision if dtype == torch.float32 else "tf32x3"
