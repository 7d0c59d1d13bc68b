"""Which layers of a model an adapter goes to."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from tinylora.adapters import Site
from tinylora.nn.calls import only_read
from tinylora.nn.four_bit import is_four_bit
from tinylora.nn.linear import Linear


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every torch.nn.Linear, bitsandbytes.nn.Linear4bit or layer of ours below the model, by name, in depth order, each
    module once.

    Other subclasses of torch.nn.Linear are passed over: their forward is theirs (8 bits, GPTQ, PEFT's).
    """
    modules = ((unwrapped(n), m) for n, m in model.named_modules())
    return {n: m for n, m in modules if type(m) is nn.Linear or isinstance(m, Linear) or is_four_bit(m)}


def unwrapped(name: str) -> str:
    """A module's name as it is where no block on its way is compiled (accelerate compiles the blocks) or wrapped for
    activation checkpointing or offloading (accelerate's FSDP2 does that)."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def of_other_classes(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers that are a torch.nn.Linear of another class (8 bits, a parametrization), by name: none is adapted."""
    known = linear_layers(model)
    modules = ((unwrapped(n), m) for n, m in model.named_modules())
    torchs = nn.Linear.__module__  # whose own are parts of its attention
    return {
        n: m
        for n, m in modules
        if isinstance(m, nn.Linear) and n not in known and type(m).__module__ != torchs and in_a_block(model, n)
    }


def in_a_block(model: nn.Module, name: str) -> bool:
    """Whether a module lies inside a repeated block: a ModuleList on its path, as all transformers have."""
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList) for i in range(1, len(parts)))


def several_in_one(model: nn.Module) -> list[str]:
    """Parameters in blocks that hold several matrices, of a mixture's experts or of heads, [.., .., ..], by name."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd | nn.utils.parametrize.ParametrizationList)
        and in_a_block(model, f"{name}.")
        for own, p in module._parameters.items()
        if p is not None and p.dim() == 3 and min(p.shape) > 1
    ]


def _read_by_its_parent(model: nn.Module, name: str) -> bool:
    """Whether the parent multiplies by this layer's weight itself: Mamba's in training, WavLM's attention always."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    mamba = own in ("dt_proj", "x_proj", "out_proj") and hasattr(module, "A_log") and hasattr(module, "D")
    return mamba or own in only_read(type(module))


def _special(model: nn.Module, name: str, layer: nn.Linear) -> bool:
    """A gate of one number, which has no rank to speak of; or one whose parent passes it over."""
    return min(layer.out_features, layer.in_features) == 1 or _read_by_its_parent(model, name)


def _named(names: Iterable[str], targets: Sequence[str] | str, layers: Mapping[str, nn.Linear]) -> dict[str, list[str]]:
    """Those of `names` that each target names. A full name of `layers` is that one, though another's may end in it."""
    if isinstance(targets, str):
        return {targets: [n for n in names if re.fullmatch(targets, n)]}
    full = {t for t in targets if "." in t and t in layers}
    return {t: [n for n in names if n == t or (t not in full and n.endswith("." + t))] for t in targets}


def find_targets(model: nn.Module, targets: Sequence[str] | str | None) -> dict[str, nn.Linear]:
    """The layers that `target_modules` names, by name, in depth order; see AdapterConfig.

    ValueError names what matched nothing, and what there would have been.
    """
    if isinstance(model, Linear):
        return {"": model}
    layers = linear_layers(model)
    if targets is None:
        found = {n: m for n, m in layers.items() if in_a_block(model, n) and not _special(model, n, m)}
    else:
        of_target = _named(layers, targets, layers)
        lost = [] if isinstance(targets, str) else [t for t, names in of_target.items() if not names]
        if lost:
            raise ValueError(f"target_modules names {', '.join(map(repr, lost))}, {_what_there_is(model, layers)}")
        chosen = {n for names in of_target.values() for n in names}
        found = {n: m for n, m in layers.items() if n in chosen}
        others = of_other_classes(model) if found else {}
        theirs = [n for names in _named(others, targets, layers).values() for n in names]
        if theirs:
            raise ValueError(
                f"target_modules {targets!r} names {theirs[0]}, a {type(others[theirs[0]]).__name__}, expected "
                "torch.nn.Linear modules alone: its forward is its own"
            )
    passed_over = [n for n in found if _read_by_its_parent(model, n)]
    if passed_over:
        raise ValueError(
            f"target_modules {targets!r} names {passed_over[0]}, by whose weight its parent multiplies without calling "
            "it (Mamba's kernels, WavLM's attention): an adapter there would not act, expected other layers"
        )
    if not found:
        asked = (
            "no target_modules (every linear layer in a block)" if targets is None else f"target_modules {targets!r}"
        )
        alone = type(model) is nn.Linear or is_four_bit(model)
        what = "a layer by itself: tinylora.Linear.from_linear" if alone else _what_there_is(model, layers)
        others = of_other_classes(model) if targets is None and not alone else {}
        if others:
            kind = type(next(iter(others.values()))).__name__
            what = f"the linear layers in its blocks are {kind}, whose forward is its own: expected torch.nn.Linear"
        elif targets is None and layers and not alone:
            what = f"none of its linear layers lies in a block (a ModuleList): name some, {sorted(layers)[:3]}"
        raise ValueError(f"{type(model).__name__} with {asked}: nothing to adapt, {what}")
    return found


def find_modules_to_save(
    model: nn.Module, names: Sequence[str] | None, targets: Mapping[str, nn.Linear]
) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` names (by full name or last parts), by name. ValueError names a lost one."""
    found: dict[str, nn.Module] = {}
    for wanted in names or ():
        matched = {n: m for n, m in model.named_modules() if n == wanted or n.endswith("." + wanted)}
        if not matched:
            top = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"modules_to_save names {wanted!r}, expected a module of {type(model).__name__}: {top}")
        clash = [t for t in targets for n in matched if t == n or t.startswith(n + ".")]
        if clash:
            raise ValueError(
                f"modules_to_save names {wanted!r}, but {clash[0]} gets the adapter: expected one or the other"
            )
        whole = [f"{n}.{o}" for n, m in matched.items() for o, p in m.named_parameters() if not p.is_floating_point()]
        if whole:
            raise ValueError(f"modules_to_save names {wanted!r}, but {whole[0]} is quantised: it cannot train whole")
        found |= matched
    # One inside another is trained with it.
    return {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}


def _what_there_is(model: nn.Module, layers: dict[str, nn.Linear]) -> str:
    types = sorted({n.rpartition(".")[2] for n in layers})
    if types:
        return f"expected some of its torch.nn.Linear modules: {', '.join(types)}"
    others = sorted({type(m).__name__ for m in model.modules() if getattr(m, "weight", None) is not None})
    return f"and it has no torch.nn.Linear at all, only {', '.join(others) or 'modules without weights'}"


def sites_of(layers: dict[str, nn.Linear]) -> list[Site]:
    return [Site(name, layer.out_features, layer.in_features) for name, layer in layers.items()]
