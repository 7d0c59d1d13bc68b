"""The drop-in layer: a frozen linear layer that adapters can be added to."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylora.adapters import Adapter, AdapterConfig, own_storages, refuse_no_config
from tinylora.adapters.sharded import in_pieces
from tinylora.nn.kept import Kept, Operands
from tinylora.ops import adapted_linear
from tinylora.ops.eager import mix
from tinylora.ops.linear import invariant_linear, plain, unchecked
from tinylora.ops.siblings import on_torch

MOVES = 64  # how often what a layer keeps may have moved before it keeps nothing


def low_rank(x: Tensor, down: Tensor, core: Tensor | None, up: Tensor, basis: Tensor | None) -> Tensor:
    """((X Dᵀ) Cᵀ) Uᵀ, [..., N], in x's dtype: the correction alone."""
    core, z = mix(core, basis), F.linear(x, down.to(x.dtype))
    if core is not None:
        core = core.to(x.dtype)
        z = z * core if core.dim() == 1 else F.linear(z, core)
    return F.linear(z, up.to(x.dtype))


def refuse_replaced(linear: nn.Module, name: str = "this torch.nn.Linear") -> None:
    """ValueError for a layer with a forward of its own, which would win over ours."""
    if "forward" in linear.__dict__:
        raise ValueError(
            f"{name} has its forward replaced (accelerate does that to models spread by device_map, transformers to "
            "some layers of a tp_plan), expected a plain one: load the model on one device, remove the hooks first, or "
            "name target_modules without it"
        )


