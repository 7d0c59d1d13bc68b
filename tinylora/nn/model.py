"""Adapters on a whole model: put them on, switch between them, merge them."""

import asyncio
import contextlib
import hashlib
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylora.adapters import AdapterConfig, Shared, refuse_no_config
from tinylora.adapters.factor_cache import digest
from tinylora.adapters.sharded import in_pieces, is_dtensor, of_zero3, shape_of
from tinylora.nn.four_bit import FourBitLinear, dense_weight, is_four_bit, keep_as_loaded
from tinylora.nn.linear import Linear, refuse_replaced
from tinylora.nn.saved_module import SavedModule, whole_module
from tinylora.nn.siblings import group, ungroup
from tinylora.nn.targets import (
    find_modules_to_save,
    find_targets,
    of_other_classes,
    several_in_one,
    sites_of,
    unwrapped,
)
from tinylora.nn.tensor_parallel import ParallelLinear, own_slices, refuse_parallel, refuse_sharded

READERS = 8  # threads
STORE = "tinylora"  # the root's child that owns what trains: state_dict shows tinylora.<name>.v_0
# The root's, and stays when its last adapter goes: what `apply` was told last holds for adapters from files, too.
SIBLINGS = "_tinylora_siblings"


class Store(nn.ModuleDict):
    """The root's adapters by name. A root that runs its children one after another (Sequential) passes through it."""

    def forward(self, x):
        return x

    def save(self, *args, **kwargs):
        """sentence-transformers has every child of its model write itself into a folder."""
        raise ValueError(
            "the adapter is on the SentenceTransformer itself, whose folders have no place for it: tinylora.save keeps "
            "it; to write the whole model, put it on model[0].auto_model, and tinylora.merge that first"
        )


def apply(
    model: nn.Module,
    config: AdapterConfig,
    name: str = "default",
    *,
    siblings: bool = True,
    batch_invariant: bool = False,
) -> nn.Module:
    """Put an adapter on a model, in place, and make it the active one: W' = W + U C D. Returns the model.

    Every target (`config.target_modules`) becomes a `tinylora.Linear` around its own weight; everything but the
    adapter is frozen. By default these are the linear layers of the model's blocks, but for gates of one number,
    experts that lie in one tensor (with a warning) and layers whose parent reads their weight and does not call them
    (Mamba's, WavLM's attention). The model's outputs are unchanged until the adapter is trained. Decomposing the
    weights shows a progress bar and is cached on disk (~/.cache/tinylora): it happens once for a checkpoint.

    Several adapters can live on a model under different names; `tinylora.activate` switches.

    siblings: layers that receive one tensor (q, k, v; gate, up) run as one operator and keep their weights in one
    storage, where the adapter's core alone trains (TinyLoRA, LoRA-XS) and the base is not of four bits. Same names,
    same results up to rounding. torch.compiler.nested_compile_region takes no weights of one storage: False there.
    batch_invariant: sets `Linear.batch_invariant` on every adapted layer, for rollouts whose log-probabilities must be
    the training forward's; what else of the model depends on the batch stays so (attention, the head). Siblings
    then compute alone, decoding takes about twice as long, and a forward with dropout that acts is a ValueError. False
    leaves layers that another adapter is on as they are.

    Layers of other classes (8 bits, a parametrization) beside plain ones are left out with a warning.

    ValueError: no config, nothing to adapt, TinyLoRA's or LoRA-XS's rank above a layer's size, a name in use, with a
    dot, or that torch's modules have, weights not loaded yet or quantised otherwise than to bitsandbytes' four bits,
    layers whose forward somebody replaced (accelerate's device_map and offloading), modules_to_save that are not there
    or hold an adapter, a model that is merged, within `adapter_ids` or `disabled`, compiled, adapted by PEFT or sharded
    already (tensor parallelism goes, with adapters whose core alone trains and without batch_invariant).
    """
    refuse_no_config(config)
    targets = find_targets(model, config.target_modules)
    left = several_in_one(model) if config.target_modules is None else []
    if left:
        warnings.warn(
            f"{left[0]} ({len(left)} of the kind) is several matrices in one tensor (experts, heads), no linear "
            f"layer: no adapter goes there. Adapted: {', '.join(sorted({n.rpartition('.')[2] for n in targets}))}",
            stacklevel=2,
        )
    others = of_other_classes(model) if config.target_modules is None else {}
    if others:
        first, layer = next(iter(others.items()))
        warnings.warn(
            f"{first} ({len(others)} of the kind) is a {type(layer).__name__}, whose forward is its own: no adapter "
            "goes there",
            stacklevel=2,
        )
    if batch_invariant and any(is_dtensor(layer.weight) for layer in targets.values()):
        raise ValueError("batch_invariant is True under tensor parallelism, expected False: the sums are not ours")
    attach(model, targets, config, name, siblings=siblings)
    if batch_invariant:
        for layer in adapted_layers(model).values():
            layer.batch_invariant = True
    return model


