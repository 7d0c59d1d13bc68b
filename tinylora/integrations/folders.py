"""Adapters converted and merged on folders, without ever holding a model: weights are read a layer at a time.

A model folder is what save_pretrained writes: config.json and safetensors, in one file or in shards with an index.
What needs a model (which layers there are, how an adapter goes onto them) happens on a skeleton: the model of the
config without weights, whose layers have the right shapes and no memory behind them.
"""

import collections
import json
import os
import shutil
import struct
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylora.adapters import config_from_dict, files
from tinylora.adapters.base import rank_dtype
from tinylora.adapters.factor_cache import digest
from tinylora.integrations import peft_files
from tinylora.integrations.transformers import meta_model
from tinylora.nn import checkpoint
from tinylora.nn.model import adapted_layers, named_numbers
from tinylora.nn.targets import find_targets, linear_layers, sites_of

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAVED = DTYPES | {"I64": torch.int64}  # in `modules_to_save`: how many batches a BatchNorm has seen
# Weights in other formats, indices of weights, and an adapter that transformers would put on: they are the base's.
_NOT_ALONG = (
    ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".safetensors", ".index.json", peft_files.CONFIG
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # where transformers saves a tokenizer's further ones
BLOCK = 32 << 20  # bytes read, changed and written at a time


class Shard:
    """A safetensors file read piece by piece, not mapped: what is behind is not held in memory.

    places: name -> (dtype as safetensors calls it, shape, offset of the first byte, offset behind the last)
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, "pt"):  # offsets, shapes, dtypes and the file's size agree
                pass
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is truncated, damaged or no safetensors file: {error}") from None
        self.start = 8 + size
        self.places = {
            n: (t["dtype"], tuple(t["shape"]), *(self.start + o for o in t["data_offsets"]))
            for n, t in header.items()
            if n != "__metadata__"
        }

    def tensor(self, name: str) -> Tensor:
        return self.numbers(name).view(self.places[name][1])

    def numbers(self, name: str, at: int = 0, count: int | None = None) -> Tensor:
        """Numbers of a tensor from the at-th on, [count] or as many as there are."""
        dtype, _, start, end = self.places[name]
        size = DTYPES[dtype].itemsize
        start += at * size
        data = bytearray(end - start if count is None else min(end - start, count * size))
        with self.path.open("rb") as file:
            file.seek(start)
            file.readinto(data)
        return torch.frombuffer(data, dtype=DTYPES[dtype])


class ModelFolder:
    """The weights of a model folder, by name."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.index = None  # of two, transformers takes the one file
        names = [ONE]
        if not (self.folder / ONE).is_file() and (self.folder / INDEX).is_file():
            self.index = self.folder / INDEX
            try:
                names = sorted(set(json.loads(self.index.read_text())["weight_map"].values()))
                outside = [n for n in names if Path(n).is_absolute() or ".." in Path(n).parts]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.index} cannot be read: {error!r}") from None
            if outside:
                raise ValueError(f"{self.index} names {outside[0]!r}, expected files within the folder")
        paths = [self.folder / n for n in names]
        missing = [n for n, path in zip(names, paths, strict=True) if not path.is_file()]
        if missing or not (self.folder / "config.json").is_file():
            raise ValueError(
                f"{self.folder} has no {missing[0] if missing else 'config.json'}, expected a model folder with "
                f"config.json and {ONE}, or shards and {INDEX}"
            )
        self.shards = [Shard(path) for path in paths]
        self.shard_of = {n: shard for shard in self.shards for n in shard.places}

    def find(self, name: str, shape: tuple[int, ...], dtypes: Collection[str] = DTYPES) -> Shard:
        """The shard with this weight. ValueError if it is not there, of another shape, or quantised."""
        if name not in self.shard_of:
            in_a_block = any(part.isdecimal() for part in name.split("."))  # what is tied are heads and embeddings
            raise ValueError(
                f"{self.folder} has no {name}, "
                + (
                    "which its checkpoint stores under another name than the module has: load the model and the adapter"
                    " in Python, then tinylora.save, or tinylora.merge and model.save_pretrained"
                    if in_a_block
                    else "expected the weights of its config, untied and by its names"
                )
            )
        dtype, found, *_ = self.shard_of[name].places[name]
        if found != shape or dtype not in dtypes:
            raise ValueError(
                f"{self.folder}: {name} is {dtype} {found}, expected one of {', '.join(dtypes)} and {shape}"
                + (" (a base of four bits? take the one it was quantised from)" if dtype == "U8" else "")
            )
        return self.shard_of[name]

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.find(name, shape).tensor(name)


