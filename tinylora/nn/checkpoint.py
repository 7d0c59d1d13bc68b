"""Adapters as files: `adapter.safetensors`, one file, no pickle.

The tensors are what trains; the JSON in the file's metadata under "tinylora" says everything else: format version,
config, the number of modules, a fingerprint of the base model's weights and a checksum of the whole. Whoever has the
base rebuilds the frozen factors from it. With `factors=True` they are in the file too. The layout:

    v_<group>                TinyLoRA's numbers, [u]
    <layer>.core             LoRA-XS's, [r, r]; every adapter's by the names in its config
    saved.<module>.<name>    the modules of `modules_to_save`
    frozen.<layer>.<tensor>  with factors=True, and in adapters whose factors came in a file or from PEFT
    foreign.<tensor>         only in those: the frozen numbers that all layers share

One file, because one can be replaced in one step: there is no moment at which a crash leaves half an adapter.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinylora import __version__
from tinylora.adapters import STACKED, Shared, config_from_dict, files
from tinylora.adapters.sharded import gathered, of_zero3, shape_of, sharded_as, whole
from tinylora.nn.four_bit import dense_weight
from tinylora.nn.model import (
    activate,
    adapted_layers,
    adapter_names,
    as_always,
    attach,
    base_digests,
    fingerprint,
    layers_with,
    named_numbers,
    refuse_lost,
    refuse_merged,
    refuse_within,
    refuse_wrapped,
    saved_modules,
    shared_of,
)
from tinylora.nn.saved_module import lasting
from tinylora.nn.targets import find_modules_to_save, find_targets, sites_of
from tinylora.nn.tensor_parallel import put_together

FILE = "adapter.safetensors"
FORMAT_VERSION = 2  # in 1 the frozen factors came from the weights as they were, not rounded to bf16


def save(model: nn.Module, folder: str | os.PathLike, name: str = "default", *, factors: bool = False) -> Path:
    """Write the adapter `name` to `folder`/adapter.safetensors, and return that path.

    factors: also write the frozen factors, (N + K) · r numbers a layer, for whoever must not recompute them. Of an
             adapter whose factors came in a file they are written in any case.
    The file is written beside its place and moved there whole: an interruption leaves the previous one. Merged or
    not, active or not, the adapter is the same. Of a model that FSDP2 or ZeRO-3 has sharded, or that is under tensor
    parallelism, every process must call it, as they put the numbers together. ValueError if the model has no adapter of
    that name.
    """
    shared = shared_of(model, name)
    refuse_lost(model, name)
    numbers = named_numbers(model, name)
    with gathered(numbers.values()):
        # Copies: safetensors takes no tied weights, and FSDP1 cannot free what numpy has seen
        tensors = {n: whole(p).to("cpu", copy=True).contiguous() for n, p in numbers.items()}
    layers = layers_with(model, name)
    gone = [site.name for site in shared.sites if site.name not in layers]
    if gone:
        raise ValueError(
            f"{gone[0]} is not in the model, or not by this name, any more: expected to save adapter {name!r} before"
        )
    saved = {path: module for path, module in saved_modules(model).items() if name in module.copies}
    odd = _odd_ones(tensors, shared.config, shared.sites, saved)
    if odd:
        raise ValueError(
            f"the adapter's {odd[0][0]} with shape {odd[0][1]} is not what it has as a whole, expected a model that is "
            "not sharded, or by FSDP2 or ZeRO-3; of FSDP1's, within FullyShardedDataParallel.summon_full_params(model)"
        )
    factors = factors or shared.foreign or shared.from_file
    if shared.foreign:
        for n, t in _rebuilt(shared).items():
            tensors[f"foreign.{n}"] = t.detach().cpu().contiguous()
    if factors:
        for site, layer in layers.items():
            adapter = layer.adapters[name]
            for n in adapter.from_weight:
                t = put_together(layer, n, adapter.get_buffer(n))
                tensors[f"frozen.{site}.{n}"] = t.detach().cpu().contiguous()
    header = {
        "format": FORMAT_VERSION,
        "tinylora": __version__,
        "config": shared.config.to_dict(),
        "modules": len(shared.sites),
        "base": shared.fingerprint,
        "factors": factors,
    } | ({"foreign": True} if shared.foreign else {})
    header["checksum"] = _checksum(header, tensors)
    return files.write_whole(
        Path(folder) / FILE,
        lambda path: save_file(tensors, path, metadata={"format": "pt", "tinylora": json.dumps(header)}),
    )


def numbers_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a file's tensors those of `named_numbers`: without frozen factors."""
    return {n: t for n, t in tensors.items() if not n.startswith(("frozen.", "foreign."))}