@contextlib.contextmanager
def as_always() -> Iterator[None]:
    """What is made in here can train later and comes from the CPU: also in inference mode, and where torch's default
    device is another (meta)."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


@as_always()
def attach(
    root: nn.Module,
    layers: Mapping[str, nn.Linear],
    config: AdapterConfig,
    name: str,
    frozen: Mapping[str, dict[str, Tensor]] | None = None,
    digests: Mapping[str, str] | None = None,
    siblings: bool | None = None,
) -> Shared:
    """`apply` for layers that are found already, and with `frozen` tensors by layer name that exist already.

    siblings: None is as the model has it. All that can fail comes first: an error leaves the model as it was.
    """
    if not name or "." in name:
        raise ValueError(f"name is {name!r}, expected one without dots: it becomes a part of parameter names")
    if hasattr(Store(), name):
        raise ValueError(f"name is {name!r}, expected none that torch's modules have for something else")
    if name in adapter_names(root):
        raise ValueError(f"name is {name!r}, but the model has an adapter of that name: {adapter_names(root)}")
    refuse_merged(root)
    refuse_within(root)
    refuse_wrapped(root, layers)
    refuse_parallel(root, layers, config)
    _refuse_taken(root, layers, name)
    sites = sites_of(layers)
    digests = digests or base_digests(layers)
    saved = find_modules_to_save(root, config.modules_to_save, layers)
    for path, module in saved.items():
        own = whole_module(module)
        if any(isinstance(m, Linear) for m in own.modules()):
            raise ValueError(f"modules_to_save names {path}, where an adapter is: expected one or the other")
        if any(isinstance(m, SavedModule) for m in (*own.modules(), *_above(root, path))):
            raise ValueError(
                f"modules_to_save names {path}, around or within a module that another adapter saves: expected the same"
            )
    if any(of_zero3(p) for module in saved.values() for p in module.parameters()):
        raise ValueError("modules_to_save are sharded (ZeRO-3), expected to put the adapter on before deepspeed does")
    shared = config.shared_class(config, sites, fingerprint(digests))
    if frozen is None:
        with torch.no_grad():
            frozen = {
                site.name: config.frozen(site, dense_weight(layers[site.name]), digests[site.name])
                for site in _progress(sites, f"{config.kind} factors")
            }
    frozen = {n: own_slices(layers[n], f) if is_dtensor(layers[n].weight) else f for n, f in frozen.items()}
    made = {site.name: config.adapter_class(site, frozen[site.name], shared) for site in sites}

    device = layers[sites[0].name].weight.device
    if STORE not in root._modules:
        root.add_module(STORE, Store())
    store = root.get_submodule(STORE)
    store[name] = shared.to(device)
    if siblings is not None:
        setattr(root, SIBLINGS, siblings)
    for p in root.parameters():
        p.requires_grad_(False)
    places: dict[nn.Module, list[str]] = {}  # one layer may hang under several parents
    for place, module in root.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(place)
    for site in sites:
        layer = layers[site.name]
        if not isinstance(layer, Linear):
            before, layer = layer, wrapped(layer)
            for place in places[before]:
                root.set_submodule(place, layer)
        adapter = made[site.name].to(layer.weight.device)
        layer.add(name, adapter.train(layer.training))
        shared.layers[site.name] = adapter
    for path, module in saved.items():
        if not isinstance(module, SavedModule):
            module = SavedModule(module)
            root.set_submodule(path, module)
        module.add(name)
    activate(root, name)
    (group if getattr(root, SIBLINGS, True) else ungroup)(root)
    _call_the_layers(root)
    keep_as_loaded(root)
    return shared


def wrapped(layer: nn.Linear) -> Linear:
    """A layer of ours around this one's own parameters."""
    four_bit = FourBitLinear if is_four_bit(layer) else Linear
    return (ParallelLinear if is_dtensor(layer.weight) else four_bit).wrap(layer)