def skeleton(base: ModelFolder) -> nn.Module:
    """The model of the folder's config with all its linear layers' shapes, and no memory behind any weight."""

    def dtype(name: str) -> torch.dtype:
        stored = base.shard_of.get(f"{name}.weight")
        return DTYPES.get(stored.places[f"{name}.weight"][0], torch.float32) if stored else torch.float32

    return _skeleton(base.folder, dtype)


def _skeleton(config: str | os.PathLike, dtype: Callable[[str], torch.dtype]) -> nn.Module:
    model = meta_model(config)
    for name, layer in linear_layers(model).items():
        empty = torch.zeros((), dtype=dtype(name)).expand(layer.weight.shape)
        layer.weight = nn.Parameter(empty, requires_grad=False)
    return model


def peft_as_lora(adapter: str | os.PathLike, out: str | os.PathLike, config: str | os.PathLike) -> Path:
    """Write a folder of PEFT's as a plain LoRA. Of the base its config is enough, also by its name on the Hub.

    ValueError as `tinylora.load`.
    """

    def read() -> nn.Module:
        model = _skeleton(config, lambda name: torch.float32)
        return peft_files.load_peft(model, adapter, digests=collections.defaultdict(str))

    return _in_two_steps(read, lambda model: peft_files.save(model, out, format="lora"))


def _in_two_steps(read: Callable[[], nn.Module], write: Callable[[nn.Module], Path]) -> Path:
    """`write` of what `read` gives, and a bar: each takes tens of seconds for a large adapter of a 7B model."""
    with tqdm(total=2, desc="reading the adapter", unit="step", disable=None) as bar:
        model = read()
        bar.update()
        bar.set_description("writing")
        path = write(model)
        bar.update()
    return path


def load_onto_skeleton(base: ModelFolder, folder: str | os.PathLike, with_base: bool = True) -> nn.Module:
    """A skeleton with the adapter from `folder`: ours, or PEFT's. The base's weights are read one after the other.

    with_base: False leaves out what only our own format needs of the base where the adapter is one of PEFT's.
    ValueError as `tinylora.load`.
    """
    model = skeleton(base)
    if peft_files.is_peft_folder(folder):
        layers, weights = linear_layers(model), peft_files.layers_of(model, folder)
        compared = [n for n, comes_along in weights.items() if with_base or comes_along]
        digests = dict.fromkeys(weights, "")
        for name in _bar(compared, "reading weights") if compared else ():
            digests[name] = _digest(base, name, layers[name])[1]
        return peft_files.load_peft(model, folder, digests=digests)
    path = Path(folder) / checkpoint.FILE
    header, tensors = checkpoint.read(path)
    config = config_from_dict(header["config"])
    layers = find_targets(model, config.target_modules)
    sites = {s.name: s for s in sites_of(layers)}
    digests, frozen = {}, {}
    for name in _bar(layers, "reading weights"):
        weight, digests[name] = _digest(base, name, layers[name])
        if not header["factors"]:
            frozen[name] = config.frozen(sites[name], weight, digests[name])
    return checkpoint.restore(model, path, header, tensors, "default", digests, frozen or None)


def _digest(base: ModelFolder, name: str, layer: nn.Linear) -> tuple[Tensor, str]:
    weight = base.tensor(f"{name}.weight", tuple(layer.weight.shape))
    return weight, digest(weight.to(torch.bfloat16))


def convert(adapter: str | os.PathLike, out: str | os.PathLike, format: str, base: str | os.PathLike) -> Path:
    """Write an adapter folder, ours or PEFT's, in another format: "tinylora", "peft" or "lora" (`tinylora.save`).

    The base's weights are read a layer at a time: a 7B model takes less memory than its largest weight in fp32 and
    the adapter. ValueError if `out` exists, and as `tinylora.load` and `tinylora.save`.
    """
    files.refuse_existing(out)
    source = ModelFolder(base)

    def write(model: nn.Module) -> Path:
        model.name_or_path = str(base)
        with files.whole_folder(out) as scratch:
            return Path(out) / peft_files.save(model, scratch, format=format).name

    return _in_two_steps(lambda: load_onto_skeleton(source, adapter, with_base=format == "tinylora"), write)


