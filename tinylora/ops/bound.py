"""The operator around operands that stay: what the host needs for a launch is settled once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tinylora.kernels import scratch
from tinylora.kernels.core import Core
from tinylora.ops import ways
from tinylora.ops.fused import core_way, elsewhere, mixed_inside, walkable
from tinylora.ops.matmul import way_of

# How many kinds of x and dY are remembered.
KINDS = 64


class Bound:
    """`forward` and `backward_of_parts` around operands that stay, for x and dY of kinds that were seen before.

    What the kernels are handed of the operands, their addresses, is settled once. The operands' values are read anew
    at each call; that they still stand where they stood is the caller's to see. A call gives None where it has not
    learnt the kind, or something that it rests on is no more: then the long way computes it, and is learnt from.
    """

    def __init__(self, weight, down, core, up, bias, basis):
        self.operands = weight, down, up, bias
        values, own_basis = mixed_inside(core, basis)
        # fp32 products follow torch's setting, which may change; C that is mixed by a launch of its own is a new one.
        self.possible = weight.dtype != torch.float32 and own_basis is basis
        self.core, self.turned = (Core(values, basis, None, transposed) for transposed in (False, True))
        self.ways: dict[tuple, Callable | None] = {}

    def forward(self, x: Tensor, want_z: bool) -> tuple[Tensor, Tensor | None] | None:
        """(Y, z), z None unless it is wanted."""
        run = self.ways.get((x.shape, x.stride(), x.dtype, x.device, want_z))
        return None if run is None or self._elsewhere(x) else run(x, want_z, None)

    def backward(self, dys: Sequence[Tensor], z: Tensor) -> tuple[Tensor, Tensor] | None:
        """(dX, dC or dv) from dY [M, N], in parts or whole."""
        run = self.ways.get(tuple([(dy.shape, dy.stride(), dy.dtype, dy.device) for dy in dys]))
        if run is None or not z.is_contiguous() or z.data_ptr() % 16:  # a hook on saved tensors may unpack others
            return None
        return None if self._elsewhere(z) else run(dys, z)

    @staticmethod
    def _elsewhere(t: Tensor) -> bool:
        """On another card than the current one, or while a graph is captured: its launches have planes of their own."""
        return elsewhere(t) or not scratch.kept_by_stream(t.device)

    def learn(self, x: Tensor, want_z: bool) -> None:
        """From a forward of this kind that the long way has just computed."""
        key = x.shape, x.stride(), x.dtype, x.device, want_z
        if key in self.ways or not self._may_learn(x):
            return
        weight, down, up, bias = self.operands
        bind = way_of(x, weight, down, self.core, up, bias).bind
        self.ways[key] = bind(weight, down, self.core, up, bias)

    def learn_backward(self, dys: Sequence[Tensor], z: Tensor) -> None:
        key = tuple([(dy.shape, dy.stride(), dy.dtype, dy.device) for dy in dys])
        if key in self.ways or not self._may_learn(z) or any(walkable(dy) is not dy for dy in dys):
            return
        if self.core.kind in ("none", "diagonal") or self.core.values.dtype != torch.float32 or not z.is_contiguous():
            return
        weight, down, up, _ = self.operands
        x = dys[0] if len(dys) == 1 else dys
        matmul = way_of(x, weight, up, self.turned, down, None).bind(weight, up, self.turned, down, None)
        gradient = core_way(z, z, self.core, dys[0].dtype).bind(self.core)  # t is as z is

        def run(dys, z):
            dcore = None

            def use(t):
                nonlocal dcore
                dcore = gradient(t, z)

            found = matmul(dys[0] if len(dys) == 1 else dys, True, use)
            return None if found is None or dcore is None else (found[0], dcore)

        self.ways[key] = None if matmul is None or gradient is None else run

    def _may_learn(self, t: Tensor) -> bool:
        if len(self.ways) >= KINDS:  # of ever new shapes none comes again
            self.ways.clear()
        return (
            self.possible and ways.remembers(t.device) and not torch.compiler.is_compiling() and not self._elsewhere(t)
        )
