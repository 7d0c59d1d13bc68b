"""What a layer, or a group of them, keeps from one call without gradients to the next: its operands, found once.

A decode step of a large model is one short launch per layer; what Python does before it takes longer. Everything that
rests on the operands alone is therefore settled once, and later calls ask one question: does every tensor still stand
where it stood? Whatever somebody changed in a module, or put elsewhere, is seen by that; values are read anew.
"""

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor, nn

from tinylora.adapters import Adapter
from tinylora.ops.linear import plain

SHAPES = 64  # of x that are remembered; more are a stream of ever new ones


def keeps(x: Tensor) -> bool:
    """Whether anything is to be had: on a CPU nothing is launched."""
    return x.is_cuda


class Kept:
    """Where the operands of `layers` stand under adapter `name`, and by shapes of x what computes around them."""

    __slots__ = ("addresses", "bound", "keys", "layers", "name", "owners", "tensors")

    def __init__(self, name: str, layers: list[tuple[nn.Module, Adapter]], places: list[tuple[dict, str, Tensor]]):
        self.name, self.layers = name, layers
        self.owners, self.keys, self.tensors = zip(*places, strict=True)
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.bound: dict[tuple, Callable[[Tensor], Tensor | None] | None] = {}

    @classmethod
    def of(cls, name: str, layers: list[nn.Module]) -> "Kept | None":
        """None where an operand is nobody's parameter or buffer, or dropout may come between."""
        members, places = [], []
        for layer in layers:
            adapter = layer._modules["adapters"]._modules[name]
            if adapter.dropout:
                return None
            members.append((layer, adapter))
            owners = layer._parameters, adapter._buffers, adapter._parameters, adapter.shared._parameters
            for t in (*layer.base(), *adapter.factors()):
                if t is not None:
                    at = next(((own, key) for own in owners for key, one in own.items() if one is t), None)
                    if at is None:
                        return None
                    places.append((*at, t))
        return cls(name, members, places)

    def stands(self) -> bool:
        """Whether every operand is the tensor that it was, at its address, and every layer computes as it did."""
        name = self.name
        for layer, adapter in self.layers:
            if (
                layer.active != name
                or layer.merged is not None
                or layer.batch_invariant
                or layer._modules["adapters"]._modules.get(name) is not adapter
            ):
                return False
        return (
            all(map(is_, map(dict.get, self.owners, self.keys), self.tensors))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def rows(self):
        """Whose adapter each row of x uses, or None (`tinylora.adapter_ids`)."""
        return self.layers[0][1].shared.rows

    def quick(self, x: Tensor) -> Tensor | None:
        """Y for an x of a shape that was bound before, where nobody looks on; None: the long way computes it.

        The caller has seen that the operands stand, and wants no gradients.
        """
        run = self.bound.get((x.shape, x.stride(), x.dtype, x.device))
        return None if run is None or not plain(x) else run(x)

    def output(self, x: Tensor) -> Tensor | None:
        """`quick` for a layer by itself, which has not asked anything yet."""
        if not self.stands():
            self.bound.clear()
            return None
        return None if self.rows() is not None else self.quick(x)

    def bind(self, x: Tensor, weight, down, core, up, bias, basis) -> None:
        """Have `quick` answer for x like this one from now on, if one launch computes it: after the call that did."""
        key = x.shape, x.stride(), x.dtype, x.device
        if key in self.bound or torch.compiler.is_compiling():
            return
        from tinylora.ops import fused  # here, because it imports Triton

        if len(self.bound) >= SHAPES:
            self.bound.clear()
        self.bound[key] = fused.bound(x, weight, down, core, up, bias, basis)
