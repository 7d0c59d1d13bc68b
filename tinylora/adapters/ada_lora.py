"""AdaLoRA (arXiv 2303.10512): an SVD-shaped update whose singular values are pruned by importance while it trains.

    W' = W + s · P diag(λ) Q            P = up [N, r], Q = down [r, K], λ [r]; s = alpha / r

What a training loop would have to remember happens by itself, around every step of any optimiser that holds an
adapter's parameters: before the step the gradient of γ (‖PᵀP - I‖² + ‖QQᵀ - I‖²) is added to those of P and Q, after
it the importance scores are updated and the budget is allocated (section 3 and algorithm 1 of the paper).
"""

import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, FrameType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tinylora.adapters import noise
from tinylora.adapters.base import (
    Adapter,
    AdapterConfig,
    Factors,
    Numbers,
    Shared,
    Site,
    require,
    require_number,
    require_whole,
)
from tinylora.adapters.sharded import is_dtensor, stepped_elsewhere


class AdaLora(Adapter):
    def __init__(self, site, frozen, shared):
        super().__init__(site, frozen, shared)
        # Ī and Ū of every number. They forget within tens of steps, and are not worth three times the file.
        for name, p in self.named_parameters():
            self.register_buffer(f"smoothed_{name}", torch.zeros_like(p), persistent=False)
            self.register_buffer(f"uncertain_{name}", torch.zeros_like(p), persistent=False)

    @property
    def fp32_buffers(self) -> tuple[str, ...]:
        return tuple(self._buffers)

    def factors(self) -> Factors:
        return Factors(self.down, self.shared.config.scale * self.lam, self.up)

    @torch.no_grad()
    def add_orthogonality(self, gamma: float, stepping: frozenset[int]) -> None:
        """Add d/dP γ ‖PᵀP - I‖² = 4 γ P (PᵀP - I), and Q's, to the gradients of those that step."""
        eye = torch.eye(self.lam.numel(), dtype=self.lam.dtype, device=self.lam.device)
        if self.up.grad is not None and id(self.up) in stepping:
            self.up.grad.add_(self.up @ (self.up.T @ self.up - eye), alpha=4 * gamma)
        if self.down.grad is not None and id(self.down) in stepping:
            self.down.grad.add_((self.down @ self.down.T - eye) @ self.down, alpha=4 * gamma)

    @torch.no_grad()
    def score(self, beta1: float, beta2: float) -> Tensor:
        """Update Ī and Ū with I = |w · dL/dw|, and return the triplets' importance S [r], equation 8."""
        scores = {}
        for name, p in self.named_parameters():
            smoothed, uncertain = getattr(self, f"smoothed_{name}"), getattr(self, f"uncertain_{name}")
            if p.grad is not None:
                importance = (p * p.grad).abs()
                smoothed.lerp_(importance, 1 - beta1)
                uncertain.lerp_((importance - smoothed).abs(), 1 - beta2)
            scores[name] = smoothed * uncertain
        return scores["lam"] + scores["up"].mean(0) + scores["down"].mean(1)


