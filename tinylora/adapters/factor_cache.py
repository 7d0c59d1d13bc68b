"""Singular value decompositions kept on disk, found by what is in the weight and not by what it is called."""

import contextlib
import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tinylora.adapters.files import write_whole
from tinylora.adapters.svd import truncated_svd

VERSION = 1  # raised when truncated_svd would give other factors for the same weight


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight's shape, dtype and bytes, in hexadecimal."""
    sha = hashlib.sha256(f"{tuple(weight.shape)} {weight.dtype}".encode())
    for rows in weight.detach().split(max(1, (1 << 24) // max(1, weight[0].numel()))):
        sha.update(memoryview(rows.contiguous().cpu().view(torch.uint8).numpy()).cast("B"))
    return sha.hexdigest()


def cache_folder() -> Path:
    """Where decompositions are kept: tinylora/ in the user's cache (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinylora"


def cached_svd(weight: Tensor, r: int, name: str, weight_digest: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`truncated_svd(weight, r)`, read from disk when these very bytes (`digest(weight)`) were decomposed before.

    A file that cannot be read, or does not fit, is computed anew; a folder that cannot be written is no error.
    """
    try:
        folder = cache_folder()
    except RuntimeError:  # no home, as in containers whose user has no name
        return truncated_svd(weight, r, name)
    path = folder / f"svd-{VERSION}-r{r}-{weight_digest or digest(weight)}.safetensors"
    shapes = {"U": (weight.shape[0], r), "S": (r,), "Vh": (r, weight.shape[1])}
    with contextlib.suppress(OSError, SafetensorError):
        kept = load_file(path)
        if {k: tuple(t.shape) for k, t in kept.items()} == shapes:
            U, S, Vh = (kept[k].to(weight.device) for k in shapes)
            if torch.dist(weight.detach().float() @ Vh.T, U * S) <= 1e-3 * S[0]:  # a file can rot
                return U, S, Vh
    U, S, Vh = truncated_svd(weight, r, name)
    with contextlib.suppress(OSError, SafetensorError):
        write_whole(path, lambda scratch: save_file({"U": U.cpu(), "S": S.cpu(), "Vh": Vh.cpu()}, scratch))
    return U, S, Vh
