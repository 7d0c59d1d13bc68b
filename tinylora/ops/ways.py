"""What was found once about operands of one kind, and made ready to launch: kept by all that it depends on."""

from collections.abc import Callable

import torch
from torch import Tensor

from tinylora.kernels.core import Core
from tinylora.ops.dispatch import capability_of, interpreting

# A model asks the same few questions at every call, unless it sees ever new numbers of rows.
MOST = 4096
known: dict[tuple, Callable] = {}


def remembers(device: torch.device) -> bool:
    """On a card. On a CPU the interpreter takes seconds anyway, and tests put other tiles into it."""
    return device.type == "cuda"


def remembered(key: tuple, device: torch.device, make: Callable[[], Callable]) -> Callable:
    """The way of this kind, from `make`, as there is none yet."""
    way = make()
    if remembers(device):
        if len(known) >= MOST:
            known.clear()
        known[key] = way
    return way


def kind(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def kind_of_core(core: Core) -> tuple:
    """Its strides are none of it: the kernels get it contiguous."""
    values, basis, ids, transposed = core
    return (
        None if values is None else (values.shape, values.dtype, values.device),
        None if basis is None else (basis.shape, basis.dtype, basis.device),
        None if ids is None else (ids.dtype, ids.device),
        transposed,
    )


def kernel_capability(device: torch.device) -> tuple[int, int] | None:
    """The card's, or None in the interpreter, whose tensors are a CPU's: others need not read the environment."""
    return None if device.type == "cpu" and interpreting() else capability_of(device)


# Since torch 2.9 torch.get_float32_matmul_precision() is an error where somebody has set it by the newer names, as
# transformers' tf32=True and torch_compile=True do (torch.backends.fp32_precision).
_of_backend = getattr(torch._C, "_get_fp32_precision_getter", None)


def fp32_setting() -> str:
    """How torch multiplies fp32 numbers on a card: "tf32", or something that stands for in full."""
    if _of_backend is None:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return _of_backend("cuda", "matmul")


def precision() -> str:
    """How fp32 operands are multiplied: as torch's own matmul setting allows, and never below tf32x3."""
    return "tf32x3" if fp32_setting() == "tf32" else "ieee"
