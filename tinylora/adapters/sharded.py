"""Numbers that several processes hold in pieces: FSDP2's, tensor parallelism's, and those of DeepSpeed's ZeRO-3.

Whatever puts them together is done by all processes at once, or by none. The first two are DTensors; ZeRO-3's are
recognised by `ds_status`: outside of a forward such a parameter has no numbers and the shape (0,).
"""

import contextlib
import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def in_pieces(t: Tensor) -> bool:
    return is_dtensor(t) or of_zero3(t)


def is_dtensor(t: Tensor) -> bool:
    """Without importing what makes them."""
    return hasattr(t, "full_tensor")


def of_zero3(t: Tensor) -> bool:
    return hasattr(t, "ds_status")


def gathered(tensors: Iterable[Tensor]) -> contextlib.AbstractContextManager:
    """Within it ZeRO-3's parameters are whole on every process, to be read; others are as they are."""
    theirs = [t for t in tensors if of_zero3(t)]
    # Whoever has such a parameter has imported it.
    return sys.modules["deepspeed"].zero.GatheredParameters(theirs) if theirs else contextlib.nullcontext()


def whole(t: Tensor) -> Tensor:
    """The tensor, detached, on every process: put together if it is in pieces, and as it is if not."""
    if of_zero3(t):
        with gathered([t] if t.numel() < t.ds_numel else []):
            return t.detach().clone()
    return t.detach().full_tensor() if is_dtensor(t) else t.detach()


def shape_of(t: Tensor) -> tuple[int, ...]:
    """That of the whole tensor."""
    return tuple(t.ds_shape if of_zero3(t) else t.shape)


def sharded_as(p: Tensor, t: Tensor) -> Tensor:
    """t as `p` is: sharded over the processes if FSDP2 has sharded p, as it is if not."""
    if not is_dtensor(p):
        return t
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t.to(p.device), p.device_mesh, p.placements)


def stepped_elsewhere(p: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed's ZeRO (1 to 3) trains it: its optimizer steps copies, and never p itself."""
    return of_zero3(p) or hasattr(p, "_hp_mapping")
