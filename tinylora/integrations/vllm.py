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
from torch import nn

from tinylora.integrations import folders, peft_files, processes
from tinylora.integrations.optional import needed
from tinylora.nn.model import adapter_names, saved_modules, trained_adapter

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
    if colocated and not getattr(model, "name_or_path", ""):
        raise ValueError(
            "the model was not loaded from a folder (name_or_path is empty), expected one: vLLM loads the base from it"
        )
    kept = sorted(saved_modules(model))
    if kept:
        raise ValueError(f"modules_to_save has {', '.join(kept)}, expected none with use_vllm: a LoRA in vLLM has none")


@contextlib.contextmanager
def unmerged(trainer: type) -> Iterator[None]:
    """Within it a trainer of TRL's that is built samples by vLLM with the adapter, ours or one of PEFT's, as a LoRA."""
    needed("vllm", "vllm", "use_vllm")
    place = "VLLMGeneration"  # what a trainer samples with, by its name in the trainer's own module
    modules = {sys.modules[t.__module__] for t in trainer.__mro__ if hasattr(sys.modules[t.__module__], place)}
    with contextlib.ExitStack() as replaced:
        for module in modules:
            replaced.enter_context(_replaced(module, place, _rollouts(getattr(module, place))))
        yield


def _writer(model: nn.Module) -> Callable[[Path], Any] | None:
    """What writes the model's adapter as a plain LoRA into a folder that is not there yet; None for a bare model."""
    if adapter_names(model):
        return functools.partial(peft_files.save, model, name=trained_adapter(model), format="lora")
    return functools.partial(_save_of_peft, model) if hasattr(model, "peft_config") else None


def _save_of_peft(model: nn.Module, folder: Path) -> None:
    name = model.active_adapter
    with tempfile.TemporaryDirectory(dir=folder.parent) as theirs:
        model.save_pretrained(theirs, selected_adapters=[name], save_embedding_layers=False)
        saved = Path(theirs) / (name if name != "default" else "")
        folders.peft_as_lora(saved, folder, model.name_or_path)


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
            self._save = _writer(self.model)
            if self._save is None:
                super()._init_vllm()
                return
            self._folder, self._count = Path(tempfile.mkdtemp(prefix="tinylora-vllm-")), 0
            self._folder.chmod(0o755)  # a server may be another user's
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            try:
                self._rank = _legal_rank(_rank(self._write()))
                if self.mode == "colocate" and self.enable_sleep_mode:
                    raise ValueError("vllm_enable_sleep_mode is True")
            except ValueError as reason:
                if adapter_names(self.model):
                    raise
                warnings.warn(f"vLLM samples from merged weights, TRL's way with PEFT's models: {reason}", stacklevel=2)
                self._save = None
                super()._init_vllm()
                return
            llm = functools.partial(theirs.LLM, enable_lora=True, max_lora_rank=self._rank, max_loras=1)
            with _replaced(theirs, "LLM", llm), _replaced(theirs, "VLLMClient", Client):
                super()._init_vllm()
            self.sync_weights()  # what vLLM does not take is said before the first step

        def _write(self) -> Path:
            """The adapter as it is now, in a folder of its own; the one before the last is not read any more."""
            self._count += 1
            shutil.rmtree(self._folder / str(self._count - 2), ignore_errors=True)
            folder = self._folder / str(self._count)
            self._save(folder)
            return folder

        def sync_weights(self):
            if self._save is None:
                super().sync_weights()
                return
            if self.mode == "server" and not self.accelerator.is_main_process:
                return
            folder = self._write()
            # vLLM tells adapters apart by name and number, also in its cache of prefixes, and a server outlives runs
            request = LoRARequest(f"{self._folder.name}-{self._count}", self._count, str(folder))
            if self.mode == "server":
                self._serve(request)
                return
            self.llm.llm_engine.add_lora(request)
            for way in ("generate", "chat"):
                sample = getattr(type(self.llm), way)
                setattr(self.llm, way, functools.partial(sample, self.llm, lora_request=request))
            self.llm.reset_prefix_cache()

        def close(self) -> None:
            """End the engine, and with it the process group that it and the trainer share: every process calls it."""
            if self.mode == "colocate":
                self.accelerator.wait_for_everyone()
                self.llm.llm_engine.engine_core.shutdown()

        def _serve(self, request) -> None:
            client, former = self.vllm_client, getattr(self, "_served", None)
            what = {"lora_name": request.lora_name, "lora_path": request.lora_path}
            # by TRL's session a refusal would be tried five times, and its reason lost
            answer = requests.post(f"{client.base_url}/v1/load_lora_adapter", json=what)
            if answer.status_code != 200:
                raise RuntimeError(
                    f"the vLLM server at {client.base_url} did not load the adapter ({answer.status_code}: "
                    f"{answer.text.strip()[:500]}), expected one that reads {request.lora_path}, started with\n"
                    f"{SERVE.format(rank=self._rank)}"
                )
            client.model = self._served = request.lora_name
            if former:
                requests.post(f"{client.base_url}/v1/unload_lora_adapter", json={"lora_name": former})

    Rollouts.__name__ = Rollouts.__qualname__ = generation.__name__
    return Rollouts


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
    with tempfile.TemporaryDirectory(prefix="tinylora-vllm-") as folder:
        how: dict[str, Any] = {}
        request = None
        if adapter_names(model):
            written = Path(folder) / "1"
            _writer(model)(written)
            how = {"enable_lora": True, "max_lora_rank": _legal_rank(_rank(written)), "max_loras": 1}
            request = LoRARequest("adapter", 1, str(written))
        model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        processes.named()
        llm = LLM(
            model=model.name_or_path, dtype=model.dtype, max_model_len=length, seed=0,
            distributed_executor_backend="external_launcher", **how,
        )  # fmt: skip

        def answer(prompts, parameters):
            found = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, lora_request=request)
            return [list(each.outputs[0].token_ids) for each in found]

        yield answer
        llm.llm_engine.engine_core.shutdown()


def _rank(folder: Path) -> int:
    config = json.loads((folder / peft_files.CONFIG).read_text())
    return max([config["r"], *config.get("rank_pattern", {}).values()])


def _legal_rank(rank: int) -> int:
    """The least max_lora_rank of vLLM's that holds this rank: it takes a few numbers only."""
    from vllm.config.lora import MaxLoRARanks

    legal = sorted(typing.get_args(MaxLoRARanks))
    if rank > legal[-1]:
        raise ValueError(f"the adapter is of rank {rank}, expected at most {legal[-1]} with use_vllm, vLLM's largest")
    return next(r for r in legal if r >= rank)


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)
