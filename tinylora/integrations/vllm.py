"""Rollouts and answers by vLLM with the adapter unmerged: TRL's trainers with `use_vllm`, `tinylora eval --vllm`.

TRL merges PEFT's adapter into the weights and sends all of them to vLLM after every step: at 7B in bf16 that is 15 GB
for 13 numbers, and a part of so small an update is rounded away (bench/model.py, `lost`). Any adapter of ours is a
plain LoRA, exactly (A = down, B = up core), and vLLM computes a LoRA beside the frozen product: what it samples from
has the whole update. After each step the LoRA is written into a folder (20 MB for 7B, r = 2) and vLLM reads it there.

    colocate  the engine that the trainer builds takes LoRAs
    server    `SERVE`, on whichever GPUs, as long as it sees the folder (in TMPDIR) by the same path

The base is the one that vLLM loads from the model's folder, and never sent: who changed its weights in memory saves
them first. In vLLM the factors have the base's dtype, which rounds the update itself by 2^-9 in bf16.
"""

import contextlib
import functools
import json
import math
import shutil
import sys
import tempfile
import typing
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tinylora.adapters.sharded import in_pieces, is_dtensor
from tinylora.integrations import folders, peft_files, processes
from tinylora.integrations.optional import needed
from tinylora.nn.model import adapted_layers, adapter_names, named_numbers, saved_modules, trained_adapter

SERVE = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank {rank} "
    "--logprobs-mode processed_logprobs --max-logprobs -1"
)


def refuse(model: nn.Module, config=None) -> None:
    """ValueError for what vLLM cannot sample from with an adapter of ours on it, before anything is loaded.

    config: of TRL's trainer.
    """
    colocated = getattr(config, "vllm_mode", "colocate") == "colocate"
    if colocated and getattr(config, "vllm_enable_sleep_mode", False):
        raise ValueError(
            "vllm_enable_sleep_mode is True, expected False: TRL throws vLLM's weights away and sends them again, "
            "which an engine that has a LoRA beside them does not take"
        )
    name = getattr(model, "name_or_path", "")
    if colocated and (not name or (name.startswith(("/", ".")) and not Path(name).is_dir())):
        raise ValueError(
            f"the model's name_or_path is {name!r}, expected the folder it was loaded from: vLLM loads the base there"
        )
    kept = sorted(saved_modules(model))
    if kept:
        raise ValueError(f"modules_to_save has {', '.join(kept)}, expected none with vLLM: a LoRA there has none")
    refuse_another_base(model)


COMPARED = 2048  # numbers at the beginning, in the middle and at the end of each weight


def refuse_another_base(model: nn.Module) -> None:
    """ValueError if the base is not the one in its folder, which vLLM loads: fine-tuned in memory, merged, resized.

    By some numbers of each weight that the folder's safetensors have under the name that it has in the model: a
    mixture's experts, which transformers puts together, are not looked at.
    """
    name = getattr(model, "name_or_path", "")
    if not name:
        return
    try:
        stored = folders.ModelFolder(_folder_of(name))
    except ValueError:  # other formats than safetensors
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for path, weight in base.named_parameters():
        path = path.replace(".base_layer.", ".").replace("_orig_mod.", "")  # PEFT's, torch.compile's
        if path not in stored.shard_of:  # as older checkpoints have it
            path = path.removeprefix(f"{getattr(base, 'base_model_prefix', '')}.")
        shard = stored.shard_of.get(path)
        quantised = not weight.is_floating_point() or hasattr(weight, "quant_state")
        if shard is None or quantised or is_dtensor(weight):
            continue
        dtype, shape, *_ = shard.places[path]
        if shape != tuple(weight.shape) or (dtype in folders.DTYPES and not _same_numbers(weight, shard, path)):
            raise ValueError(
                f"{path} is not what {name} has, from where vLLM loads the base (trained in memory, merged, resized, "
                "of another revision?): expected the same, so save the model, and load it from there"
            )


