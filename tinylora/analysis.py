"""What a training changed: how far the weights moved, in how many directions, what was learned and what forgotten.

The questions are those of "LoRA Learns Less and Forgets Less" (arXiv 2405.09673, section 4.6); they are asked of any
pair of models with the same module names, whether trained in full, with an adapter of ours, or merged.
"""

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinylora.generation import evaluating
from tinylora.nn.four_bit import dense_weight
from tinylora.nn.linear import Linear
from tinylora.nn.saved_module import SavedModule


@dataclass(frozen=True)
class Change:
    """How one weight of [N, K] moved: relative distance ‖ΔW‖ / ‖W‖ (Frobenius), and ΔW's effective rank."""

    name: str
    N: int
    K: int
    distance: float
    effective_rank: int


def effective_rank(delta: Tensor, energy: float = 0.9) -> int:
    """How many singular values of ΔW [N, K] hold `energy` of Σ σᵢ²; 0 for ΔW = 0.

    ValueError unless delta is a matrix and energy lies in (0, 1].
    """
    if delta.dim() != 2:
        raise ValueError(f"delta has shape {tuple(delta.shape)}, expected a matrix (N, K)")
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}, expected above 0 and at most 1")
    squares = torch.linalg.svdvals(delta.detach().double()).square()
    total = squares.sum()
    if total == 0:
        return 0
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.to(torch.int8).argmax()) + 1


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight that each linear layer multiplies by, in fp32, by module name: W, or W + U C D with an adapter."""
    found = {}
    with torch.no_grad():
        for name, module in _running(model, "", set()):
            if isinstance(module, nn.Linear):
                weight = dense_weight(module).float()
                if isinstance(module, Linear) and module.active is not None and module.merged is None:
                    weight = weight + module.delta()
                found[name] = weight
    return found


def _running(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, by the name that it has without adapters; of `modules_to_save` the copy that runs."""
    if isinstance(module, SavedModule):
        module = module.running
    if module not in seen:
        seen.add(module)
        yield name, module
        for own, child in module.named_children():
            yield from _running(child, f"{name}.{own}".lstrip("."), seen)


def changes(before: nn.Module, after: nn.Module, energy: float = 0.9) -> list[Change]:
    """How every linear layer moved from one model to the other, in depth order.

    ValueError if the two have other layers, or layers of other shapes.
    """
    old, new = effective_weights(before), effective_weights(after)
    if old.keys() != new.keys():
        odd = sorted(old.keys() ^ new.keys())
        raise ValueError(f"the models differ in their linear layers, expected the same names: {', '.join(odd[:5])}")
    found = []
    for name, weight in old.items():
        if weight.shape != new[name].shape:
            shapes = f"{tuple(weight.shape)} before and {tuple(new[name].shape)} after"
            raise ValueError(f"{name} has shape {shapes}, expected the same")
        delta = new[name].to(weight.device) - weight
        distance = (delta.norm() / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny)).item()
        found.append(Change(name, *weight.shape, distance, effective_rank(delta, energy)))
    return found


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The mean of `model(**batch).loss` over batches that it did not train on, in evaluation mode.

    ValueError if there are no batches, or the model gives no loss (batches need labels).
    """
    with evaluating(model):
        losses = [model(**batch).loss for batch in batches]
    if not losses or losses[0] is None:
        raise ValueError("no loss to take the mean of, expected at least one batch with labels")
    return math.fsum(loss.item() for loss in losses) / len(losses)


@dataclass(frozen=True)
class Comparison:
    """One training, seen from outside: losses before and after on what it trained for and on another domain."""

    name: str
    changes: list[Change]
    learned_before: float
    learned_after: float
    kept_before: float
    kept_after: float

    @property
    def learned(self) -> float:
        """By how much the loss on the training's own domain fell, in nats."""
        return self.learned_before - self.learned_after

    @property
    def forgotten(self) -> float:
        """By how much the loss on the other domain rose, in nats."""
        return self.kept_after - self.kept_before

    @property
    def median_rank(self) -> float:
        """The median effective rank of the layers that moved."""
        return statistics.median([c.effective_rank for c in self.changes if c.effective_rank] or [0])

    @property
    def distance(self) -> float:
        """‖ΔW‖ / ‖W‖, the root mean square over layers."""
        return math.sqrt(sum(c.distance**2 for c in self.changes) / len(self.changes))


def compare(
    name: str,
    before: nn.Module,
    after: nn.Module,
    learned: Iterable[Mapping[str, Tensor]],
    kept: Iterable[Mapping[str, Tensor]],
) -> Comparison:
    """Measure one training. `learned` are held-out batches of its own domain, `kept` of one it did not see."""
    learned, kept = list(learned), list(kept)
    losses = (held_out_loss(m, batches) for batches in (learned, kept) for m in (before, after))
    return Comparison(name, changes(before, after), *losses)


def plot(comparisons: Iterable[Comparison], path: str | os.PathLike) -> None:
    """Two panels: effective rank by layer, and learned against forgotten. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4))
    ranks, trade = figure.subplots(1, 2)
    for comparison in comparisons:
        moved = [c.effective_rank or math.nan for c in comparison.changes]  # a layer that stayed has no rank to show
        (line,) = ranks.plot(range(len(moved)), moved, marker=".", label=comparison.name)
        trade.plot(comparison.learned, comparison.forgotten, "o", color=line.get_color())
    ranks.set(xlabel="linear layer, in depth order", ylabel="effective rank of ΔW (90 % of its energy)", yscale="log")
    trade.set(xlabel="learned: fall of the new domain's loss (nats)", ylabel="forgotten: rise of the old one's (nats)")
    for axis in (ranks, trade):
        axis.grid(alpha=0.3)
    figure.legend(*ranks.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize="small")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=120)
