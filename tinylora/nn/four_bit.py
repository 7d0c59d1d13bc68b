"""The drop-in layer around bitsandbytes' Linear4bit: adapters on a base of four bits a number (QLoRA).

bitsandbytes is not imported here: whoever has such a layer has it loaded.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylora.adapters.sharded import whole
from tinylora.nn.linear import Linear, low_rank
from tinylora.ops.four_bit import FourBit
from tinylora.ops.linear import (
    adapted_linear,
    by_torch_alone,
    invariant_linear,
    plain,
    unchecked,
    without_autocast,
)


def is_four_bit(module: nn.Module) -> bool:
    """Whether it is a Linear4bit of bitsandbytes', with its own forward."""
    for cls in type(module).__mro__:
        if cls.__module__ == "bitsandbytes.nn.modules" and cls.__name__ == "Linear4bit":
            return type(module).forward is cls.forward
    return False


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight that adapters are made for, [N, K]; of four bits, in the dtype that is computed in.

    fp32 for fp16, which rounds otherwise than bf16: four bits are one base, in whatever dtype they are computed.
    """
    if isinstance(layer, FourBitLinear) or is_four_bit(layer):
        packed = packed_weight(layer)
        dtype = layer.compute_dtype or layer.weight.quant_state.dtype
        return packed.dense(torch.float32 if dtype is torch.float16 else dtype)
    return whole(layer.weight)


def packed_weight(layer: nn.Module) -> FourBit:
    """The weight of a Linear4bit, or of ours. ValueError where it has not been quantised yet."""
    weight = layer.weight
    if getattr(weight, "quant_state", None) is None and getattr(layer, "quant_state", None) is not None:
        weight.quant_state = layer.quant_state  # lost by whoever made the parameter anew
    return FourBit.of(weight)


def keep_as_loaded(root: nn.Module) -> None:
    """On some CPUs bitsandbytes changes a layer's numbers and its layout in eval(), after which it has no gradient: not
    in a model of ours, whichever layers have the adapter."""
    for module in root.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


class FourBitLinear(Linear):
    """`Linear` on a weight of four bits a number: `tinylora.apply` makes it of a bitsandbytes.nn.Linear4bit.

    Y has x's dtype, and is computed in the layer's compute_dtype, as bitsandbytes' is. What is saved of the base, and
    under which names, is bitsandbytes' as well. It has no `merge`: four bits cannot hold an update.
    On a CPU the weight is dequantised in every call, in eval() too, where bitsandbytes would change its layout.
    """

    theirs: type[nn.Module]  # bitsandbytes' class

    @classmethod
    def wrap(cls, linear: nn.Module) -> "FourBitLinear":
        packed_weight(linear)
        layer = super(FourBitLinear, around(type(linear))).wrap(linear)
        layer.weight.module = layer  # where .to() leaves a new quant_state
        return layer

    def forward(self, x: Tensor) -> Tensor:
        name = self.active
        if name is None:
            if self.batch_invariant:
                inner = x.to(self.compute_dtype or x.dtype)
                bias = None if self.bias is None else self.bias.to(inner.dtype)
                weight = packed_weight(self).dense(inner.dtype)
                return invariant_linear(inner, weight, bias).to(x.dtype)
            return self.theirs.forward(self, x)
        adapter = self._modules["adapters"]._modules[name]
        down, core, up, basis = adapter.factors()
        rows, invariant = adapter.shared.rows, self.batch_invariant
        dropped = self.drops(adapter)
        dtype = self.compute_dtype or x.dtype
        with without_autocast(x.device.type):
            inner = x.to(dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            ids = None if rows is None else rows.of(x)
            if ids is None and (dropped or not (plain(inner) or invariant or by_torch_alone())):
                # The graph of whoever looks at the call from outside must not keep W: bitsandbytes' own node does not.
                if dropped:
                    inner = F.dropout(inner, adapter.dropout)
                y = self.theirs.forward(self, x).to(dtype) + low_rank(inner, down, core, up, basis)
            elif ids is None and inner.shape[-1:] == (self.in_features,) and inner.device == down.device:
                y = unchecked(inner, packed_weight(self), down, core, up, bias, None, basis, invariant)
            else:
                core = core if ids is None else adapter.row_core()
                y = adapted_linear(
                    inner, packed_weight(self), down, core, up, bias, ids, basis=basis, batch_invariant=invariant
                )
        return y.to(x.dtype)

    def refuse_merge(self) -> None:
        raise ValueError(
            "the weight has four bits a number, which cannot hold what an adapter adds: expected to save the adapter "
            '(format="peft" or "lora") and to load and merge it on the model before quantisation'
        )

    def __reduce_ex__(self, protocol):
        return _new, (self.theirs,), self.__getstate__()


@cache
def around(theirs: type[nn.Module]) -> type[FourBitLinear]:
    """`FourBitLinear` that is one of `theirs` as well, so that it saves, loads and moves like it."""
    return type(theirs.__name__, (FourBitLinear, theirs), {"theirs": theirs, "__module__": __name__})


def _new(theirs: type[nn.Module]) -> FourBitLinear:
    cls = around(theirs)
    return cls.__new__(cls)