def refuse_wrapped(root: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """ValueError for a model that is compiled, adapted by PEFT, or sharded: no adapter goes into those."""
    if any(hasattr(module, "_orig_mod") for module in root.modules()):
        raise ValueError("the model is compiled, expected the model itself: put the adapter on, then torch.compile it")
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    for name, layer in layers.items():
        above = (root, *_above(root, name))
        if any(type(m).__module__.startswith("peft.tuners.") and hasattr(m, "base_layer") for m in above):
            raise ValueError(
                f"{name} is a part of one of PEFT's adapters, expected a model without: unload it, or put ours on first"
            )
        if is_dtensor(layer.weight):
            refuse_sharded(name, layer, above)
            continue
        if not isinstance(layer, Linear):
            refuse_replaced(layer, name)
            _refuse_quantised(layer, name)
        whole = (layer.out_features, layer.in_features)
        if several and type(layer) is nn.Linear and shape_of(layer.weight) != whole:
            raise ValueError(
                f"{name} has a weight of {shape_of(layer.weight)}, a part of it, as FSDP1 and older transformers' "
                f"tp_plan leave in every process, expected {whole}: put the adapter on before FSDP1 does"
            )


def _refuse_quantised(layer: nn.Linear, name: str) -> None:
    """ValueError for a weight that is another kind of tensor."""
    weight = layer.weight
    if hasattr(type(weight), "__tensor_flatten__") and not is_four_bit(layer):
        raise ValueError(
            f"{name} has a weight of kind {type(weight).__name__}, expected plain numbers, or bitsandbytes' four bits: "
            "other quantisation (torchao's) is not supported"
        )


def _refuse_taken(root: nn.Module, layers: Mapping[str, nn.Linear], name: str) -> None:
    for path, layer in layers.items():
        if isinstance(layer, Linear) and name in layer.adapters:
            raise ValueError(
                f"{path} has an adapter {name!r} that this {type(root).__name__} does not own (put on a part of it, or "
                "on the layer by itself): expected another name, or the adapter on the whole model alone"
            )
        if any(isinstance(module, SavedModule) for module in _above(root, path)):
            raise ValueError(f"{path} is in another adapter's modules_to_save, expected target_modules without it")


def _above(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules between the root and the one at this path."""
    return [root.get_submodule(path[:i]) for i, letter in enumerate(path) if letter == "."]


def _call_the_layers(root: nn.Module) -> None:
    """torch's own encoder multiplies with its layers' weights itself in eval(), and would pass an adapter over."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0


def base_digests(layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """A digest of every layer's weight rounded to bf16: a bf16 checkpoint loaded in fp32 is the same base."""
    names = list(layers)
    for name in names:
        if layers[name].weight.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data: load the weights first")

    def one(name: str) -> str:
        return digest(dense_weight(layers[name]).to(torch.bfloat16))

    if any(in_pieces(layers[name].weight) for name in names):  # put together by all processes, in one order
        return {name: one(name) for name in _progress(names, "reading weights")}
    for device in {layers[name].weight.device for name in names}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the readers' stream is not the caller's, which may still write
    # SHA-256 reads 2 GB/s a core: 13 GB of a 7B model's weights are 7 seconds on one, and it leaves the GIL alone.
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        found = readers.map(one, names)
        return dict(zip(_progress(names, "reading weights"), found, strict=True))


def fingerprint(digests: Mapping[str, str]) -> str:
    """What identifies a base model: SHA-256 over its targets' names and their weights rounded to bf16."""
    return hashlib.sha256("".join(f"{n} {rounded}\n" for n, rounded in digests.items()).encode()).hexdigest()


def _progress(items: list, what: str) -> Iterable:
    """A progress bar where there is something to wait for and someone to see it: of several processes, the first's."""
    silent = len(items) < 2 or os.environ.get("RANK", "0") != "0"
    return tqdm(items, desc=what, unit="layer", leave=False, disable=silent or None)


def adapted_layers(model: nn.Module) -> dict[str, Linear]:
    """The model's `tinylora.Linear` layers, by name; the model itself, as "", if it is one."""
    return {unwrapped(n): m for n, m in model.named_modules() if isinstance(m, Linear)}


def layers_with(model: nn.Module, name: str) -> dict[str, Linear]:
    """Those of them that have an adapter of this name."""
    return {n: layer for n, layer in adapted_layers(model).items() if name in layer.adapters}


def saved_modules(model: nn.Module) -> dict[str, SavedModule]:
    """The model's modules that are trained whole beside an adapter, by name."""
    return {unwrapped(n): m for n, m in model.named_modules() if isinstance(m, SavedModule)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters."""
    return list(model._modules[STORE].keys()) if STORE in model._modules else []


def trained_adapter(model: nn.Module) -> str:
    """The name of the adapter that runs and trains. ValueError if none is active."""
    names = {m.active for m in (*adapted_layers(model).values(), *saved_modules(model).values())} - {None}
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has the active adapters {sorted(names)}, expected one to train")
    return names.pop()


def shared_of(model: nn.Module, name: str) -> Shared:
    """What the root owns of an adapter. ValueError if there is none of that name."""
    if name not in adapter_names(model):
        raise ValueError(
            f"name is {name!r}, but {type(model).__name__} has "
            + (f"the adapters {adapter_names(model)}" if adapter_names(model) else f"no adapter: {_what_to_do(model)}")
        )
    return model.get_submodule(STORE)[name]


def _what_to_do(model: nn.Module) -> str:
    inner = getattr(model, "module", None)
    if isinstance(inner, nn.Module) and STORE in inner._modules:
        return "expected model.module, which it wraps"
    return "expected the model that was compiled" if hasattr(model, "_orig_mod") else "tinylora.apply first"


def named_numbers(
    model: nn.Module, name: str = "default", owners: tuple[dict, dict] | None = None
) -> dict[str, Tensor]:
    """Everything of an adapter that is not made anew on a load, by a name that is the same on every copy of the model.

    What trains (nn.Parameter), and state such as AdaLoRA's step count: "v_0", "<layer>.core", "saved.<module>.weight".
    owners: (adapted_layers, saved_modules) of the model, for who asks about many adapters
    """
    layers, saved = owners or (adapted_layers(model), saved_modules(model))

    def owned(module: nn.Module, prefix: str) -> dict[str, Tensor]:
        # First: under FSDP2 it shards what a forward left whole, and the parameters are then others.
        lasting = module.state_dict(keep_vars=True)
        tensors = dict(module.named_parameters())
        tensors |= {n: lasting[n] for n in lasting if n not in tensors}
        return {f"{prefix}{n}": t for n, t in tensors.items()}

    found = owned(shared_of(model, name), "")
    for path, layer in layers.items():
        if name in layer.adapters:
            found |= owned(layer.adapters[name], f"{path}." if path else "")
    for path, module in saved.items():
        if name in module.copies:
            found |= owned(module.copies[name], f"saved.{path}.")
    return found


def trained_numbers(
    model: nn.Module, name: str = "default", owners: tuple[dict, dict] | None = None
) -> dict[str, nn.Parameter]:
    """What trains of an adapter, by its name in `named_numbers`, whose arguments these are."""
    return {n: t for n, t in named_numbers(model, name, owners).items() if isinstance(t, nn.Parameter)}


def adapter_parameters(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """What trains of an adapter, each parameter once: an optimiser's argument. Its own numbers are fp32, the copies of
    `modules_to_save` as their modules were.

    The numel() sum to the count that `tinylora params` prints, but for `modules_to_save`. ValueError if there is no
    adapter of that name, or if something has put a layer without it in an adapted one's place.
    """
    refuse_lost(model, name)
    return _trains(model, name)


def refuse_lost(model: nn.Module, name: str) -> None:
    """ValueError if another layer stands where an adapted one did: not if that was wrapped, or taken out, as of a stage
    of a pipeline.
    """
    shared = shared_of(model, name)
    kept = layers_with(model, name)
    lost = [site.name for site in shared.sites if site.name not in kept]
    if lost:
        there = {unwrapped(path): module for path, module in model.named_modules()}
        modules = set(there.values())
        lost = [n for n in lost if n in there and any(True for _ in there[n].parameters())]
        lost = [n for n in lost if shared.layers[n] not in modules]
    if lost:
        raise ValueError(
            f"{lost[0] or 'the layer'} has lost adapter {name!r}: something replaced it (model.dequantize() does that, "
            "and resize_token_embeddings to lm_head), expected to save before"
        )


def _trains(model: nn.Module, name: str) -> list[nn.Parameter]:
    return list(trained_numbers(model, name).values())


def activate(model: nn.Module, name: str | None) -> nn.Module:
    """Make an adapter the one that runs and trains; None is the base model. Returns the model.

    What ran before does not train any more: where two take turns within one loss, activate the one that trains again
    before its backward. A persistent manager of transformers' generate_batch keeps keys and values of before: destroy
    it. ValueError: no adapter of that name, a merged model, within `adapter_ids` or `disabled`.
    """
    if name is not None:
        shared_of(model, name)
    refuse_merged(model)
    refuse_within(model)
    layers, saved = adapted_layers(model), saved_modules(model)
    for other in adapter_names(model):
        for p in trained_numbers(model, other, (layers, saved)).values():
            p.requires_grad_(other == name)
    for layer in layers.values():
        layer.active = name if name in layer.adapters else None
    for module in saved.values():
        module.active = name if name in module.copies else None
    return model


# Of each model within `disabled`: who disabled it, how many of these contexts are open, what was active before.
_disabled_by: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def whereabouts() -> tuple:
    """The thread, and the task of asyncio where there is one, that asks."""
    try:
        task = id(asyncio.current_task())
    except RuntimeError:  # no event loop
        task = None
    return threading.get_ident(), task


def refuse_within(model: nn.Module) -> None:
    """ValueError within `adapter_ids` or `disabled`, whose end would undo what is to come."""
    within = [name for name in adapter_names(model) if shared_of(model, name).rows is not None]
    if within:
        raise ValueError(f"within adapter_ids of {within[0]!r}, expected its end first")
    if model in _disabled_by:
        raise ValueError("within disabled, expected its end first")


def remove(model: nn.Module, name: str) -> nn.Module:
    """Take an adapter off the model: its numbers, its frozen factors and its copies of `modules_to_save` are gone.

    If it was the active one the base model runs, until another is activated. The layers stay `tinylora.Linear`.
    Returns the model. ValueError: no adapter of that name, a merged model, within `adapter_ids` or `disabled`.
    """
    shared_of(model, name)
    refuse_merged(model)
    refuse_within(model)
    for owner in (*layers_with(model, name).values(), *saved_modules(model).values()):
        owner.remove(name)
    store = model.get_submodule(STORE)
    del store[name]
    (group if getattr(model, SIBLINGS, True) else ungroup)(model)
    if not len(store):  # whoever walks the model's children meets none that the base has not
        delattr(model, STORE)
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with tinylora.disabled(model):` runs the base model: GRPO's reference policy, or a baseline.

    One thread or task at a time: ValueError for another, and on a merged model. Keys and values of before, in a cache
    that is handed over or a persistent manager of generate_batch, stay the adapter's. Whoever runs the model meanwhile,
    from any thread, runs the base.
    """
    refuse_merged(model)
    held = _disabled_by.get(model)
    if held is not None and held[0] != whereabouts():
        raise ValueError("the adapter is disabled by another thread or task, expected one at a time")
    if held is None:
        switched = [*adapted_layers(model).values(), *saved_modules(model).values()]
        held = _disabled_by[model] = [whereabouts(), 0, [(module, module.active) for module in switched]]
        for module in switched:
            module.active = None
    held[1] += 1
    try:
        yield model
    finally:
        held[1] -= 1
        if held[1] == 0:  # generators may end in another order than they began
            for module, active in held[2]:
                module.active = active
            del _disabled_by[model]


def merge(model: nn.Module) -> nn.Module:
    """Add the active adapter to the weights, in place (see `Linear.merge`): for export, not for training.

    The originals are kept in host memory until `unmerge`. Until then state_dict, and so save_pretrained, holds the
    modules of `modules_to_save` under their own names.

    ValueError: no active adapter, within `adapter_ids` or `disabled`, a weight that is of four bits, in pieces,
    computed from others, or one tensor with another (a head tied to its embedding).
    """
    refuse_within(model)
    layers = [layer for layer in adapted_layers(model).values() if layer.active is not None]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no active adapter to merge: tinylora.apply or activate first")
    for layer in layers:
        layer.refuse_merge()
    merging = {layer.weight.data_ptr() for layer in layers}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # each once: a layer under two parents is one owner
        for own, p in module._parameters.items():
            if type(p) is nn.Parameter and p.layout is torch.strided and p.data_ptr() in merging:
                owners.setdefault(p.data_ptr(), []).append(f"{name}.{own}".lstrip("."))
    for names in owners.values():
        if len(names) > 1:  # a language model's head tied to its embedding: merging would change both
            raise ValueError(
                f"{' and '.join(names)} are one tensor, expected a weight of its own: untie before merging"
            )
    for layer in layers:
        layer.merge()
    for module in saved_modules(model).values():
        module.merged = True
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """Restore the weights from before `merge`, bit for bit. A model that is not merged stays as it is."""
    for layer in adapted_layers(model).values():
        layer.unmerge()
    for module in saved_modules(model).values():
        module.merged = False
    return model


def refuse_merged(model: nn.Module) -> None:
    """ValueError if an adapter is merged into the weights."""
    for name, layer in adapted_layers(model).items():
        if layer.merged is not None:
            raise ValueError(
                f"{name or 'the layer'} has adapter {layer.merged!r} merged: tinylora.unmerge(model) first"
            )
