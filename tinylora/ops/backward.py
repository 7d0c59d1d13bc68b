"""How an autograd node of ours runs backward: once, and outside autocast."""

from collections.abc import Callable

import torch

_TWICE = (
    "tinylora: the gradient of a gradient is not implemented (create_graph=True: gradient penalties, MAML, "
    "torch.autograd.functional's hvp and jvp): torch.func's transforms can, uncompiled, and PEFT's layers after "
    "unpatch_peft()"
)


def refuse_second_order() -> None:
    """RuntimeError in a backward that is itself differentiated.

    At once: an error that waits behind the gradients is met by backward() alone. torch.autograd.grad runs the nodes
    that lead to what it is asked for, and from our gradients none leads on to what was saved.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(_TWICE)


def first_order(gradients: Callable) -> staticmethod:
    """The `backward` of a torch.autograd.Function from its gradients, a function of (ctx, dY, ..).

    The gradient of the gradient is refused, and autocast around a backward changes nothing. Both are asked for here,
    which spares the usual backward the ten microseconds of entering no_grad and autocast.
    """

    def backward(ctx, *dys):
        refuse_second_order()
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(dys[0].device.type, enabled=False):
                return gradients(ctx, *dys)
        return gradients(ctx, *dys)

    return staticmethod(backward)
