"""LoRA-XS (arXiv 2405.17604) and TinyLoRA (arXiv 2602.04118): frozen factors from the weight's SVD, a trained core.

    LoRA-XS    W' = W + U Σ R Vᵀ                R [r, r] trained, one per layer
    TinyLoRA   W' = W + U Σ (Σᵢ vᵢ Pᵢ) Vᵀ        v [u] trained, shared by n_tie layers; P [u, r, r] frozen, random

`sigma` says where Σ goes: "left" is U Σ as in both papers, "right" is Σ Vᵀ as in LoRA-XS's own code, "split" is
√Σ on both sides as in PEFT. Adapters trained with one place mean something else with another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tinylora.adapters import noise
from tinylora.adapters.base import (
    STACKED,
    Adapter,
    AdapterConfig,
    Factors,
    Numbers,
    Shared,
    Site,
    as_tuple,
    require,
    require_whole,
)
from tinylora.adapters.factor_cache import cached_svd
from tinylora.adapters.tying import TYINGS, tie_groups

SIGMAS = ("left", "right", "split")


def svd_factors(site: Site, weight: Tensor, weight_digest: str, r: int, sigma: str) -> dict[str, Tensor]:
    """down [r, K] and up [N, r] in the weight's dtype, rounded once from fp32.

    Of the weight rounded to bf16, which is what a base model's fingerprint stands for: the factors of one checkpoint,
    loaded in fp32 here and in bf16 there, must be the same. Where two entries of a singular vector are nearly as large,
    rounding is enough to turn its sign, and with it what trained numbers mean.
    """
    U, S, Vh = cached_svd(weight.to(torch.bfloat16), r, site.name, weight_digest)
    left = {"left": S, "right": torch.ones_like(S), "split": S.sqrt()}[sigma]
    right = {"left": torch.ones_like(S), "right": S, "split": S.sqrt()}[sigma]
    dtype = weight.dtype
    return {"down": (right[:, None] * Vh).to(dtype), "up": (U * left).to(dtype)}


def require_rank(config: AdapterConfig, sites: Sequence[Site]) -> None:
    """ValueError, before the first decomposition, unless every layer has r singular vectors."""
    least = min(sites, key=lambda site: min(site.N, site.K))
    most = min(least.N, least.K)
    require(config, "r", config.r <= most, f"1 to {most}: {least.name} is {(least.N, least.K)} (N, K)")


class LoraXS(Adapter):
    core_alone_trains = True

    def factors(self) -> Factors:
        return Factors(self.down, self.core, self.up)

    def row_core(self) -> Tensor:
        return self._buffers[f"{STACKED}core"]


@dataclass(frozen=True)
class LoraXSConfig(AdapterConfig):
    """LoRA-XS: one r x r core R per layer, r² numbers. R starts at zero: the model starts as the base, exactly.

    r: rank of the frozen factors, 1 to min(N, K). sigma: "left", "right" or "split", see this module.
    ValueError on anything else.
    """

    kind: ClassVar[str] = "lora-xs"
    adapter_class: ClassVar[type[Adapter]] = LoraXS
    r: int = 2
    sigma: str = "left"

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r")
        require(self, "sigma", self.sigma in SIGMAS, f"one of {', '.join(SIGMAS)}")

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        require_rank(self, sites)
        return {}

    def local(self, site: Site) -> dict[str, Numbers]:
        return {"core": Numbers((self.r, self.r))}

    def frozen(self, site: Site, weight: Tensor, weight_digest: str) -> dict[str, Tensor]:
        return svd_factors(site, weight, weight_digest, self.r, self.sigma)


class TinyLoraShared(Shared):
    """It knows every layer's group: each layer finding out by itself would take the square of their number."""

    def __init__(self, config: "TinyLoraConfig", sites: Sequence[Site], fingerprint: str):
        super().__init__(config, sites, fingerprint)
        self.groups = dict(zip((site.name for site in sites), config.group_of(sites), strict=True))


class TinyLora(Adapter):
    core_alone_trains = True
    fp32_buffers = ("P",)

    def __init__(self, site: Site, frozen: Mapping[str, Tensor], shared: Shared):
        super().__init__(site, frozen, shared)
        self.group = shared.groups[site.name]

    @property
    def v(self) -> Tensor:
        """This layer's v, [u]: the parameter itself, which the root owns, looked up at every use."""
        own, name = self.shared._parameters, f"v_{self.group}"
        # By [], which ZeRO-3 puts the numbers together in; a parametrization's is an attribute alone.
        return own[name] if name in own else getattr(self.shared, name)

    def factors(self) -> Factors:
        frozen = self._buffers  # past nn.Module's __getattr__: this runs in every layer of every forward
        return Factors(frozen["down"], self.v, frozen["up"], frozen["P"])

    def row_core(self) -> Tensor:
        return self.shared._buffers[f"{STACKED}v_{self.group}"]

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"group={self.group}", super().extra_repr())))


@dataclass(frozen=True)
class TinyLoraConfig(AdapterConfig):
    """TinyLoRA: u · groups numbers for the whole model, as few as one. v starts at zero: the base, exactly.

    r:      rank of the frozen factors (the paper's main experiments: 2)
    u:      length of v
    n_tie:  how many modules share one v; 1 is none, the number of modules or more is all
    tying:  "tiled" (neighbours in depth; better in the paper) or "structured" (neighbours of one module type)
    sigma:  "left", "right" or "split", see this module
    groups: the group of every module, in order, for a tying that is neither: an adapter that came from elsewhere
    seed:   of P ~ N(0, 1/r), drawn for every module by its name (the paper states no distribution; this is PEFT's)

    The 13 parameters of the paper's title are r=2, u=1, n_tie=16 on Qwen2.5-7B's 196 modules.
    ValueError on anything else.
    """

    kind: ClassVar[str] = "tinylora"
    adapter_class: ClassVar[type[Adapter]] = TinyLora
    shared_class: ClassVar[type[Shared]] = TinyLoraShared
    r: int = 2
    u: int = 1
    n_tie: int = 1
    tying: str = "tiled"
    sigma: str = "left"
    groups: Sequence[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r", "u", "n_tie")
        if self.groups is not None:
            groups = as_tuple(self.groups)
            whole = groups is not None and all(type(g) is int for g in groups)
            whole = whole and set(groups) == set(range(len(set(groups))))
            require(self, "groups", whole, "integers from 0 on, without a gap")
            object.__setattr__(self, "groups", groups)
        require(self, "tying", self.tying in TYINGS, f"one of {', '.join(TYINGS)}")
        require(self, "sigma", self.sigma in SIGMAS, f"one of {', '.join(SIGMAS)}")

    def group_of(self, sites: Sequence[Site]) -> list[int]:
        """The group of every site: which v it uses. ValueError if `groups` is not as long as there are sites."""
        if self.groups is None:
            return tie_groups(sites, self.n_tie, self.tying)
        require(self, "groups", len(self.groups) == len(sites), f"one for each of the {len(sites)} modules")
        return list(self.groups)

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        require_rank(self, sites)
        # A parameter a group, not one for all: a view of one would cost its backward three launches a layer
        groups = sorted(set(self.group_of(sites)))
        return {f"v_{group}": Numbers((self.u,)) for group in groups}

    def frozen(self, site: Site, weight: Tensor, weight_digest: str) -> dict[str, Tensor]:
        P = noise.normal(self.seed, site.name, self.u, self.r, self.r) / self.r**0.5
        return svd_factors(site, weight, weight_digest, self.r, self.sigma) | {"P": P.to(weight.device)}
