"""The drop-in layer around a linear layer that several processes compute together (tensor parallelism).

Each process has a slice of W, and what is frozen of the adapter is cut as W is:

    by columns of Wᵀ, W [N/p, K]:          Y's own N/p columns = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ with U [N/p, r]
    by rows of Wᵀ, W [N, K/p], X [.., K/p]: Y = Σ over the processes of X Wᵀ + ((X Dᵀ) Cᵀ) Uᵀ with D [r, K/p], + b

so that every process runs the operator on what it has, and the sum that the layer ends with anyway is the correction's,
too. Each process then has a part of C's gradient, the sum of which is the gradient (Shoeybi et al., arXiv 1909.08053).
transformers' (a tp_plan) and torch's (`parallelize_module`) keep W as a DTensor.
"""

import inspect
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylora.adapters import AdapterConfig
from tinylora.adapters.sharded import is_dtensor
from tinylora.nn.four_bit import is_four_bit
from tinylora.nn.linear import Linear, refuse_replaced


def refuse_sharded(name: str, layer: nn.Linear, above: Iterable[nn.Module]) -> None:
    """ValueError for a weight in pieces that is not tensor parallelism's alone."""
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in above):
        raise ValueError(
            f"{name} is sharded (FSDP2), expected a whole model: put the adapter on, then shard it by FSDP2"
        )
    placements = layer.weight.placements
    cut = len(placements) == 1 and hasattr(placements[0], "dim")
    if not cut or is_four_bit(layer) or not (_style(layer) or layer._forward_pre_hooks):
        raise ValueError(
            f"{name} is spread over processes as {placements}, expected a whole weight, or one that is not of four "
            "bits and that tensor parallelism alone has cut (transformers' tp_plan, torch's parallelize_module)"
        )
    if not isinstance(layer, Linear) and _style(layer) is None:
        refuse_replaced(layer, name)


def refuse_parallel(root: nn.Module, layers: Mapping[str, nn.Linear], config: AdapterConfig) -> None:
    """ValueError where tensor parallelism has cut some of a model's layers and the adapter cannot follow."""
    if not any(map(is_dtensor, root.parameters())):
        return
    cut = [name for name, layer in layers.items() if is_dtensor(layer.weight)]
    if cut and not config.adapter_class.core_alone_trains:
        raise ValueError(
            f"{cut[0]} is under tensor parallelism, expected TinyLoraConfig or LoraXSConfig: of "
            f"{type(config).__name__} more than the core trains"
        )
    if config.dropout or config.modules_to_save:
        raise ValueError("the model is under tensor parallelism, expected no dropout and no modules_to_save")


def own_slices(layer: nn.Linear, frozen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter's frozen tensors, down [r, K] and up [N, r], this process's part, of the same numbers in all."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    weight, cut = layer.weight, _cut(layer)
    # From the first process, as two may decompose one weight with other signs.
    return {
        n: distribute_tensor(t, weight.device_mesh, weight.placements if n == cut else [Replicate()]).to_local()
        for n, t in frozen.items()
    }


def put_together(layer: nn.Linear | None, name: str, t: Tensor) -> Tensor:
    """The whole of what `own_slices` gave the processes' layers as `name`; all of them must ask for it."""
    if not isinstance(layer, ParallelLinear) or name != layer.cut:
        return t
    shape = (layer.out_features, t.shape[1]) if name == "up" else (t.shape[0], layer.in_features)
    return _spread(t.contiguous(), layer.mesh, layer.placement, shape).full_tensor()


def _spread(t: Tensor, mesh, placement, shape: tuple[int, ...]):
    """A DTensor of this shape, of which t is this process's slice; the processes' may differ in size."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t, mesh, [placement], run_check=False, shape=shape, stride=stride)


class ParallelLinear(Linear):
    """`Linear` on a weight of which every process has a slice. Its input and output are what the layer's were.

    It has no `merge`, and no siblings. ValueError: an input that is no DTensor where the weight is one, batch_invariant
    (how processes add up is not ours).
    """

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "ParallelLinear":
        style = _style(linear)
        bare = nn.Linear.__new__(nn.Linear)
        bare.__dict__.update({k: v for k, v in linear.__dict__.items() if k != "forward" or style is None})
        layer = super().wrap(bare)
        weight = linear.weight  # FSDP2 may cut it once more
        layer.mesh, layer.placement, layer.cut = weight.device_mesh, weight.placements[0], _cut(linear)
        if style is not None:  # torch's are hooks, which came along
            style["self"].install_forward(layer, layer.mesh)
        return layer

    def base(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of this process. What is added up has its bias afterwards."""
        from torch.distributed.tensor import DTensor  # here, because it takes a while to import

        weight, bias = super().base()
        if not isinstance(weight, DTensor):  # transformers has them here for the length of a call
            return weight, bias
        return weight.to_local(), bias.to_local() if self.cut == "up" and bias is not None else None

    def delta(self) -> Tensor:
        """U C D of the whole layer, [N, K]; every process must ask for it."""
        own = self.adapters[self.active].factors()
        up, down = put_together(self, "up", own.up), put_together(self, "down", own.down)
        return own._replace(up=up, down=down).delta()

    def forward(self, input: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        x, (weight, bias) = input, super().base()
        if self.batch_invariant:
            raise ValueError("batch_invariant is set under tensor parallelism, expected it off")
        if not isinstance(weight, DTensor):
            return super().forward(x)
        if self.active is None:
            return F.linear(x, weight, bias)
        if not isinstance(x, DTensor):
            raise ValueError("x is a whole tensor and the weight a slice (DTensor), expected both to be DTensors")
        last = Shard(x.dim() - 1)
        if self.cut == "down":
            y = super().forward(x.redistribute(placements=[last]).to_local())
            y = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
            return y if bias is None else y + bias
        y = super().forward(x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]))
        return _spread(y, self.mesh, last, (*x.shape[:-1], weight.shape[0]))

    def summed(self, core: Tensor) -> Tensor:
        return _Summed.apply(core, self.mesh.get_group()) if torch.is_grad_enabled() and core.requires_grad else core

    def _keep(self, operands) -> None:
        if not torch.is_grad_enabled():  # with gradients the operands are made anew in every call
            super()._keep(operands)


def _cut(layer: nn.Linear) -> str:
    """Which factor of an adapter is cut as the weight is: "up" by columns of Wᵀ, "down" by its rows."""
    return "up" if layer.weight.placements[0].dim == 0 else "down"


class _Summed(torch.autograd.Function):
    """The same tensor; its gradient is the sum over the processes.

    In every layer, and not once on v: what else has v in a loss has all of its gradient in every process already.
    """

    @staticmethod
    def forward(ctx, core, group):
        ctx.group = group
        return core.view_as(core)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)  # somebody else may hold it
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _style(linear: nn.Linear) -> dict | None:
    """What transformers' tensor parallelism has put in the place of a layer's forward is a closure: its variables."""
    forward = linear.__dict__.get("forward")
    if not inspect.isfunction(forward):
        return None
    found = inspect.getclosurevars(forward).nonlocals
    return found if hasattr(found.get("self"), "install_forward") else None