def _same_numbers(weight: Tensor, shard: folders.Shard, path: str) -> bool:
    """Whether these are the file's numbers, in the weight's dtype or rounded to 16 bits on the way."""
    flat = weight.detach().reshape(-1)
    for at in {0, len(flat) // 2, max(0, len(flat) - COMPARED)}:
        own, theirs = flat[at : at + COMPARED].cpu(), shard.numbers(path, at, COMPARED)
        rounded = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(own.to(dtype).to(own), own))
        if not any(torch.equal(theirs.to(dtype).to(own), own) for dtype in (own.dtype, *rounded)):
            return False
    return True


def _folder_of(name: str) -> str:
    """A folder as it is; of a name on the Hub where its files lie."""
    from transformers.utils import cached_file

    if not name or Path(name).is_dir():
        return name
    try:
        return str(Path(cached_file(name, "config.json", local_files_only=True)).parent)
    except OSError:
        return name


@contextlib.contextmanager
def unmerged(trainer: type, ours: bool) -> Iterator[None]:
    """Within it a trainer of TRL's that is built samples by vLLM with the adapter, ours or one of PEFT's, as a LoRA."""
    needed("vllm", "vllm", "use_vllm")
    place = "VLLMGeneration"  # what a trainer samples with, by its name in the trainer's own module
    modules = {sys.modules.get(t.__module__) for t in trainer.__mro__}
    modules = {module for module in modules if hasattr(module, place)}
    if ours and not modules:
        raise ValueError(
            f"use_vllm is True, expected False for {trainer.__name__}: it sends vLLM the base's weights by itself"
        )
    with contextlib.ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(_replaced(module, place, _rollouts(getattr(module, place))))
        yield


class _Ours:
    """The adapter of ours that samples, as a plain LoRA."""

    def __init__(self, model: nn.Module):
        self.model = model

    def name(self) -> str | None:
        """The adapter that is active now, None for the base."""
        layers = adapted_layers(self.model).values()
        return trained_adapter(self.model) if any(layer.active for layer in layers) else None

    def numbers(self) -> list[Tensor]:
        name = self.name()
        return list(named_numbers(self.model, name).values()) if name else []

    def save(self, folder: Path) -> None:
        peft_files.save(self.model, folder, self.name(), format="lora")


class _Pefts:
    """The same of a model that PEFT adapted. ValueError for what is no plain LoRA beside the base of the folder."""

    def __init__(self, model: nn.Module):
        self.model = model

    def name(self) -> str | None:
        layers = [m for m in self.model.modules() if hasattr(m, "_disable_adapters")]
        if not layers:
            raise ValueError("the adapter has no layers of its own (prompts, prefixes?)")
        if all(m._disable_adapters for m in layers):
            return None
        names = {name for m in layers for name in m.active_adapters}
        if len(names) != 1:
            raise ValueError(f"the active adapters are {sorted(names)}, expected one")
        return names.pop()

    def numbers(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad] if self.name() else []

    def save(self, folder: Path) -> None:
        name = self.name()
        for m in self.model.modules():
            if hasattr(m, "lora_alpha") and name in m.scaling:
                alpha, r, scale = m.lora_alpha[name], m.r[name], float(m.scaling[name])
                if not any(math.isclose(scale, s) for s in (alpha / r, alpha / r**0.5, alpha)):  # AdaLoRA's is alpha
                    raise ValueError(f"a layer's scaling is {scale}, expected the one of alpha {alpha} and r {r}")
        with tempfile.TemporaryDirectory(dir=folder.parent) as theirs:
            self.model.save_pretrained(theirs, selected_adapters=[name], save_embedding_layers=False)
            saved = Path(theirs) / (name if name != "default" else "")
            folders.peft_as_lora(saved, folder, self.model.name_or_path)


def _adapter(model: nn.Module) -> _Ours | _Pefts | None:
    if adapter_names(model):
        return _Ours(model)
    return _Pefts(model) if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None


