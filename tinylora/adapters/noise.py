"""Random numbers that everybody rebuilds: 13 numbers are an adapter only if their frozen P is the same everywhere."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def _units(seed: int, key: str, count: int) -> np.ndarray:
    """`count` fp64 numbers inside (0, 1): never 0, so that a logarithm exists. Philox counts, keyed by (seed, key)."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, key: str, *shape: int, std: float = 1.0) -> Tensor:
    """N(0, std²) in fp32, on the CPU; the numbers depend on (seed, key, shape) alone.

    They come from Philox's raw 64-bit words, whose values numpy guarantees, through Box and Muller's formula in fp64:
    no version of torch or numpy, no order of calls and no other key changes a number.
    """
    count = math.prod(shape)
    units = _units(seed, key, 2 * count)
    values = np.sqrt(-2.0 * np.log(units[:count])) * np.cos(2.0 * np.pi * units[count:])
    return torch.from_numpy((std * values).astype(np.float32)).reshape(shape)


def uniform(seed: int, key: str, bound: float, *shape: int) -> Tensor:
    """U(-bound, bound) in fp32, on the CPU, as reproducible as `normal`."""
    values = bound * (2.0 * _units(seed, key, math.prod(shape)) - 1.0)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)
