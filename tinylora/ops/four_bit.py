"""A frozen weight of four bits a number, as bitsandbytes packs it (QLoRA's base), and the operator around it.

    Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ,   W[n, k] = code[q[n, k]] · absmax[(n K + k) // block], rounded to X's dtype

W exists for as long as a matmul reads it, once for Y and once for dX, and is never saved. Few rows on a GPU go through
bitsandbytes' own product, which multiplies by the packed numbers, and the correction is added to what it gives.
"""

from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinylora.ops.eager import in_rows, like_rows

# Beyond so many rows bitsandbytes' product makes W itself on every card; on 9.0 for 7B's shapes from 6 to 49 rows on.
# Where it does so below, a pass over Y is lost; where it does not, all of W is spared.
FEW = 64


class FourBit(NamedTuple):
    """W [N, K], without being one tensor.

    packed: two codes to a byte, row by row, the first in the high half; N K / 2 bytes in any dtype and shape
    absmax: [blocks] in fp32; or uint8 where `nested` says what it means
    block:  how many numbers of W have one absmax
    kind:   "nf4" or "fp4"
    shape:  (N, K)
    nested: None, or (code [256], absmax, block, offset []) of absmax: QLoRA's double quantisation
    """

    packed: Tensor
    absmax: Tensor
    block: int
    kind: str
    shape: tuple[int, int]
    nested: tuple[Tensor, Tensor, int, Tensor] | None = None

    @classmethod
    def of(cls, weight: Tensor) -> "FourBit":
        """That of a bitsandbytes.nn.Params4bit.

        ValueError where bitsandbytes is too old, the weight not quantised yet, or changed by a call in eval() on a CPU.
        """
        if not hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
            raise ValueError("bitsandbytes is too old, expected 0.50 or newer")
        state: Any = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("the 4-bit weight is not quantised yet: move the model to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "the 4-bit weight has run in eval() on a CPU, for which bitsandbytes rounds its scales to bf16: load "
                "the model again, and put the adapter on before it runs"
            )
        second = state.state2 if state.nested else None
        nested = None if second is None else (second.code, second.absmax, second.blocksize, state.offset)
        return cls(weight, state.absmax, state.blocksize, state.quant_type, tuple(state.shape), nested)

    def like(self, x: Tensor) -> Tensor:
        """A tensor of W's shape and of x's dtype and device, without W's memory or values."""
        return x.new_empty(()).expand(self.shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W, [N, K]."""
        absmax = self.absmax
        if self.nested is not None:
            code, scale, block, offset = self.nested
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scale, code, block, torch.float32) + offset
        packed = self.packed.detach()
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, self.block, self.kind, self.shape, dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """X Wᵀ + b for x [M, K], without gradients."""
        packed = self.packed.detach().view(-1, 1)
        if self.nested is None:
            scales, more = self.absmax, {}
        else:
            code, scales, _, offset = self.nested
            more = {"absmax_8bit": self.absmax, "absmax_code": code, "absmax_offset": offset}
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, self.shape, scales, self.block, self.kind, bias=bias, **more)

    def multiplies(self, x: Tensor) -> bool:
        """Whether `product` is the way for x [..., K]. Of two levels bitsandbytes' kernels know blocks of 256 alone."""
        return x.is_cuda and 0 < x.numel() <= FEW * x.shape[-1] and (self.nested is None or self.nested[2] == 256)


class Around(NamedTuple):
    """`eager`, `fused` or their invariant kind on a weight of four bits: the same two functions, which get none."""

    module: ModuleType | SimpleNamespace
    weight: FourBit
    batch_invariant: bool

    def forward(self, x, _, down, core, up, bias, adapter_ids, basis):
        """(Y, z) for x of [..., K]."""
        if self.batch_invariant or not self.weight.multiplies(x):
            return self.module.forward(x, self.weight.dense(x.dtype), down, core, up, bias, adapter_ids, basis)
        rows = in_rows(x)
        y = self.weight.product(rows, bias)
        z = self.module.add_low_rank(y, rows, down, core, up, adapter_ids, basis)
        return like_rows(y, x), z

    def backward(self, dy, x, z, _, down, core, up, adapter_ids, basis, need):
        weight = self.weight.dense(dy.dtype) if need[0] else self.weight.like(dy)
        return self.module.backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need)
