"""Counters that are zero before and after every launch."""

import torch
from torch import Tensor

_eager: dict[tuple[torch.device, int], Tensor] = {}
_captured: dict[torch.device, tuple[Tensor, int]] = {}

# Zeros set aside for captured launches: at up to a few hundred each, enough for thousands of linear layers.
CAPTURED = 1 << 20


def counters(n: int, device: torch.device) -> Tensor:
    """n int32 zeros for a launch that leaves them zero (`last_to_arrive`).

    Launches on one stream run one after the other and share one buffer. A captured launch gets counters of its
    own, set aside before the capture, since its graph may be replayed beside anything.
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
        start = used if used + n <= len(buffer) else 0
        _captured[device] = buffer, start + n
        return buffer[start : start + n]
    if device not in _captured:
        _captured[device] = torch.zeros(CAPTURED, dtype=torch.int32, device=device), 0
        torch.cuda.current_stream(device).synchronize()  # zero before any other stream's graph may use it
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _eager or len(_eager[key]) < n:
        _eager[key] = torch.zeros(max(n, 1 << 14), dtype=torch.int32, device=device)
    return _eager[key]