class AdaLoraShared(Shared):
    """The allocator: it knows all layers of one adapter, and how many steps have gone by."""

    fp32_buffers = ("steps",)

    def __init__(self, config: "AdaLoraConfig", sites: Sequence[Site], fingerprint: str):
        super().__init__(config, sites, fingerprint)
        self._stepped: list[frozenset[int]] = []  # the λ of every optimizer that has stepped some, the last one last
        _watch(self)

    def __setstate__(self, state):  # copies and unpickled ones are watched, too
        super().__setstate__(state)
        self._stepped = []
        _watch(self)

    def before_step(self, stepping: frozenset[int], loss_scale: float) -> None:
        adapters = list(self.layers.values())  # another thread may be adding its own
        if any(a.lam.requires_grad and stepped_elsewhere(a.lam) for a in adapters):
            raise ValueError("AdaLoRA acts when an optimizer steps λ, and DeepSpeed steps copies: expected DDP")
        for adapter in adapters:
            if is_dtensor(adapter.lam) and id(adapter.lam) in stepping:
                raise ValueError("AdaLoRA ranks the triplets of whole layers, expected no sharding (FSDP2): DDP works")
        self._refuse_several(stepping)
        for adapter in adapters:
            if adapter.lam.requires_grad:
                adapter.add_orthogonality(self.config.orthogonality * loss_scale, stepping)

    def _refuse_several(self, stepping: frozenset[int]) -> None:
        """ValueError where optimizers with different λ take turns: one step of all would count as several, and the
        budget be shared out among a few layers at a time. Another optimizer from some step on is none of that, nor one
        with more layers, or fewer.
        """
        own = frozenset(id(a.lam) for a in list(self.layers.values()) if id(a.lam) in stepping)
        if own and own not in self._stepped[-1:]:
            if own in self._stepped and not (own < self._stepped[-1] or own > self._stepped[-1]):
                raise ValueError(
                    f"{len(self._stepped)} optimizers take turns in stepping AdaLoRA's λ, expected one that has those "
                    "of all layers: it ranks the triplets of the whole model in every step"
                )
            self._stepped.append(own)

    @torch.no_grad()
    def after_step(self, stepping: frozenset[int]) -> None:
        """Score, and on the schedule keep the budget's most important λ of the whole model and zero the rest."""
        adapters = [a for a in list(self.layers.values()) if id(a.lam) in stepping and a.lam.requires_grad]
        if not adapters:
            return
        config = self.config
        self.steps += 1
        step, last = int(self.steps), config.total_steps - config.final_steps
        scores = [adapter.score(config.beta1, config.beta2) for adapter in adapters]
        if step == last or (config.warmup_steps < step < last and step % config.interval == 0):
            every = torch.cat([s.to(scores[0].device) for s in scores])
            best = every.topk(round(config.budget(step) * len(adapters))).indices
            kept = torch.zeros_like(every).index_fill_(0, best, 1)
            for adapter, mask in zip(adapters, kept.split(config.r), strict=True):
                adapter.kept.copy_(mask)
                adapter.lam.mul_(adapter.kept)
        elif step > last:  # the last allocation stands; before it a pruned triplet may grow back
            for adapter in adapters:
                adapter.lam.mul_(adapter.kept)


@dataclass(frozen=True)
class AdaLoraConfig(AdapterConfig):
    """AdaLoRA: r (N + K + 1) numbers a layer, of which target_r triplets a layer remain on average.

    λ starts at zero: the base, exactly; P and Q at N(0, 0.02²).

    r, target_r:   triplets a layer at the start and in the end (the paper: 1.5 times as many at the start)
    alpha:         the update is scaled by alpha / r
    total_steps:   optimiser steps of the whole training: the budget falls from r to target_r along a cubic
    warmup_steps:  steps at the full budget in the beginning, final_steps: at the target in the end, fixed
    interval:      steps between allocations
    beta1, beta2:  of the importance's and its uncertainty's moving averages
    orthogonality: γ; 0.1, 0.3 or 0.5 in the paper

    Nothing is to be called: an optimiser's step does it, Trainer's included. ValueError on other values; in a step,
    where λ is sharded (FSDP2) or stepped elsewhere (DeepSpeed), or where several optimizers take turns.
    """

    kind: ClassVar[str] = "adalora"
    adapter_class: ClassVar[type[Adapter]] = AdaLora
    shared_class: ClassVar[type[Shared]] = AdaLoraShared
    total_steps: int
    r: int = 12
    target_r: int = 8
    alpha: float = 12.0
    warmup_steps: int = 0
    final_steps: int = 0
    interval: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r", "target_r", "interval", "total_steps")
        require_whole(self, "warmup_steps", "final_steps", least=0)
        require(self, "target_r", self.target_r <= self.r, f"at most r, {self.r}")
        room = self.warmup_steps + self.final_steps < self.total_steps
        require(self, "total_steps", room, "more than warmup_steps and final_steps together")
        require_number(self, "alpha", above=0)
        require_number(self, "orthogonality", least=0)
        require_number(self, "beta1", "beta2", above=0, below=1)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def budget(self, step: int) -> float:
        """Triplets a layer, on average, after `step` steps: equation 12."""
        falling = self.total_steps - self.warmup_steps - self.final_steps
        done = min(max((step - self.warmup_steps) / falling, 0.0), 1.0)
        return self.target_r + (self.r - self.target_r) * (1 - done) ** 3

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        return {"steps": Numbers((), trains=False, saved=True)}

    def local(self, site: Site) -> dict[str, Numbers]:
        def start(part):
            return partial(noise.normal, self.seed, f"{site.name}.{part}", std=0.02)

        return {
            "down": Numbers((self.r, site.K), start("down")),
            "lam": Numbers((self.r,)),
            "up": Numbers((site.N, self.r), start("up")),
            "kept": Numbers((self.r,), 1.0, trains=False, saved=True),  # 0 where the last allocation pruned λ
        }


