"""What a launch needs beside its operands and results: fp32 planes, and counters that are zero before and after.

Launches on one stream run one after the other, and nothing here outlives a launch, so all eager ones of a stream share
one buffer: no call allocates it. A captured launch has its own, in the graph's memory, since its graph may be replayed
beside anything.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
import triton
from torch import Tensor

# fp32 numbers (16 MiB) that a stream keeps at most; the default's tiles want less. More is allocated for the launch.
KEPT = 1 << 22
# Zeros set aside for captured launches: at up to a few hundred each, enough for thousands of linear layers.
CAPTURED = 1 << 20
# How many ways to cut its planes a stream remembers: one for each number of rows and shape.
VIEWS = 1024

_planes: dict[tuple[torch.device, int], Tensor] = {}
_counters: dict[tuple[torch.device, int], Tensor] = {}
_views: dict[tuple[torch.device, int], dict[tuple, tuple[Tensor, ...]]] = {}
_captured: dict[torch.device, tuple[Tensor, int]] = {}


def kept_by_stream(device: torch.device) -> bool:
    """Whether a launch on the current stream may use what its stream keeps."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def workspace(device: torch.device, sizes: tuple[int, ...], n: int) -> tuple[Tensor, ...]:
    """fp32 tensors of these sizes that hold anything, then n counters if n is not 0, for one launch."""
    if not kept_by_stream(device):
        planes = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
        return (*planes, counters(n, device)) if n else tuple(planes)
    stream = device, triton.runtime.driver.active.get_current_stream(device.index)
    views = _views.get(stream)
    if views is not None:
        found = views.get((sizes, n))
        if found is not None:
            return found
    starts = [0, *accumulate(-(-size // 4) * 4 for size in sizes)]  # each at a whole multiple of 16 bytes
    total = starts.pop()
    if total > KEPT:
        buffer = torch.empty(total, dtype=torch.float32, device=device)
    elif stream in _planes and len(_planes[stream]) >= total:
        buffer = _planes[stream]
    else:
        views = None  # its entries would keep the smaller buffer alive
        buffer = _to_keep(lambda: torch.empty(max(total, 1 << 16), dtype=torch.float32, device=device))
        _planes[stream] = buffer
    found = tuple(buffer[start : start + size] for start, size in zip(starts, sizes, strict=True))
    if n:
        found = (*found, counters(n, device))
    if total <= KEPT:
        if views is None or len(views) >= VIEWS:
            views = _views[stream] = {}
        views[sizes, n] = found
    return found


def counters(n: int, device: torch.device) -> Tensor:
    """n int32 zeros for a launch that leaves them zero (`last_to_arrive`).

    Launches on one stream share one buffer. A captured launch gets counters of its own, set aside before the capture:
    they must be zeroed outside the graph.
    """
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        if device not in _captured:
            raise RuntimeError(
                "the first call on this device came inside a CUDA graph capture, expected one call before it: "
                "the graph's counters must be zeroed outside the graph"
            )
        buffer, used = _captured[device]
        if n > len(buffer):
            raise RuntimeError(f"a captured launch wants {n} counters, expected at most {len(buffer)}: fewer adapters")
        start = used if used + n <= len(buffer) else 0
        # At whole 16 bytes, as every other pointer: Triton compiles another kernel for one that does not lie so, and
        # that would be now, within the capture.
        _captured[device] = buffer, start + -(-n // 4) * 4
        return buffer[start : start + n]
    if device not in _captured:
        _captured[device] = _to_keep(lambda: torch.zeros(CAPTURED, dtype=torch.int32, device=device)), 0
        torch.cuda.current_stream(device).synchronize()  # zero before any other stream's graph may use it
    stream = device, triton.runtime.driver.active.get_current_stream(device.index)
    if stream not in _counters or len(_counters[stream]) < n:
        _counters[stream] = _to_keep(lambda: torch.zeros(max(n, 1 << 14), dtype=torch.int32, device=device))
    return _counters[stream]


def _to_keep(make: Callable[[], Tensor]) -> Tensor:
    """A tensor from `make` on the current stream, in memory that is nobody's pool.

    torch.cuda.use_mem_pool, and torch.compile's CUDA graphs while they warm up, lead all that a thread allocates into a
    pool, which may be emptied under us; so another thread allocates.
    """
    stream = torch.cuda.current_stream()

    def allocate():
        with torch.cuda.stream(stream):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
