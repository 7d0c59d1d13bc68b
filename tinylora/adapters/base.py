"""What every adapter is: a config that says which numbers exist, and a module that gives (down, core, up)."""

import contextlib
import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tinylora.adapters.sharded import in_pieces
from tinylora.ops import flops
from tinylora.ops.eager import mix, rank_dtype


class Site(NamedTuple):
    """One linear layer to adapt: its name within the model and its weight's shape, [N, K]."""

    name: str
    N: int
    K: int

    @property
    def type(self) -> str:
        """The module type in the papers' sense (q_proj, down_proj): the name without the numbers of blocks."""
        return ".".join(part for part in self.name.split(".") if not part.isdecimal())


# Where a module keeps A values of one of its numbers, [A, ...], for a batch whose rows use different adapters.
STACKED = "stacked_"


class Factors(NamedTuple):
    """What `adapted_linear` takes of an adapter: the correction is ((x Dᵀ) Cᵀ) Uᵀ, where C is core, or the diagonal
    matrix of it, or Σᵢ coreᵢ basisᵢ."""

    down: Tensor
    core: Tensor | None
    up: Tensor
    basis: Tensor | None = None

    def delta(self) -> Tensor:
        """U C D, [N, K], in fp32 (fp64 if a factor is): what merging adds to the weight."""
        dtype = rank_dtype(*self)
        return self.up_core(dtype) @ self.down.to(dtype)

    def up_core(self, dtype: torch.dtype) -> Tensor:
        """U C, [N, r], in `dtype`: up of the same adapter without a core."""
        up = self.up.to(dtype)
        if self.core is None:
            return up
        core = mix(self.core.to(dtype), None if self.basis is None else self.basis.to(dtype))
        return up * core if core.dim() == 1 else up @ core


class KeepsFp32(nn.Module):
    """A module whose own parameters, `fp32_buffers` and stacked numbers stay fp32 when a model is cast to 16 bits.

    Thirteen numbers in bf16 cost nothing less and stop moving: a step of 1e-4 is lost beside a value of 0.1.
    """

    fp32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn, recurse=True):
        own = [*self._parameters.values(), *(p.grad for p in self._parameters.values() if p is not None)]
        buffers = self._buffers.items()
        own += [t for n, t in buffers if n in self.fp32_buffers or n.startswith(STACKED)]
        kept = {id(t) for t in own}

        def keep(t):
            moved = fn(t)
            narrowed = id(t) in kept and moved.dtype in (torch.bfloat16, torch.float16)
            return t.to(moved.device) if narrowed else moved

        return super()._apply(keep, recurse)


class Numbers(NamedTuple):
    """A tensor of an adapter that does not come from the weight.

    start:  a value for all of it, or a function of the shape that draws it
    trains: a parameter, or a buffer
    saved:  a buffer that changes and belongs into files and state_dict; others are made anew on every load
    """

    shape: tuple[int, ...]
    start: float | Callable[..., Tensor] = 0.0
    trains: bool = True
    saved: bool = False

    def make(self) -> Tensor:
        if callable(self.start):
            return self.start(*self.shape)
        return torch.full(self.shape, float(self.start), dtype=torch.float32)


class Rows:
    """Which adapter each sequence of a batch uses: ids [B], -1 for none.

    batch: how many sequences the model itself was called with, while it runs; None where that is not known.
    """

    def __init__(self, ids: Tensor):
        self.ids = ids
        self.batch: int | None = None
        self.each: int | None = None  # how often generate() has each prompt in the batch, side by side, while it runs
        self.images: int | None = None  # the tokens of a sequence, where sequences differ in how many images they have
        self.owner: tuple | None = None  # the thread and task that came with them

    def of(self, x: Tensor) -> Tensor:
        """One id per row of x ([B', ..., K]), flattened: [M].

        B' may be a multiple of B: generate() repeats every prompt for its beams or samples, side by side. Where it is
        known how many sequences the model was called with, it is as many: a layer that sees its rows flattened or
        packed ([1, tokens, K], [tokens, K]), sequences second ([tokens, B, K]) or something else (images) has lost
        whose they are.
        """
        B, first = len(self.ids), x.shape[0]
        several = x.dim() > 2
        if (several and self.batch is not None and first != self.batch) or (first % B if several else first != B):
            expected = self.batch if several and self.batch not in (None, first) else B
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected a first dimension of {expected}: adapter_ids came for {B} "
                "sequences, and rows that are packed, flattened or in another order do not say whose they are"
            )
        if several and None not in (self.each, self.batch) and first != B * self.each:
            raise ValueError(
                f"x has a first dimension of {first}, expected {B * self.each}: the model has put a second batch after "
                "the one of adapter_ids (guidance without a classifier), and whose those rows are is not known"
            )
        if self.images is not None and (not several or x.shape[1] != self.images):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected {self.images} tokens of each sequence: where sequences differ "
                "in how many images they have, adapter_ids cannot tell whose image is whose (expected target_modules "
                "without the vision model)"
            )
        each = math.prod(x.shape[:-1]) // B
        return self.ids if each == 1 else self.ids.unsqueeze(1).expand(B, each).reshape(-1)


