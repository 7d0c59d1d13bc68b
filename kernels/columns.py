"""A matrix in column blocks: X = [X_1 | X_2 | X_3], each a tensor of its own, so that nothing has to put them together.

The gradients of q, k and v arrive like that, and one product takes them all: dX = dY_q W_q + dY_k W_k + dY_v W_v.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

MOST = 3  # q, k, v


class ColumnBlocks:
    """One to three tensors [M, K_i] whose columns lie equally far apart.

    shape:       (M, K) of all together
    row_strides: of the three; 0 where there is none
    ends:        behind which column the first and the second block end
    """

    __slots__ = ("ends", "row_strides", "shape", "tensors")

    def __init__(self, tensors: tuple[Tensor, ...]):
        self.tensors, first = tensors, tensors[0]
        if len(tensors) == 1:  # nearly every call: each step here is paid per launch
            self.shape = M, K = first.shape
            self.row_strides, self.ends = (first.stride(0), 0, 0), (K, K)
            return
        ends = [*accumulate(t.shape[1] for t in tensors)]
        self.shape = first.shape[0], ends[-1]
        self.row_strides = (*(t.stride(0) for t in tensors), *[0] * (MOST - len(tensors)))
        self.ends = ends[0], ends[1]

    @classmethod
    def of(cls, x: Tensor | Sequence[Tensor]) -> "ColumnBlocks":
        if isinstance(x, Tensor):
            return cls((x,))
        tensors = tuple(x)
        if len(tensors) > MOST or len({t.stride(1) for t in tensors}) > 1:
            tensors = (torch.cat(tensors, 1),)
        return cls(tensors)

    def three(self) -> tuple[Tensor | None, ...]:
        """Every block, as the kernels take them: None where there is none."""
        return (*self.tensors, *[None] * (MOST - len(self.tensors)))

    def divided_by(self, step: int) -> bool:
        """Whether every block is whole steps wide."""
        if len(self.tensors) == 1:
            return self.shape[1] % step == 0
        return all(t.shape[1] % step == 0 for t in self.tensors)