def _rollouts(generation: type) -> type:
    import requests
    from vllm.lora.request import LoRARequest

    theirs = sys.modules[generation.__module__]

    class Client(theirs.VLLMClient):
        def init_communicator(self, *args, **kwargs):
            """TRL's way of sending weights, which nobody takes here."""

    class Rollouts(generation):
        """TRL's VLLMGeneration, which hands over the adapter and not the weights."""

        def _init_vllm(self):
            self._adapter = _adapter(self.model)
            if self._adapter is None:
                super()._init_vllm()
                return
            self._folder, self._count = Path(tempfile.mkdtemp(prefix="tinylora-vllm-")), 0
            self._folder.chmod(0o755)  # a server may be another user's
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            try:
                self._room = self._first()
            except ValueError as reason:
                if isinstance(self._adapter, _Ours):
                    raise
                warnings.warn(f"vLLM samples from merged weights, TRL's way with PEFT's models: {reason}", stacklevel=2)
                self._adapter = None
                super()._init_vllm()
                return
            autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
            dtype = autocast or self.model.dtype  # as training computes
            llm = functools.partial(theirs.LLM, dtype=dtype, **self._room)
            with _replaced(theirs, "LLM", llm), _replaced(theirs, "VLLMClient", Client):
                super()._init_vllm()
            if self.mode == "server" and self.accelerator.is_main_process:
                self._base = self.vllm_client.model
                self._served: list[str] = []
                self._know_the_base()
                weakref.finalize(self, _unload, self.vllm_client.base_url, self._served)
            self.sync_weights()  # what vLLM does not take is said before the first step

        def _first(self) -> dict[str, Any]:
            """The room that vLLM makes for the adapter. ValueError for what goes TRL's way, or nowhere."""
            if self.mode == "colocate" and self.enable_sleep_mode:
                raise ValueError("vllm_enable_sleep_mode is True")
            if self._dist.is_fsdp or any(in_pieces(p) for p in self.model.parameters()):
                raise ValueError("the model is in pieces (FSDP, ZeRO-3)")
            if isinstance(self._adapter, _Pefts):
                refuse_another_base(self.model)
            return _room(self._write())

        def _write(self) -> Path:
            """The adapter as it is now, in a folder of its own; the one before the last is not read any more."""
            self._count += 1
            shutil.rmtree(self._folder / str(self._count - 2), ignore_errors=True)
            folder = self._folder / str(self._count)
            self._adapter.save(folder)
            if self.mode == "server":
                folder.chmod(0o755)
                for path in folder.iterdir():
                    path.chmod(0o644)
            return folder

        def generate(self, *args, **kwargs):
            """TRL asks for what has changed once a step; a loaded checkpoint or another adapter is none."""
            if self._adapter is not None and (self.mode == "colocate" or self.accelerator.is_main_process):
                name, numbers, (former, known) = self._adapter.name(), self._adapter.numbers(), self._known
                if name != former or len(numbers) != len(known) or not all(map(torch.equal, numbers, known)):
                    self.sync_weights()
            return super().generate(*args, **kwargs)

        def sync_weights(self):
            if self._adapter is None:
                super().sync_weights()
                return
            if self.mode == "server" and not self.accelerator.is_main_process:
                return
            self._known = "", []  # whatever fails below, the next sample tries again
            name, request = self._adapter.name(), None
            if name is not None:
                folder = self._write()
                # vLLM tells adapters apart by name and number, also in its cache of prefixes; a server outlives runs
                request = LoRARequest(f"{self._folder.name}-{self._count}", self._count, str(folder))
            if self.mode == "server":
                self._serve(request)
            else:
                self._load(request)
            self._known = name, [t.detach().clone() for t in self._adapter.numbers()]

        def _load(self, request) -> None:
            if request:
                self.llm.llm_engine.add_lora(request)
            for way in ("generate", "chat", "beam_search"):
                sample = getattr(type(self.llm), way)
                setattr(self.llm, way, functools.partial(sample, self.llm, lora_request=request))
            self.llm.reset_prefix_cache()

        def close(self) -> None:
            """End the engine, and with it the process group that it and the trainer share: every process calls it."""
            if self.mode == "colocate":
                self.accelerator.wait_for_everyone()
                self.llm.llm_engine.engine_core.shutdown()

        def _know_the_base(self) -> None:
            served = self.vllm_client._get(f"{self.vllm_client.base_url}/v1/models")["data"][0].get("root") or ""
            own = getattr(self.model, "name_or_path", "")
            if own and served and Path(own).name != Path(served).name:
                warnings.warn(f"the vLLM server has {served}, and the model was loaded from {own}", stacklevel=2)

        def _serve(self, request) -> None:
            client = self.vllm_client
            if request is None:
                client.model = self._base
                return
            what = {"lora_name": request.lora_name, "lora_path": request.lora_path}
            # by TRL's session a refusal would be tried five times, and its reason lost
            answer = requests.post(f"{client.base_url}/v1/load_lora_adapter", json=what)
            if answer.status_code != 200:
                raise RuntimeError(
                    f"the vLLM server at {client.base_url} did not load the adapter ({answer.status_code}: "
                    f"{answer.text.strip()[:500]}), expected one that reads {request.lora_path}, started with\n"
                    f"{SERVE.format(rank=self._room['max_lora_rank'])}"
                )
            client.model = request.lora_name
            _unload(client.base_url, self._served)
            self._served.append(request.lora_name)

    Rollouts.__name__ = Rollouts.__qualname__ = generation.__name__
    return Rollouts


