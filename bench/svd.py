"""`python -m bench svd`: what it takes to start TinyLoRA on one layer, and whether the factors span the right space."""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench import providers as who
from bench import shapes, timing
from bench.rows import Results, Row

SPECTRA = ("gaussian", "decaying")


def weight(spectrum: str, N: int, K: int, device: torch.device) -> Tensor:
    """[N, K]: gaussian entries (a freshly made model: hardly any gap between singular values), or decaying like i⁻⁰·⁶
    as trained weights do."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.empty(*shape, device=device).normal_(generator=g)

    if spectrum == "gaussian":
        return normal(N, K) * K**-0.5
    n = min(N, K)
    decay = torch.arange(1, n + 1, device=device) ** -0.6
    return (normal(N, n) * decay) @ normal(n, K) / math.sqrt(N * K)


def angle(span: Tensor, other: Tensor) -> float:
    """Degrees between the spaces that the columns of two [n, r] span: the largest principal angle.

    By its sine, ‖(I - QQᵀ) O‖₂ in fp64: a cosine near 1 would lose everything below 0.02 degrees.
    """
    Q, O = (torch.linalg.qr(t.double())[0] for t in (span, other))
    sine = torch.linalg.matrix_norm(O - Q @ (Q.T @ O), 2)
    return math.degrees(math.asin(min(1.0, sine.item())))


def run(
    results: Results,
    device: torch.device,
    model: str = "Qwen2.5-7B",
    r: int = 2,
    budget: float = math.inf,
    spectra: tuple[str, ...] = SPECTRA,
) -> None:
    """Rows of `svd`: seconds of both, and the angle of ours to PEFT's, which come from a full SVD.

    PEFT takes no part any more once half of `budget` seconds have passed.
    """
    started = time.perf_counter()
    layer = next(layer for layer in shapes.layers(model) if layer.projections[0] in ("q_proj", "query"))
    with tqdm(total=2 * len(spectra), desc="svd", unit="svd", dynamic_ncols=True) as bar:
        for spectrum in spectra:
            # A bf16 checkpoint's numbers, loaded in fp32: tinylora decomposes a weight rounded to bf16, PEFT as it is.
            W = weight(spectrum, layer.N, layer.K, device).bfloat16().float()

            def row(provider, spectrum=spectrum, **values):
                row = Row("svd", model, spectrum, provider, "startup", None, layer.N, layer.K, r, dtype="fp32")
                for name, value in values.items():
                    setattr(row, name, value)
                results.add(row)
                bar.update()

            bar.set_postfix_str(f"{spectrum}: tinylora")
            seconds, (down, up) = _ours(W, r, device)
            if time.perf_counter() - started > budget / 2:
                row(who.PEFT, note=f"not measured: half of the {budget:.0f} s for this were over")
                row(who.OURS, p50_ms=seconds * 1e3, rounds=1)
                continue
            bar.set_postfix_str(f"{spectrum}: PEFT, a full SVD")
            try:
                theirs, (their_down, their_up) = _peft(W, r, device)
            except ImportError as error:
                row(who.PEFT, note=f"not measured: {error}")
                row(who.OURS, p50_ms=seconds * 1e3, rounds=1)
                continue
            degrees = max(angle(their_down.T, down.T), angle(their_up, up))
            row(who.PEFT, p50_ms=theirs * 1e3, rounds=1)
            row(who.OURS, p50_ms=seconds * 1e3, angle_deg=degrees, rounds=1)


@contextlib.contextmanager
def no_cache() -> Iterator[None]:
    """tinylora finds no decomposition on disk, and keeps none: in here everything starts for the first time."""
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, XDG_CACHE_HOME=empty):
        yield


def _linear(W) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False)
    linear.weight = nn.Parameter(W, requires_grad=False)
    return linear


def _ours(W, r, device):
    """As with PEFT all that it takes to have the layer: the weight's digest, and the file, too."""
    import tinylora

    config = tinylora.TinyLoraConfig(r=r, u=1)
    with no_cache():
        small = _linear(W[: 8 * r, : 8 * r].contiguous())
        tinylora.Linear.from_linear(small, config)  # the libraries' own start-up is not the algorithm's
        linear, made = _linear(W), []
        seconds = timing.once(lambda: made.append(tinylora.Linear.from_linear(linear, config)), device)
    adapter = made[0].adapters["default"]
    return seconds, (adapter.down, adapter.up)


def _peft(W, r, device):
    import peft

    linear = _linear(W)
    config = peft.TinyLoraConfig(r=r, u=1, target_modules=["proj"])
    made = []
    seconds = timing.once(lambda: made.append(peft.get_peft_model(nn.ModuleDict({"proj": linear}), config)), device)
    layer = made[0].base_model.model["proj"]
    return seconds, (layer.tinylora_A["default"], layer.tinylora_B["default"])