@as_always()
def load(model: nn.Module, folder: str | os.PathLike, name: str = "default") -> nn.Module:
    """Put the adapter from `folder` on the model under `name`, active and trainable. Returns the model.

    If the model has an adapter of that name with the same config, only its numbers are replaced. Frozen factors
    in the file are used as they are; otherwise they are rebuilt from the model's weights (from the disk cache, if
    these were decomposed before).

    ValueError, with the model left as it was: no file, one that is truncated or changed, another format version,
    another base model, an adapter of that name with another config or merged, tensors of other shapes.
    """
    path = Path(folder) / FILE
    return restore(model, path, *read(path), name)


def restore(
    model: nn.Module,
    path: Path,
    header: dict,
    tensors: dict[str, Tensor],
    name: str,
    digests: Mapping[str, str] | None = None,
    frozen: Mapping[str, dict[str, Tensor]] | None = None,
) -> nn.Module:
    """`load` for a file that is read already; with `digests` and `frozen` for a model whose weights lie elsewhere."""
    config = config_from_dict(header["config"])
    layers = find_targets(model, config.target_modules)
    if len(layers) != header["modules"]:
        raise ValueError(
            f"{path} was trained on {header['modules']} modules, but {type(model).__name__} has {len(layers)} targets: "
            "expected the same base model"
        )
    existing = name in adapter_names(model)
    refuse_within(model)
    if existing and shared_of(model, name).config != config:
        raise ValueError(
            f"name is {name!r}, but the model has an adapter of that name with another config: "
            f"{shared_of(model, name).config}, the file has {config}"
        )
    if existing and header.get("foreign", False) | shared_of(model, name).foreign:
        raise ValueError(f"name is {name!r}, but the model has an adapter of that name with other factors: use another")
    if not existing:
        refuse_wrapped(model, layers)
    digests = digests or (None if existing else base_digests(layers))
    base = shared_of(model, name).fingerprint if existing else fingerprint(digests)
    if base != header["base"]:
        raise ValueError(
            f"{path} was trained on another base model: it was made for weights {header['base'][:12]}, "
            f"this {type(model).__name__} has {base[:12]}. The numbers mean nothing here (float16 weights, and "
            "those of four bits, are another base than bfloat16 or float32 ones: load it in the dtype that it was "
            'trained on, --dtype in eval; convert and merge take what tinylora.save(..., format="lora") writes of it)'
        )
    if existing:
        refuse_merged(model)
        if any(map(of_zero3, named_numbers(model, name).values())):
            raise ValueError("the adapter is sharded (ZeRO-3), expected to load it before deepspeed.initialize")
        refuse_other_factors(path, header, tensors, shared_of(model, name), layers)
    trained = numbers_in(tensors)
    saved = find_modules_to_save(model, config.modules_to_save, layers)
    odd = _odd_ones(trained, config, sites_of(layers), saved)
    if odd:
        raise ValueError(
            f"{path} does not fit this model's modules: {odd[0][0]} with shape {odd[0][1]} is on one side only"
        )
    if not existing:
        if header["factors"]:
            frozen = {
                site: {
                    n.removeprefix(f"frozen.{site}."): t.to(layer.weight.device)
                    for n, t in tensors.items()
                    if n.startswith(f"frozen.{site}.")
                }
                for site, layer in layers.items()
            }
        shared = attach(model, layers, config, name, frozen, digests)
        shared.foreign, shared.from_file = header.get("foreign", False), header["factors"]
        with torch.no_grad():
            for n, t in _rebuilt(shared).items() if shared.foreign else ():
                t.copy_(tensors[f"foreign.{n}"])
    with torch.no_grad():
        for n, p in named_numbers(model, name).items():
            p.copy_(sharded_as(p, trained[n]))
    if not any(layer.active == name for layer in adapted_layers(model).values()):  # else it trains what it did
        activate(model, name)
    return model


