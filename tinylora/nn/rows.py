"""A different adapter for every sequence of a batch: thousands of TinyLoRA adapters are a few numbers each."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tinylora.adapters import STACKED, Rows, Shared
from tinylora.nn.checkpoint import FILE, numbers_in, read, refuse_other_factors
from tinylora.nn.model import (
    adapted_layers,
    layers_with,
    refuse_lost,
    refuse_merged,
    shared_of,
    trained_numbers,
    whereabouts,
)


def stack(
    model: nn.Module, adapters: Sequence[str | os.PathLike | Mapping[str, Tensor]], name: str = "default"
) -> nn.Module:
    """Give the model A sets of numbers for its adapter `name`, for use with `adapter_ids`. Returns the model.

    adapters: each a folder that `tinylora.save` wrote, or a mapping from the names in such a file ("v_0",
    "<layer>.core") to tensors. All share the frozen factors of `name`, so a folder must have its config and base.
    The stack takes A times the adapter's numbers, in fp32 beside the model; a new one replaces it.

    ValueError: no adapters, a folder of another config or base or with other frozen factors, names or shapes that do
    not fit, an adapter whose thin factors train (LoRA, VeRA, AdaLoRA, Tied-LoRA: one batch cannot hold several of
    those), or with modules_to_save.
    """
    if isinstance(adapters, str | os.PathLike | Mapping):
        raise ValueError(f"adapters is one {type(adapters).__name__}, expected a sequence of folders or mappings")
    adapters = list(adapters)
    shared = shared_of(model, name)
    refuse_whole_modules(shared, name)
    refuse_lost(model, name)
    trains = trained_numbers(model, name)
    if not adapters:
        raise ValueError("adapters is empty, expected at least one")
    one = next(iter(shared.layers.values()))
    if not one.core_alone_trains:
        one.row_core()  # which says why not
    sets = []
    for i, adapter in enumerate(adapters):
        if not isinstance(adapter, Mapping):
            path = os.path.join(adapter, FILE)
            header, tensors = read(path)
            config = json.loads(json.dumps(shared.config.to_dict()))
            if header["base"] != shared.fingerprint or header["config"] != config:
                raise ValueError(f"{path} has another config or base model than adapter {name!r}, expected the same")
            refuse_other_factors(path, header, tensors, shared, adapted_layers(model))
            adapter = numbers_in(tensors)
        found, expected = ({n: tuple(t.shape) for n, t in d.items()} for d in (adapter, trains))
        if found != expected:
            odd = sorted(set(found.items()) ^ set(expected.items()))[0]
            raise ValueError(f"adapters[{i}] does not fit {name!r}: {odd[0]} with shape {odd[1]} is on one side only")
        sets.append(adapter)
    stacks = []  # all of them, before one takes another's place
    with torch.inference_mode(False):  # what is made in inference mode could not train later
        for module in (shared, *shared.layers.values()):
            for own, parameter in list(module.named_parameters()):
                full = next(n for n, t in trains.items() if t is parameter)
                values = torch.stack([torch.as_tensor(numbers[full]).detach().to(parameter) for numbers in sets])
                stacks.append((module, STACKED + own, values))
    for module, own, values in stacks:
        module.register_buffer(own, values, persistent=False)
    return model


def refuse_whole_modules(shared: Shared, name: str) -> None:
    """ValueError if the adapter has `modules_to_save`."""
    if shared.config.modules_to_save:
        raise ValueError(
            f"adapter {name!r} has modules_to_save {list(shared.config.modules_to_save)}, expected none: they are "
            "whole weights, and one batch holds one of each"
        )


@contextlib.contextmanager
def own_stack(model: nn.Module, name: str, adapters: Sequence[Mapping[str, Tensor]], own: dict) -> Iterator[None]:
    """Within, the model has a stack of `adapters`, and afterwards the one of before, or none.

    own: empty at first, keeps the tensors: those of as many adapters lie where the last ones did, so that what has
    captured their addresses reads the new ones.
    """
    shared = shared_of(model, name)
    modules = (shared, *shared.layers.values())

    def taken() -> dict:
        found = {}
        for module in modules:
            for n in [n for n in module._buffers if n.startswith(STACKED)]:
                found[module, n] = module._buffers[n]
                delattr(module, n)
        return found

    def put(tensors: dict) -> None:
        for (module, n), t in tensors.items():
            module.register_buffer(n, t, persistent=False)

    before = taken()
    try:
        stack(model, adapters, name)
        fresh = taken()
        if own.keys() == fresh.keys() and all(_alike(own[key], t) for key, t in fresh.items()):
            for key, t in fresh.items():
                own[key].copy_(t)
        else:
            own.clear()
            own.update(fresh)
        put(own)
        yield
    finally:
        taken()
        put(before)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@contextlib.contextmanager
def adapter_ids(model: nn.Module, ids: Tensor | Sequence[int], name: str = "default") -> Iterator[nn.Module]:
    """`tinylora.adapter_ids` (integrations/continuous_batching.py) without its part for continuous batching.

    ValueError: no stack, ids out of range, a merged model, an adapter that is not active, dropout while training,
    experts, another thread or task that is within one or runs the model meanwhile; in the forward, a layer that sees
    packed or flattened rows, which do not say whose they are.
    """
    shared = shared_of(model, name)
    refuse_merged(model)
    runs = {layer.active for layer in layers_with(model, name).values()}
    if runs != {name}:
        others = ", ".join(sorted(map(repr, runs)))
        raise ValueError(f"adapter {name!r} is not active ({others} is), expected tinylora.activate(model, {name!r})")
    stacked = next((b for m in (shared, *shared.layers.values()) for n, b in m.named_buffers() if STACKED in n), None)
    if stacked is None:
        raise ValueError(
            f"adapter {name!r} has no stack of numbers to choose from: tinylora.stack(model, adapters) first"
        )
    _refuse_rows_of_others(model, layers_with(model, name))
    ids = torch.as_tensor(ids, device=stacked.device)
    if ids.dim() != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"adapter_ids is {tuple(ids.shape)} {ids.dtype}, expected [B] integers, one per sequence")
    if len(ids) == 0 or int(ids.min()) < -1 or int(ids.max()) >= len(stacked):
        raise ValueError(f"adapter_ids is {ids.tolist()[:8]}, expected -1 (no adapter) to {len(stacked) - 1}")
    if shared.config.dropout and model.training:
        raise ValueError(f"dropout is {shared.config.dropout} and the model trains: expected model.eval()")
    before = shared.rows
    if before is not None and before.owner != whereabouts():
        raise ValueError(f"adapter_ids of {name!r} is in use by another thread or task, expected one at a time")
    shared.rows = rows = Rows(ids)
    rows.owner = whereabouts()

    hooks = (
        model.register_forward_pre_hook(partial(_enter, rows), with_kwargs=True),
        model.register_forward_hook(partial(_leave, rows), always_call=True),
    )
    try:
        yield model
    finally:
        in_turn, shared.rows = shared.rows is rows, before
        for hook in hooks:
            hook.remove()
    if not in_turn:
        shared.rows = None
        raise ValueError(f"adapter_ids of {name!r} ended before one that began within it, expected them in turn")


def _refuse_rows_of_others(model: nn.Module, layers: Iterable[str]) -> None:
    """ValueError for layers whose rows are not the sequences', and that may still be as many."""
    layers = list(layers)
    experts = [layer for layer in layers if re.search(r"\bexperts?[._](\w+_)?\d+\.", f"{layer}.")]
    if experts:
        raise ValueError(
            f"{experts[0]} is one of several experts, whose rows are those that a router gave it: expected "
            "target_modules without experts"
        )
    for path in sorted({layer[:i] for layer in layers for i, letter in enumerate(layer) if letter == "."}):
        attentions = [m for m in model.get_submodule(path).children() if isinstance(m, nn.MultiheadAttention)]
        if not all(attention.batch_first for attention in attentions):
            raise ValueError(
                f"{path} takes tokens first and sequences second (batch_first is False), expected batch_first=True: "
                "adapter_ids could not tell whose a row is"
            )