def _unload(base_url: str, names: list[str]) -> None:
    """Take adapters off a server, which may be gone."""
    import requests

    while names:
        with contextlib.suppress(requests.exceptions.RequestException):
            requests.post(f"{base_url}/v1/unload_lora_adapter", json={"lora_name": names.pop()}, timeout=10)


@contextlib.contextmanager
def engine(model: nn.Module, length: int) -> Iterator[Callable[[Sequence[Sequence[int]], Any], list[list[int]]]]:
    """vLLM's engine of the model, unmerged, while it lasts: f(prompts, sampling parameters) gives the answers' tokens.

    The model's weights move to the CPU: vLLM has a copy of the base, from the folder that the model was loaded from.
    Under torchrun each process has an engine and its own prompts.

    length: tokens of the longest prompt and its answer.
    """
    needed("vllm", "vllm", "--vllm")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    refuse(model)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and length > room:
        raise ValueError(
            f"the longest prompt and max_completion_length are {length} tokens, expected at most {room} with vLLM: the "
            "model's max_position_embeddings"
        )
    adapter = _adapter(model)
    with tempfile.TemporaryDirectory(prefix="tinylora-vllm-") as folder, processes.launched():
        how: dict[str, Any] = {}
        request = None
        if adapter and adapter.name() is not None:
            written = Path(folder) / "1"
            adapter.save(written)
            how = _room(written)
            request = LoRARequest("adapter", 1, str(written))
        model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        llm = LLM(
            model=model.name_or_path, dtype=model.dtype, max_model_len=length, seed=0,
            distributed_executor_backend="external_launcher", **how,
        )  # fmt: skip

        def answer(prompts, parameters):
            found = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, lora_request=request)
            return [list(each.outputs[0].token_ids) for each in found]

        try:
            if request:
                llm.llm_engine.add_lora(request)  # what vLLM does not take is said before it begins
            yield answer
        finally:
            llm.llm_engine.engine_core.shutdown()


def _room(folder: Path) -> dict[str, Any]:
    """What an engine is told to hold the LoRA in this folder: of ranks vLLM takes a few, so the least that does."""
    from vllm.config.lora import MaxLoRARanks

    rank, legal = json.loads((folder / peft_files.CONFIG).read_text())["r"], sorted(typing.get_args(MaxLoRARanks))
    if rank > legal[-1]:
        raise ValueError(f"the adapter is of rank {rank}, expected at most {legal[-1]}, vLLM's largest")
    return {"enable_lora": True, "max_lora_rank": next(r for r in legal if r >= rank), "max_loras": 1}


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)