class PackedRows(Rows):
    """Which adapter each token uses, where sequences of several lengths lie in one row: ids [tokens], -1 for none."""

    def of(self, x: Tensor) -> Tensor:
        """The ids, [M]. ValueError where x is not [.., K] for as many tokens."""
        if math.prod(x.shape[:-1]) != len(self.ids):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected the {len(self.ids)} tokens of the packed batch: this layer "
                "sees some of them only, and adapter_ids cannot tell whose they are"
            )
        return self.ids


def own_storages(state: dict, prefix: str, names: Iterable[str]) -> None:
    """Give tensors of a state_dict that are parts of one storage (siblings' weights, their v) a storage each, uncopied.

    accelerate and safetensors know a tensor by its storage, and of several in one they write the first. In a CPU's
    shared memory they stay: what goes through dlpack is not known as shared any more.
    """
    for name in names:
        t = state.get(prefix + name)
        if type(t) is not Tensor or t.layout is not torch.strided or t.is_meta or not t.is_contiguous():
            continue
        shared = t.is_cpu and t.is_shared()  # by processes; torch says so of every CUDA tensor
        if not shared and t.untyped_storage().nbytes() != t.nbytes:
            # dlpack hands over nothing of another card than the current one
            here = torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
            with torch.inference_mode(t.is_inference()), here:
                state[prefix + name] = torch.from_dlpack(t)


def lay_together(parts: Sequence[Tensor]) -> None:
    """Put the numbers of parts, rows one after another, into one storage. What processes share stays where it is."""
    if any(p.is_cpu and p.is_shared() for p in parts):
        return
    with torch.inference_mode(any(p.is_inference() for p in parts)):  # as .data of such a tensor has to be
        rows = torch.cat([p.data for p in parts]).split([len(p) for p in parts])
        for part, own in zip(parts, rows, strict=True):
            part.data = own