# One pair of hooks for the process, on every optimiser's step; the allocators are found by the parameters they watch.
# References, not a WeakSet: going through one fails where another thread adds to it.
_watched: set[weakref.ref[AdaLoraShared]] = set()
_hooks: list = []


def _watch(shared: AdaLoraShared) -> None:
    _watched.add(weakref.ref(shared, _watched.discard))
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before))
        _hooks.append(register_optimizer_step_post_hook(_after))


def _watching() -> list[AdaLoraShared]:
    return [shared for ref in _watched.copy() if (shared := ref()) is not None]


class _Step(NamedTuple):
    """An optimizer's step that is under way: the call, by its frame's id and code, as the frame itself would keep all
    callers' locals; the ids of what it steps; whether it is a part of another's."""

    call: tuple[int, CodeType]
    stepping: frozenset[int]
    within: bool


class _UnderWay(threading.local):
    """The steps of a thread, the outermost first. An optimizer may step another one within its own: of the same
    parameters (ZeroRedundancyOptimizer, Lookahead) the two are one step, of others each is one."""

    def __init__(self):
        self.steps: list[_Step] = []


_under_way = _UnderWay()


def _before(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not _watched:
        return None
    call, steps = sys._getframe(1), _under_way.steps
    while steps and not _called_from(steps[-1].call, call):
        steps.pop()  # an error ended it
    stepping = frozenset(id(p) for group in optimizer.param_groups for p in group["params"])
    steps.append(_Step((id(call), call.f_code), stepping, any(stepping <= outer.stepping for outer in steps)))
    if steps[-1].within:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        _penalise(optimizer, stepping)
        return None

    def penalised():  # it makes the gradients, once or several times
        loss = closure()
        _penalise(optimizer, stepping)
        return loss

    if "closure" in kwargs:
        return args, kwargs | {"closure": penalised}
    return (args[0], penalised, *args[2:]), kwargs


def _called_from(outer: tuple[int, CodeType], call: FrameType) -> bool:
    frame = call.f_back
    while frame is not None and (id(frame), frame.f_code) != outer:
        frame = frame.f_back
    return frame is not None


def _penalise(optimizer: torch.optim.Optimizer, stepping: frozenset[int]) -> None:
    if not _skips(optimizer):
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under GradScaler undoes it in its step
        for shared in _watching():
            shared.before_step(stepping, 1.0 if scale is None else scale.item())


def _after(optimizer: torch.optim.Optimizer, *_) -> None:
    call, steps = sys._getframe(1), _under_way.steps
    while steps:
        step = steps.pop()
        if step.call == (id(call), call.f_code):
            if not step.within and not _skips(optimizer):
                for shared in _watching():
                    shared.after_step(step.stepping)
            return


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer under torch.amp.GradScaler skips this step, for a gradient that is inf."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())