def read(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """(header, tensors) of an adapter file, checked against its checksum. ValueError says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        hint = ""
        if (path.parent / "adapter_config.json").is_file():
            hint = " (the folder holds one of PEFT's: tinylora convert)"
        elif within := sorted(p.parent.name for p in path.parent.glob("*/adapter_config.json")):  # of other names
            hint = f" (one of PEFT's is in {', '.join(map(repr, within[:3]))} there)"
        raise ValueError(f"{path} does not exist, expected an adapter that tinylora.save wrote{hint}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {n: file.get_tensor(n).clone() for n in file.offset_keys()}  # what is the file's changes with it
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    if metadata.keys() != {"format", "tinylora"} or metadata["format"] != "pt":
        raise ValueError(f"{path} is a safetensors file, but not an adapter that tinylora.save wrote")
    try:
        header = json.loads(metadata["tinylora"])
        version, claimed = header["format"], header.pop("checksum")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, expected {FORMAT_VERSION}: "
            f"it was written by another tinylora ({header.get('tinylora')}, this is {__version__}), whose "
            "numbers mean something else here"
        )
    if claimed != _checksum(header, tensors):
        raise ValueError(f"{path} is damaged: its checksum is not that of its contents")
    return header, tensors


def _rebuilt(shared: Shared) -> dict[str, Tensor]:
    """The frozen numbers that the root owns and that are made anew on every load."""
    rebuilt = shared._non_persistent_buffers_set
    return {n: t for n, t in shared.named_buffers() if n in rebuilt and not n.startswith(STACKED)}


def refuse_other_factors(
    path: str | os.PathLike,
    header: dict,
    tensors: Mapping[str, Tensor],
    shared: Shared,
    layers: Mapping[str, nn.Linear],
) -> None:
    """ValueError if the file's numbers belong to other frozen factors than this adapter has, beyond rounding."""
    adapters = shared.layers.items()
    own = {f"frozen.{site}.{n}": (site, n) for site, adapter in adapters for n in adapter.from_weight}
    other = header.get("foreign", False) != shared.foreign
    if shared.from_file and not header["factors"] and not other:  # the file's are those that the weights give
        digests = base_digests(layers)
        tensors = {
            f"frozen.{site.name}.{n}": t
            for site in shared.sites
            for n, t in shared.config.frozen(site, dense_weight(layers[site.name]), digests[site.name]).items()
        }
    for name, t in tensors.items():
        if name in own and not other:
            site, n = own[name]
            # A layer that was wrapped since goes by another name
            mine = put_together(layers.get(site), n, shared.layers[site].get_buffer(n)).detach().cpu().float()
            t = t.cpu().float()
            other = mine.shape != t.shape or bool((mine - t).abs().max() > 0.02 * t.abs().max())
    if other:
        raise ValueError(f"{path} has other frozen factors than the adapter on the model: load it under another name")


def _odd_ones(tensors, config, sites, saved: Mapping[str, nn.Module]) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the numbers that are among these tensors and not among an adapter's, or the other way round."""
    expected = {n: tuple(spec.shape) for n, spec in config.numbers(sites).items() if spec.trains or spec.saved}
    for module_name, module in saved.items():
        expected |= {f"saved.{module_name}.{n}": shape_of(t) for n, t in lasting(module).items()}
    return sorted({(n, tuple(t.shape)) for n, t in tensors.items()} ^ set(expected.items()))


def _checksum(header: dict, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)} ".encode())
        sha.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()
