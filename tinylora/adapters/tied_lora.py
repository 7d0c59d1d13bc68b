"""Tied-LoRA (arXiv 2311.09578): LoRA whose factors are shared by all layers, with two scaling vectors a layer.

    W' = W + diag(v) B diag(u) A        A = down [r, K], B = up [N, r]; u [r], v [N]

Each of A and B is tied across layers or not, and each of A, B, u, v is trained or frozen. The paper adapts a fused
q,k,v projection with one A and one u a layer; for models that keep the three apart, `fused` names the projections
that share them, so that the counts are the paper's: 4 d r numbers for a tied pair on d x d projections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from tinylora.adapters import noise
from tinylora.adapters.base import Adapter, AdapterConfig, Factors, Numbers, Site, as_tuple, require, require_whole
from tinylora.adapters.vera import kaiming

PARTS = ("down", "up", "u", "v")

# The paper's names, as far as their definitions are public. TL6 is "vBuA", everything trained; in TL5 u and v stay 1.
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "LoRA": {"tied": (), "trained": ("down", "up")},
    "TL5": {"tied": ("down", "up"), "trained": ("down", "up")},
    "TL6": {"tied": ("down", "up"), "trained": PARTS},
    "vBuA": {"tied": ("down", "up"), "trained": PARTS},
    "VeRA": {"tied": ("down", "up"), "trained": ("u", "v")},
}


class TiedLora(Adapter):
    def __init__(self, site, frozen, shared):
        super().__init__(site, frozen, shared)
        self.places = shared.config.places(shared.sites)[site]

    def factors(self) -> Factors:
        down, up, u, v = (getattr(self.shared, place) if place else None for place in self.places)
        return Factors(down, u, up if v is None else v[:, None] * up)


@dataclass(frozen=True)
class TiedLoraConfig(AdapterConfig):
    """Tied-LoRA: any combination of tied and trained parts; `TiedLoraConfig.preset("vBuA", r=8)` for the paper's.

    r:       rank
    tied:    which of "down" and "up" all layers share (by module type and shape; the others are a layer's own)
    trained: which of "down", "up", "u", "v" train; a frozen u or v is 1 and costs nothing
    fused:   groups of projections that read the same input and share `down` and u, within a layer

    The update starts at zero, hence the model as the base, exactly: the first of up, v, u, down that trains starts
    at zero, what else trains or is frozen as in LoRA and VeRA (random down and up, u = v = 1).
    ValueError on anything else.
    """

    kind: ClassVar[str] = "tied-lora"
    adapter_class: ClassVar[type[Adapter]] = TiedLora
    r: int = 8
    tied: Sequence[str] = ("down", "up")
    trained: Sequence[str] = PARTS
    fused: Sequence[Sequence[str]] = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r")
        for name, allowed, least in (("tied", PARTS[:2], 0), ("trained", PARTS, 1)):
            parts = as_tuple(getattr(self, name))
            fits = parts is not None and all(p in allowed for p in parts) and len(parts) >= least
            require(self, name, fits, f"{'some' if least else 'any'} of {', '.join(allowed)}")
            object.__setattr__(self, name, tuple(p for p in allowed if p in parts))
        groups = as_tuple(self.fused)
        groups = None if groups is None else tuple(map(as_tuple, groups))
        fits = groups is not None and None not in groups and all(isinstance(n, str) for g in groups for n in g)
        require(self, "fused", fits, "groups of names, each a list")
        object.__setattr__(self, "fused", groups)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "TiedLoraConfig":
        """A configuration by the paper's name: LoRA, TL5, TL6, vBuA, and VeRA for its relative."""
        if name not in PRESETS:
            raise ValueError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name] | changes)

    def _family(self, site: Site) -> str:
        """The site's type, with the projections of a fused group under one name."""
        parent, _, last = site.type.rpartition(".")
        group = next((g for g in self.fused if last in g), (last,))
        return f"{parent}.{'+'.join(group)}"

    def _keys(self, site: Site) -> tuple[str, str, str, str]:
        """Which down, up, u and v a site uses: equal strings, same tensor."""
        block = ".".join(part for part in site.name.split(".") if part.isdecimal())
        down = f"down {self._family(site)} {site.K}"
        up = f"up {site.type} {site.N}"
        return (
            down if "down" in self.tied else f"{down} {block}",
            up if "up" in self.tied else f"{up} {site.name}",
            f"u {self._family(site)} {site.K} {block}",
            f"v {site.name}",
        )

    def places(self, sites: Sequence[Site]) -> dict[Site, tuple[str | None, ...]]:
        """For every site the names of its down, up, u and v among the shared numbers; None for a u or v of ones."""
        numbers: dict[str, dict[str, int]] = {part: {} for part in PARTS}
        found = {}
        for site in sites:
            names = []
            for part, key in zip(PARTS, self._keys(site), strict=True):
                if part in ("u", "v") and part not in self.trained:
                    names.append(None)
                else:
                    names.append(f"{part}_{numbers[part].setdefault(key, len(numbers[part]))}")
            found[site] = tuple(names)
        return found

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        zero = next(part for part in ("up", "v", "u", "down") if part in self.trained)
        numbers: dict[str, Numbers] = {}
        for site, names in self.places(sites).items():
            for part, name in zip(PARTS, names, strict=True):
                if name is not None and name not in numbers:
                    numbers[name] = self._start(part, name, site, part == zero)
        return numbers

    def _start(self, part: str, name: str, site: Site, zero: bool) -> Numbers:
        shape = {"down": (self.r, site.K), "up": (site.N, self.r), "u": (self.r,), "v": (site.N,)}[part]
        trains = part in self.trained
        if zero:
            return Numbers(shape)
        if part in ("u", "v"):
            return Numbers(shape, 1.0, trains)
        if part == "up" or not trains:
            return kaiming(self.seed, f"tied-lora.{name}", *shape, trains=trains)
        return Numbers(shape, partial(noise.uniform, self.seed, f"tied-lora.{name}", site.K**-0.5), trains)
