"""What a layer, or a group of them, keeps from one call to the next: its operands, found once.

A decode step of a large model is one short launch per layer, a training step on few rows not many more; what Python
does before each takes longer than the card does. Everything that rests on the operands alone is therefore settled once,
and later calls ask one question: does every tensor still stand where it stood? Whatever somebody changed in a module,
or put elsewhere, is seen by that; values are read anew.
"""

import weakref
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tinylora.adapters import Adapter
from tinylora.ops.linear import PLAIN, plain
from tinylora.ops.siblings import adapted_linears


class Operands(NamedTuple):
    """What layers that read one tensor compute with, all of them as one: as `adapted_linears` takes it."""

    weight: Tensor
    down: Tensor
    core: Tensor | None
    cores: list[Tensor | None]
    up: Tensor
    bias: Tensor | None
    basis: Tensor | None
    sizes: list[int]


class Kept:
    """Where the operands of `layers` stand under adapter `name`, and what computes around them.

    frozen: the tensors that must not ask for gradients, or the long way computes
    """

    __slots__ = ("addresses", "bound", "frozen", "keys", "layers", "name", "operands", "owners", "tensors")

    def __init__(self, name: str, layers: list[tuple[nn.Module, Adapter]], places: list[tuple], operands: Operands):
        # A layer keeps this: held strongly, it would wait for the garbage collector with its weight.
        self.layers = [(weakref.ref(layer), adapter) for layer, adapter in layers]
        self.name, self.operands = name, operands
        self.owners, self.keys, self.tensors = zip(*places, strict=True)
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.frozen = [t for t in self.tensors if not any(t is core for core in operands.cores)]
        self.bound = None  # of ops.bound, which imports Triton

    @staticmethod
    def pays(x: Tensor) -> bool:
        """Whether anything is to be had: on a CPU nothing is launched."""
        return x.is_cuda

    @classmethod
    def of(cls, name: str, layers: list[nn.Module], operands: Operands) -> "Kept | None":
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
                    if type(t) not in PLAIN:
                        return None
                    at = next(((own, key) for own in owners for key, one in own.items() if one is t), None)
                    if at is None:
                        return None
                    places.append((*at, t))
        return cls(name, members, places, operands)

    def stands(self) -> bool:
        """Whether every operand is the tensor that it was, at its address, and every layer computes as it did."""
        name = self.name
        for own, adapter in self.layers:
            layer = own()
            if (
                layer is None
                or layer.active != name
                or layer.merged is not None
                or layer.batch_invariant
                or layer._modules["adapters"]._modules.get(name) is not adapter
            ):
                return False
        return (
            all(map(is_, map(dict.get, self.owners, self.keys), self.tensors))
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def outputs(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The layers' Y, or None: then the long way computes them. The caller has seen that the operands stand."""
        weight = self.operands.weight
        if (
            self.layers[0][1].shared.rows is not None  # each row of x may have an adapter of its own
            or not plain(x)
            or x.dtype is not weight.dtype
            or x.device != weight.device
            or x.shape[-1] != weight.shape[1]
        ):
            return None
        o = self.operands
        if torch.is_grad_enabled():
            for t in self.frozen:
                if t.requires_grad:
                    return None
        biases = () if o.bias is None else (o.bias,)
        return adapted_linears(x, (weight,), o.down, o.cores, o.up, biases, None, o.basis, o.sizes, self)

    def forward(self, x: Tensor, want_z: bool) -> tuple[Tensor, Tensor | None] | None:
        """(Y, z) by launches bound to the operands, after `stands`; or None, and then `learn` from the long way."""
        return None if self.bound is None else self.bound.forward(x, want_z)

    def backward(self, dys: list[Tensor], z: Tensor) -> tuple[Tensor, Tensor] | None:
        """(dX, dC or dv) in the same way; looks itself whether the operands still stand."""
        return None if self.bound is None or not self.stands() else self.bound.backward(dys, z)

    def learn(self, x: Tensor, want_z: bool) -> None:
        if self.bound is None and self.pays(x):
            from tinylora.ops.bound import Bound

            o = self.operands
            self.bound = Bound(o.weight, o.down, o.core, o.up, o.bias, o.basis)
        if self.bound is not None:
            self.bound.learn(x, want_z)

    def learn_backward(self, dys: list[Tensor], z: Tensor) -> None:
        if self.bound is not None and self.stands():
            self.bound.learn_backward(dys, z)