class Owner(KeepsFp32):
    """A module that owns numbers."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own_storages(destination, prefix, self._parameters)

    def own(self, numbers: Mapping[str, Numbers]) -> None:
        for name, spec in numbers.items():
            if spec.trains:
                self.register_parameter(name, nn.Parameter(spec.make()))
            else:
                self.register_buffer(name, spec.make(), persistent=spec.saved)


class Shared(Owner):
    """The numbers of one adapter that belong to no single layer, owned once, by the model's root.

    The layers hold an unregistered reference: state_dict then shows each number once, DDP and per-layer FSDP2
    get its gradient right (registered per layer, FSDP2 crashes), and `.to` finds it.
    """

    def __init__(self, config: "AdapterConfig", sites: Sequence[Site], fingerprint: str):
        super().__init__()
        self.config, self.sites, self.fingerprint = config, tuple(sites), fingerprint
        self.foreign = False  # whether frozen numbers came from elsewhere, so that no config and no seed gives them
        self.from_file = False  # whether frozen factors came in a file: they stand in every later one
        self.__dict__["layers"] = {}  # site name -> Adapter, not registered: the layers own them
        self.rows: Rows | None = None  # which of the stacked numbers each row of the batch uses
        flops.register()
        self.own(config.shared(sites))

    def _apply(self, fn, recurse=True):
        """What siblings have put into one storage (nn/siblings.py) lies in one afterwards, too."""
        together: dict[int, list[str]] = {}
        own = {n: p for n, p in self._parameters.items() if type(p) is nn.Parameter and not in_pieces(p)}
        for name in sorted((n for n, p in own.items() if not p.is_meta), key=lambda n: own[n].data_ptr()):
            together.setdefault(own[name].untyped_storage().data_ptr(), []).append(name)
        super()._apply(fn, recurse)
        for names in together.values():
            parts = [self._parameters[n] for n in names]
            if len({p.untyped_storage().data_ptr() for p in parts}) > 1 and not parts[0].is_meta:
                with torch.inference_mode(False), torch.no_grad():
                    lay_together(parts)
        return self

    def __getstate__(self):
        return {**self.__dict__, "rows": None}  # a copy made within `adapter_ids` is not within it

    def __setstate__(self, state):
        super().__setstate__(state)
        flops.register()  # for who unpickles a model in a process that has made none

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{n}={tuple(p.shape)}" for n, p in self.named_parameters())
        return f"{self.config}, {len(self.sites)} modules" + (f", {shapes}" if shapes and len(shapes) < 200 else "")


class Adapter(Owner):
    """One adapter in one layer."""

    core_alone_trains: ClassVar[bool] = False  # so that one batch, or a group of layers, can share what is frozen

    def __init__(self, site: Site, frozen: Mapping[str, Tensor], shared: Shared):
        super().__init__()
        self.site, self.dropout = site, shared.config.dropout
        self.from_weight = tuple(frozen)
        for name, t in frozen.items():
            # up lies in memory as Uᵀ: the backward's thin pass, t = dY U, reads it along N
            self.register_buffer(name, t.T.contiguous().T if name == "up" else t, persistent=False)
        self.own(shared.config.local(site))
        self.__dict__["shared"] = shared  # past nn.Module's registration: see Shared

    def factors(self) -> Factors:
        raise NotImplementedError

    def row_core(self) -> Tensor:
        """What stands in the core's place where every row has its own: [A, r, r], or [A, u] with a basis."""
        raise ValueError(
            f"{type(self.shared.config).__name__} adapters differ in more than their core, so one batch cannot hold "
            "several: expected TinyLoraConfig or LoraXSConfig"
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


@dataclass(frozen=True)
class AdapterConfig:
    """What all adapters' configs have.

    seed:            of everything drawn at random
    target_modules:  None is every linear layer inside the transformer blocks that its parent calls, and that has more
                     than one row and column; a list of names matches a module's
                     full name or its last parts ("q_proj", "mlp.up_proj"); a string is a regular expression for
                     the full name
    dropout:         of x on the adapter's branch, in training, 0 to below 1; it costs the fusion while it acts
    modules_to_save: names of modules to train whole beside the adapter and save with it: a classifier's head
    """

    kind: ClassVar[str]
    adapter_class: ClassVar[type[Adapter]]
    shared_class: ClassVar[type[Shared]] = Shared
    _: dataclasses.KW_ONLY
    seed: int = 0
    target_modules: Sequence[str] | str | None = None
    dropout: float = 0.0
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        require_whole(self, "seed", least=0)
        require_number(self, "dropout", least=0, below=1)
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                require(self, "target_modules", False, f"a regular expression ({error})")
        for name in ("target_modules", "modules_to_save"):
            names = getattr(self, name)
            if names is not None and not (isinstance(names, str) and name == "target_modules"):
                several = as_tuple(names)
                fits = bool(several) and all(isinstance(t, str) and t for t in several)
                regular = " a regular expression," if name == "target_modules" else ""
                require(self, name, fits, f"None,{regular} or names in a list")
                object.__setattr__(self, name, several)

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        """The numbers that the model's root owns, by name."""
        return {}

    def local(self, site: Site) -> dict[str, Numbers]:
        """The numbers of one layer alone, by name."""
        return {}

    def numbers(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        """All of them, by the name they have in a file, without building anything."""
        found = self.shared(sites)
        for site in sites:
            found |= {f"{site.name}.{name}".lstrip("."): spec for name, spec in self.local(site).items()}
        return found

    def count(self, sites: Sequence[Site]) -> int:
        """How many numbers train (without `modules_to_save`)."""
        return sum(math.prod(spec.shape) for spec in self.numbers(sites).values() if spec.trains)

    def frozen(self, site: Site, weight: Tensor, weight_digest: str) -> dict[str, Tensor]:
        """The tensors of one layer that come from its weight, by name; `weight_digest` is of it rounded to bf16."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `config_from_dict` reads it."""
        return {"kind": self.kind} | dataclasses.asdict(self)


def as_tuple(values: Any) -> tuple | None:
    """What an iterable other than a text has, or None."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes) else None


def require(config: AdapterConfig, name: str, holds: bool, expected: str) -> None:
    """ValueError unless `holds`: which field of which config, what it is, what was expected."""
    if not holds:
        raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)!r}, expected {expected}")


def require_number(
    config: AdapterConfig,
    *names: str,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """ValueError unless these fields are finite numbers within the bounds. numpy's become Python's."""
    bounds = [] if least is None else [f"of {least:g} or more"]
    bounds += [] if above is None else [f"above {above:g}"]
    bounds += [] if below is None else [f"below {below:g}"]
    expected = " ".join(["a number", " and ".join(bounds)]).strip()
    for name in names:
        value = getattr(config, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
        holds = number and (least is None or value >= least) and (above is None or value > above)
        require(config, name, holds and (below is None or value < below), expected)
        if type(value) not in (int, float):
            object.__setattr__(config, name, float(value))


def require_whole(config: AdapterConfig, *names: str, least: int = 1) -> None:
    """ValueError unless these fields are integers of at least `least`. numpy's become Python's."""
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(config, name, whole and value >= least, f"an integer of {least} or more")
        if type(value) is not int:
            object.__setattr__(config, name, int(value))