def merge(base: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the base model with the adapter in its weights, W + U C D, as a model folder of its own.

    The sum is fp32 (fp64 of an fp64 base) and is rounded once to the weight's dtype; file by file and block by block,
    so that memory holds the adapter and a few times 32 MB of a weight; for frozen factors that the file has not, one
    weight at a time is read whole and decomposed. The folder's other files are copied, and the folders of chat
    templates and of sentence-transformers' modules, but not an adapter or weights in other formats, which would be the
    base's. Returns `out`.
    ValueError if `out` exists, for quantised or tied weights that would change, and as `tinylora.load`.
    """
    files.refuse_existing(out)
    source = ModelFolder(base)
    model = load_onto_skeleton(source, adapter, with_base=False)
    factors, whole = {}, {}
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            own = layer.adapters["default"].factors()
            weight = f"{name}.weight"
            source.find(weight, tuple(layer.weight.shape))
            dtype = rank_dtype(*own)
            factors[weight] = own.down.to(dtype), own.up_core(dtype)
    for name, t in named_numbers(model).items():
        if name.startswith("saved."):
            name = name.removeprefix("saved.")
            source.find(name, tuple(t.shape), _SAVED)
            whole[name] = t.detach()
    for name, layer in linear_layers(skeleton(source)).items() if whole else ():
        tied = [n for n, t in whole.items() if t.shape == layer.weight.shape]
        if f"{name}.weight" not in source.shard_of and tied:  # a head that is the embedding
            raise ValueError(f"{tied[0]} and {name}.weight are one tensor in {base}, expected a weight of its own")
    total = sum(shard.path.stat().st_size for shard in source.shards)
    with (
        files.whole_folder(out) as scratch,
        tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=None) as bar,
    ):
        weights, along = {shard.path for shard in source.shards}, _modules(source.folder) | {_TEMPLATES}
        for path in sorted(source.folder.iterdir()):
            left = path in weights or path.name.endswith(_NOT_ALONG)
            if path.is_dir() and path.name in along:
                shutil.copytree(path, scratch / path.name)
            elif path.is_file() and (path == source.index or not left):
                shutil.copyfile(path, scratch / path.name)
        for shard in source.shards:
            merged = scratch / shard.path.relative_to(source.folder)
            merged.parent.mkdir(parents=True, exist_ok=True)
            _merge_shard(shard, merged, factors, whole, bar)
    return Path(out)


def _modules(folder: Path) -> set[str]:
    """The folders that modules.json names: pooling and the like, of sentence-transformers."""
    listed = folder / "modules.json"
    try:
        return {m["path"] for m in json.loads(listed.read_text())} - {""} if listed.is_file() else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{listed} cannot be read, expected a list of modules: {error!r}") from None


def _merge_shard(shard: Shard, out: Path, factors, whole, bar) -> None:
    """The same file with other numbers: names, dtypes, shapes and their order are the source's."""
    with shard.path.open("rb") as source, out.open("wb") as target:
        target.write(source.read(shard.start))
        bar.update(shard.start)
        for name, (dtype, shape, start, end) in sorted(shard.places.items(), key=lambda item: item[1][2]):
            source.seek(start)
            target.seek(start)
            if name in whole:
                _write(target, whole[name].to(_SAVED[dtype]).contiguous())
                bar.update(end - start)
                continue
            row = (end - start) // shape[0] if name in factors else 1
            step = max(1, BLOCK // row) * row if row else 1
            for at in range(start, end, step):
                data = bytearray(source.read(min(step, end - at)))
                if name in factors:
                    down, up = factors[name]
                    weight = torch.frombuffer(data, dtype=DTYPES[dtype]).view(-1, shape[1])
                    first = (at - start) // row
                    # In the wider of fp32 and the weight's own dtype, as Linear.merge has it.
                    delta = up[first : first + len(weight)] @ down
                    delta = delta.to(torch.promote_types(delta.dtype, weight.dtype))
                    _write(target, delta.add_(weight).to(weight.dtype))
                else:
                    target.write(data)
                bar.update(len(data))
        target.flush()
        os.fsync(target.fileno())


def _write(file, t: Tensor) -> None:
    file.write(memoryview(t.reshape(-1).view(torch.uint8).numpy()))


def _bar(items, what: str):
    return tqdm(items, desc=what, unit="layer", disable=None)
