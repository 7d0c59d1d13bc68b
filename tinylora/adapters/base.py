"""What every adapter is: a config that says which numbers exist, and a module that gives (down, core, up)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Site(NamedTuple):
    """One linear layer to adapt: its name within the model and its weight's shape, [N, K]."""

    name: str
    N: int
    K: int

    @property
    def type(self) -> str:
        """The module type in the papers' sense: q_proj, down_proj, ..."""
        return self.name.rpartition(".")[2]


class Factors(NamedTuple):
    """What `adapted_linear` takes of an adapter: the correction is ((x Dᵀ) Cᵀ) Uᵀ, C = core or Σᵢ coreᵢ basisᵢ."""

    down: Tensor
    core: Tensor | None
    up: Tensor
    basis: Tensor | None = None

    def delta(self) -> Tensor:
        """U C D, [N, K], in fp32 (fp64 if a factor is): what merging adds to the weight."""
        dtype = torch.promote_types(torch.float32, self.up.dtype)
        core = self.core
        if self.basis is not None:
            core = torch.einsum("u,uij->ij", core.to(dtype), self.basis.to(dtype))
        up = self.up.to(dtype) if core is None else self.up.to(dtype) @ core.to(dtype)
        return up @ self.down.to(dtype)


class KeepsFp32(nn.Module):
    """A module whose own parameters and `fp32_buffers` stay fp32 when a model is cast to bf16 or fp16.

    Thirteen numbers in bf16 cost nothing less and stop moving: a step of 1e-4 is lost beside a value of 0.1.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn, recurse=True):
        own = [*self._parameters.values(), *(p.grad for p in self._parameters.values() if p is not None)]
        kept = {id(t) for t in [*own, *(self._buffers.get(n) for n in self.fp32_buffers)]}

        def keep(t):
            moved = fn(t)
            narrowed = id(t) in kept and moved.dtype in (torch.bfloat16, torch.float16)
            return t.to(moved.device) if narrowed else moved

        return super()._apply(keep, recurse)


class Shared(KeepsFp32):
    """The trained numbers of one adapter that belong to no single layer, owned once, by the model's root.

    The layers hold an unregistered reference: state_dict then shows each number once, DDP and per-layer FSDP2
    get its gradient right (registered per layer, FSDP2 crashes), and `.to` finds it.
    """

    def __init__(self, config: "AdapterConfig", sites: Sequence[Site], fingerprint: str):
        super().__init__()
        self.config, self.sites, self.fingerprint = config, tuple(sites), fingerprint
        for name, shape in config.shared_shapes(sites).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{n}={tuple(p.shape)}" for n, p in self.named_parameters())
        return f"{self.config}, {len(self.sites)} modules" + (f", {shapes}" if shapes else "")


class Adapter(KeepsFp32):
    """One adapter in one layer. Frozen tensors are non-persistent buffers, trained ones parameters or `shared`'s."""

    def __init__(self, frozen: dict[str, Tensor], local_shapes: dict[str, tuple[int, ...]], shared: Shared):
        super().__init__()
        for name, t in frozen.items():
            self.register_buffer(name, t, persistent=False)
        for name, shape in local_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.__dict__["shared"] = shared  # past nn.Module's registration: see Shared

    def factors(self) -> Factors:
        raise NotImplementedError


@dataclass(frozen=True)
class AdapterConfig:
    """What all adapters' configs have. `target_modules`: None is every linear layer inside the transformer
    blocks; a list of names matches a module's full name or its last parts ("q_proj", "mlp.up_proj"); a string
    is a regular expression for the full name."""

    kind: ClassVar[str]
    _: dataclasses.KW_ONLY
    seed: int = 0
    target_modules: Sequence[str] | str | None = field(default=None)

    def __post_init__(self):
        _require(self, "seed", isinstance(self.seed, int) and self.seed >= 0, "an integer of 0 or more")
        targets = self.target_modules
        if targets is not None and not isinstance(targets, str):
            fits = all(isinstance(t, str) and t for t in targets) and len(targets) > 0
            _require(self, "target_modules", fits, "None, a regular expression, or names in a list")
            object.__setattr__(self, "target_modules", tuple(targets))

    def shared_shapes(self, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
        """Trained numbers that the model's root owns, by name."""
        return {}

    def local_shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Trained numbers of one layer alone, by name."""
        return {}

    def count(self, sites: Sequence[Site]) -> int:
        """How many numbers train, without building anything."""
        shapes = [*self.shared_shapes(sites).values()]
        shapes += [shape for site in sites for shape in self.local_shapes(site).values()]
        return sum(torch.Size(shape).numel() for shape in shapes)

    def frozen(self, site: Site, weight: Tensor, weight_digest: str) -> dict[str, Tensor]:
        """The frozen tensors of one layer, by name, computed from its weight, or found by `weight_digest`."""
        raise NotImplementedError

    def adapter(self, site: Site, frozen: dict[str, Tensor], shared: Shared) -> Adapter:
        """The module that puts this adapter into one layer."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `config_from_dict` reads it."""
        return {"kind": self.kind} | dataclasses.asdict(self)


def _require(config: AdapterConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)!r}, expected {expected}")
