"""Which path computes, and why: `route` is pure, so that tests and `tinylora info` can ask it."""

import contextlib
import os
from functools import cache
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from tinylora.kernels.tiles import MAX_RANK

# Triton's interface moves between minor versions; these two ends run in the tests.
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
KERNELS, TORCH = "kernels", "torch"
_COVERED = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1): the kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def triton_version() -> tuple[int, int] | None:
    """(major, minor) of the installed Triton, or None; without importing it."""
    if find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return tuple(int(part) for part in metadata.version(name).split(".")[:2])
    return None


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def route(
    device: str,
    dtype: torch.dtype,
    factors: tuple[torch.dtype, ...],
    r: int,
    capability: tuple[int, int] | None,
    interpret: bool,
    triton: tuple[int, int] | None,
) -> tuple[str, str]:
    """("kernels" or "torch", the reason) for operands of one call.

    device:     "cpu" or "cuda"
    dtype:      of x and weight
    factors:    of down, up and core
    capability: of the card, or None
    interpret:  whether TRITON_INTERPRET=1 stands in the environment
    triton:     the version of the installed Triton, or None
    """
    if triton is None:
        return TORCH, "Triton is not installed"
    if not OLDEST_TRITON <= triton <= NEWEST_TRITON:
        wanted = " to ".join(f"{major}.{minor}" for major, minor in (OLDEST_TRITON, NEWEST_TRITON))
        return TORCH, f"Triton {triton[0]}.{triton[1]} is installed: the kernels are proven with {wanted}"
    for t in (dtype, *factors):
        if t not in _COVERED:
            return TORCH, f"an operand is {t}: the kernels take {', '.join(map(str, _COVERED))}"
    if r > MAX_RANK:
        return TORCH, f"r = {r}: the kernels take r <= {MAX_RANK}"
    if interpret:
        if device == "cpu":
            return KERNELS, "TRITON_INTERPRET=1: Triton's interpreter runs the kernels on CPU tensors"
        return TORCH, f"TRITON_INTERPRET=1 and tensors on {device}: the interpreter runs on CPU tensors"
    if device != "cuda":
        return TORCH, f"tensors are on {device}: the kernels run on NVIDIA GPUs"
    if capability is None or capability < (8, 0):
        return TORCH, f"compute capability {capability}: the kernels need (8, 0) or newer"
    return KERNELS, f"compute capability {capability[0]}.{capability[1]}"


def route_of(x: Tensor, weight: Tensor, down: Tensor, core: Tensor | None, up: Tensor) -> tuple[str, str]:
    """`route` for these operands on this machine."""
    kind = weight.dtype, down.dtype, up.dtype, None if core is None else core.dtype, down.shape[0]
    # Off the CPU nothing changes from call to call: whether Triton interprets is decided when the kernels are imported.
    return (route_on if x.is_cpu else _route_once)(x.device, *kind)


def route_on(
    device: torch.device, dtype: torch.dtype, down: torch.dtype, up: torch.dtype, core: torch.dtype | None, r: int
) -> tuple[str, str]:
    """`route` for operands of these dtypes and this rank, on this device of this machine."""
    nvidia = device.type == "cuda" and torch.version.cuda is not None
    capability = capability_of(device) if nvidia else None
    factors = (down, up) if core is None else (down, up, core)
    return route(device.type, dtype, factors, r, capability, interpreting(), triton_version())


_route_once = cache(route_on)