class Linear(nn.Linear):
    """Y = X Wᵀ + b, and with an active adapter Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ (`tinylora.ops.adapted_linear`).

    `weight` ([N, K]) and `bias` ([N] or None) are the very parameters of the layer it was made from, under the
    same state_dict names; the dtype of the output is theirs. Adapters stand in `adapters`, by name; at most one
    is active (`active`), and merging adds it to `weight` until `unmerge`.

    batch_invariant: whether a row's result has the same bits whatever the other rows are (`adapted_linear`), with an
    adapter, merged or without one. Saved nowhere; `tinylora.apply` sets it for a whole model.
    """

    batch_invariant: bool = False
    _siblings: weakref.ref | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._start()

    def _start(self) -> None:
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self.merged: str | None = None
        self.siblings = None
        self._unmerged_weight: Tensor | None = None
        self._kept: dict[str, Kept | None] = {}  # by adapter
        self._moved = 0  # how often what was kept no longer stood

    @property
    def siblings(self):
        """The group it computes in (nn/siblings.py), or None. It is the parent's: a model that is dropped must not wait
        for the garbage collector with all its weights, as it would in a circle.
        """
        return None if self._siblings is None else self._siblings()

    @siblings.setter
    def siblings(self, group) -> None:
        self._siblings = None if group is None else weakref.ref(group)

    def _replicate_for_data_parallel(self):
        raise ValueError(
            "nn.DataParallel copies a model for every GPU in every step, expected DistributedDataParallel: start with "
            "torchrun or accelerate, or show the process one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "Linear":
        """This layer around `linear`'s own parameters: no copy, no adapter yet. Hooks on `linear` come along.

        ValueError if `linear` has a forward of its own (accelerate's device_map puts one there): it would win.
        """
        refuse_replaced(linear)
        layer = cls.__new__(cls)
        # Hooks stay where their handles look for them; of one that was told its module this is the module now.
        own = linear.__dict__.items()
        layer.__dict__.update({k: v.copy() if isinstance(v, dict) and "hooks" not in k else v for k, v in own})
        for hook in layer._load_state_dict_pre_hooks.values():
            if hook.with_module:
                hook.module = weakref.ref(layer)
        layer._start()
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: AdapterConfig) -> "Linear":
        """A layer with `linear`'s parameters and a new adapter, by itself and not as a part of a model.

        `tinylora.adapter_parameters(layer)`, `save`, `load`, `merge` and the others take it as they take a model.
        The base is frozen. ValueError if `linear` is neither a torch.nn.Linear nor a bitsandbytes.nn.Linear4bit, or the
        config does not fit it.
        """
        from tinylora.nn.four_bit import is_four_bit
        from tinylora.nn.model import attach, wrapped

        refuse_no_config(config)
        if type(linear) is not nn.Linear and not is_four_bit(linear):
            raise ValueError(
                f"linear is a {type(linear).__name__}, expected a torch.nn.Linear or a bitsandbytes.nn.Linear4bit"
            )
        layer = wrapped(linear)
        hooks = {k: v.copy() for k, v in layer.__dict__.items() if isinstance(v, dict) and "hooks" in k}
        layer.__dict__.update(hooks)  # the two go on apart
        attach(layer, {"": layer}, config, "default")
        return layer

    def base(self) -> tuple[Tensor, Tensor | None]:
        """(weight, bias), past nn.Module's __getattr__, which costs half a microsecond a name.

        Through it where somebody made them something else than parameters (parametrizations, FSDP's flat parameter).
        """
        own = self._parameters
        plain = "weight" in own and "bias" in own
        return (own["weight"], own["bias"]) if plain else (self.weight, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # named as torch.nn.Linear's, for who calls it by name
        if self.active is None or self.merged is not None:
            weight, bias = self.base()
            if self.batch_invariant:
                return invariant_linear(x, weight, bias)
            return F.linear(x, weight, bias)
        if x.is_nested:
            return self._on_nested(x)
        group = self._siblings  # in place of the property, whose call every layer would pay
        siblings = None if group is None else group()
        if siblings is not None and siblings.running:
            y = siblings.output(self, x)
            if y is not None:
                return y
        kept = None if torch.compiler.is_compiling() else self._kept.get(self.active)
        if kept is not None and kept.stands():
            ys = kept.outputs(x)
            if ys is not None:
                return ys[0]
        weight, bias = self.base()
        adapter = self._modules["adapters"]._modules[self.active]
        down, core, up, basis = adapter.factors()
        invariant = self.batch_invariant
        rows = adapter.shared.rows
        core = self.summed(core if rows is None else adapter.row_core())
        if rows is not None:
            return adapted_linear(x, weight, down, core, up, bias, rows.of(x), basis=basis, batch_invariant=invariant)
        if adapter.dropout and self.drops(adapter):
            # Two inputs, so two calls: the frozen layer on x, and the correction on what dropout left of it.
            dropped = F.dropout(x, adapter.dropout)
            return F.linear(x, weight, bias) + low_rank(dropped, down, core, up, basis)
        # The layer's own operands fit each other since `attach`; only x can be wrong, and the full check says how.
        if x.shape[-1:] == weight.shape[1:] and x.dtype == weight.dtype and x.device == weight.device:
            y = unchecked(x, weight, down, core, up, bias, None, basis, invariant)
            if Kept.pays(x) and not invariant and plain(x):
                self._keep(x, Operands(weight, down, core, [core], up, bias, basis, [len(weight)]))
            return y
        return adapted_linear(x, weight, down, core, up, bias, None, basis=basis, batch_invariant=invariant)

    def summed(self, core: Tensor | None) -> Tensor | None:
        """The core, whose gradient is this layer's; where processes share the layer (tensor parallelism), the sum."""
        return core

    def _on_nested(self, x: Tensor) -> Tensor:
        """Sequences of different lengths in one tensor (torch.nested), which no view makes rows of."""
        weight, bias = self.base()
        adapter = self._modules["adapters"]._modules[self.active]
        if adapter.shared.rows is not None or self.batch_invariant:
            raise ValueError("x is nested, expected a padded batch within adapter_ids and with batch_invariant")
        down, core, up, basis = adapter.factors()
        if core is not None and core.dim() == 1 and basis is None:
            core = core.diag()  # which nested numbers can be multiplied by
        dropped = F.dropout(x, adapter.dropout) if adapter.dropout and self.training else x
        return F.linear(x, weight, bias) + low_rank(dropped, down, core, up, basis)

    def drops(self, adapter: Adapter) -> bool:
        """Whether its dropout acts. ValueError where that is no answer, with batch_invariant."""
        acts = adapter.dropout > 0 and self.training
        if acts and self.batch_invariant:
            raise ValueError(
                f"dropout is {adapter.dropout} and the layer trains: what is dropped from a row depends on the "
                "others, expected no dropout with batch_invariant, or eval()"
            )
        return acts

    def _keep(self, x: Tensor, operands: Operands) -> None:
        """Have later calls on these operands take fewer steps, where it is kernels that x meets."""
        name = self.active
        kept = self._kept.get(name)
        if name in self._kept and (kept is None or kept.stands()):
            return
        if on_torch(x, (operands.weight,), operands.down, operands.core, operands.up):
            return
        # Who moves the weights at every call (ZeRO-3 gathers them) gains nothing by this.
        self._moved += kept is not None
        self._kept[name] = Kept.of(name, [self], operands) if self._moved < MOVES else None

    def delta(self) -> Tensor:
        """U C D of the active adapter, [N, K], in fp32 (fp64 if a factor is)."""
        return self.adapters[self.active].factors().delta()

    @torch.no_grad()
    def merge(self) -> None:
        """W becomes W + U C D: summed in fp32 (fp64 for an fp64 W), rounded once to W's dtype.

        The original weight is kept (off the GPU, in host memory), so that `unmerge` restores it bit for bit; the
        merged weight has lost what its dtype cannot hold, for bf16 up to all of a small update.
        """
        if self.active is None or self.merged is not None:
            return
        self.refuse_merge()
        delta = self.delta()
        self._unmerged_weight = self.weight.detach().to("cpu", copy=True)
        wider = torch.promote_types(delta.dtype, self.weight.dtype)  # an fp64 base keeps its digits
        self.weight.copy_(delta.to(wider).add_(self.weight))
        self.merged = self.active

    def refuse_merge(self) -> None:
        """ValueError if `merge` is impossible here."""
        if "weight" not in self._parameters:
            raise ValueError(
                "the weight is computed from others (pruning, weight_norm, a parametrization), expected a parameter to "
                "merge into: torch.nn.utils removes such a thing again"
            )
        if in_pieces(self.weight):
            raise ValueError(
                "the weight is sharded (FSDP2, ZeRO-3, tensor parallelism), expected a whole one to merge into"
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was before `merge`, bit for bit."""
        if self.merged is None:
            return
        self.weight.copy_(self._unmerged_weight)
        self.merged, self._unmerged_weight = None, None

    def add(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter
        self._kept.clear()

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self._kept.clear()
        if self.active == name:
            self.active = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._kept.clear()
        if self.siblings is not None:
            self.siblings.share()  # .to gave every layer a storage of its own
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        own_storages(destination, prefix, self._parameters)

    def __getstate__(self):
        return {**self.__dict__, "_siblings": None, "_kept": {}}  # a copied parent gives its copies their own

    def extra_repr(self) -> str:
        state = f", active={self.active}" if self.active else ""
        if self.siblings is not None:
            state += f", one of {len(self.siblings.layers)} siblings"
        return super().extra_repr() + state + (f", merged={self.merged}" if self.merged else "")
