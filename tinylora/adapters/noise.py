"""Random numbers that everybody rebuilds: 13 numbers are an adapter only if their frozen P is the same everywhere."""

import hashlib

import numpy as np
import torch
from torch import Tensor


def normal(seed: int, key: str, *shape: int) -> Tensor:
    """Standard normal fp32 numbers that depend on (seed, key, shape) alone, on the CPU.

    Philox counts through its raw 64-bit words, whose values numpy guarantees, and Box and Muller's formula makes
    them normal in fp64: no version of torch or numpy, no order of calls and no other key changes a number.
    """
    count = int(np.prod(shape))
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(2 * count)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # inside (0, 1): no log of zero
    radius, turn = uniform[:count], uniform[count:]
    values = np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * turn)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)
