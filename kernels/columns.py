"""A matrix in column blocks: X = [X_1 | X_2 | X_3], each a tensor of its own, so that nothing has to put them together.

The gradients of q, k and v arrive like that, and one product takes them all: dX = dY_q W_q + dY_k W_k + dY_v W_v.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

MOST = 3  # q, k, v


@dataclass(frozen=True)
class ColumnBlocks:
    """One to three tensors [M, K_i] whose columns lie equally far apart."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, x: Tensor | Sequence[Tensor]) -> "ColumnBlocks":
        tensors = (x,) if isinstance(x, Tensor) else tuple(x)
        if len(tensors) > MOST or len({t.stride(1) for t in tensors}) > 1:
            tensors = (torch.cat(tensors, 1),)
        return cls(tensors)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors[0].shape[0], sum(t.shape[1] for t in self.tensors)

    def three(self, of: Callable[[Tensor], object] = lambda t: t) -> tuple:
        """`of` every block, as the kernels take them: None where there is none."""
        return (*map(of, self.tensors), *[None] * (MOST - len(self.tensors)))

    @property
    def row_strides(self) -> tuple[int, int, int]:
        return (*(t.stride(0) for t in self.tensors), *[0] * (MOST - len(self.tensors)))

    @property
    def ends(self) -> tuple[int, int]:
        """Behind which column the first and the second block end."""
        ends = [*accumulate(t.shape[1] for t in self.tensors), *[self.shape[1]] * MOST]
        return ends[0], ends[1]

    def divided_by(self, step: int) -> bool:
        """Whether every block is whole steps wide."""
        return all(t.shape[1] % step == 0 for t in self.tensors)