def _enter(rows: Rows, model: nn.Module, args: tuple, kwargs: dict) -> None:
    # Continuous batching has a thread of its own, and knows whose tokens it has; a backward may recompute in another.
    packed = "cu_seq_lens_q" in kwargs and "cache" in kwargs
    asked = not torch.compiler.is_compiling() and not packed and torch._C._current_graph_task_id() == -1
    if asked and rows.owner != whereabouts():
        raise ValueError(
            "adapter_ids was entered by another thread or task than the one that runs the model, expected it around "
            "the call itself: with adapter_ids(...) in the function that the thread runs"
        )
    rows.batch, rows.images = _sequences(args, kwargs) or len(rows.ids), None
    look_at_images(rows, model, kwargs.get("input_ids", args[0] if args else None), kwargs)


def look_at_images(rows: Rows, model: nn.Module, tokens, kwargs: Mapping) -> None:
    """Note whether sequences differ in how many images they have."""
    config = getattr(model, "config", None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        token = getattr(config, f"{kind}_token_id", getattr(config, f"{kind}_token_index", None))
        if token is not None and kwargs.get(pixels) is not None:
            counts = (tokens == token).sum(1)
            if counts.min() != counts.max():
                rows.images = tokens.shape[1]


def _leave(rows: Rows, *_) -> None:
    rows.batch = rows.images = None


def _sequences(args: Sequence, kwargs: Mapping) -> int | None:
    """How many sequences a model is called with, where its arguments say so: token ids, or what is named as theirs."""
    named = [kwargs.get(n) for n in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")]
    tokens = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and not t.is_floating_point()]
    for t in (*named, *tokens):
        if isinstance(t, Tensor) and t.dim() > 0:
            return t.shape[0]
    return None
