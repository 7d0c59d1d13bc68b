"""TRL's trainers on adapted models: `GRPOTrainer` and `SFTTrainer` as they are, and what they do not know of ours.

`adapter_trainer(GRPOTrainer)` is GRPOTrainer with these differences, none of which touches its algorithm:

    checkpoints   hold the adapter alone, where TRL would write the whole model, and a run goes on from them
    model card    none: TRL's shows how to load a whole model, which the folder does not hold
    reference     with beta > 0 it is the same model with the adapter off; TRL would load the base a second time
    static cache  (cache_implementation) compiled by transformers, on a GPU into CUDA graphs, which TRL forbids
    hooks         with gradient checkpointing every generation would leave another hook on the embedding for good
    data order    a run resumed in a later epoch goes on with that epoch's order; TRL starts again with the first one's
    lm_head       an adapter there is refused: TRL multiplies by lm_head.weight itself, and would never train it
    use_vllm      rollouts by vLLM with the adapter as a LoRA (vllm.py); TRL would send it the base's weights alone
    sync_ref      (sync_ref_model) refused: there is no second model to synchronise
    fsdp          refused, and deepspeed, too: their checkpoints are of the whole model
    4 bits        taken: transformers' Trainer refuses a quantised model on which it sees no adapter of PEFT's
    tp            (tp_plan, tensor parallelism) refused: TRL gives every process prompts of its own
    use_reentrant refused in several processes where layers share what trains: DDP would stop in the first backward

Rollouts run the adapted layers, unmerged, in `model.generate` or vLLM: the base's weights are never written.
A model that PEFT adapted passes through: TRL knows those, and only the hooks, the data order and vLLM's unmerged
rollouts are ours.
"""

import contextlib
import functools
import inspect
import json
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tinylora.adapters import files
from tinylora.adapters.sharded import is_dtensor
from tinylora.integrations import processes, vllm
from tinylora.integrations.run_folder import checkpoints
from tinylora.nn import checkpoint
from tinylora.nn.linear import Linear
from tinylora.nn.model import STORE, adapter_names, disabled, layers_with, trained_adapter
from tinylora.nn.saved_module import SavedModule

AVERAGES = "running.safetensors"
_STATE, _OPTIMIZER, _SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"


@functools.cache
def adapter_trainer(trainer: type) -> type:
    """A subclass of TRL's `GRPOTrainer` or `SFTTrainer` for models with our adapters.

        Trainer = adapter_trainer(trl.GRPOTrainer)
        Trainer(model=tinylora.apply(model, config), args=..., reward_funcs=..., train_dataset=...).train()

    Everything else is the trainer's own: arguments, callbacks, logs. ValueError on construction for what is refused
    (see above), and for a quantised model where the trainer would load a reference of its own (DPO).
    """

    class AdapterTrainer(trainer):
        def __init__(self, model, *args, **kwargs):
            ours = isinstance(model, nn.Module) and bool(adapter_names(model))
            config = kwargs.get("args") or next((a for a in args if hasattr(a, "output_dir")), None)
            beta = getattr(config, "beta", 0.0) if ours and _has_reference(trainer) else 0.0
            if ours:
                if config is None and _has_reference(trainer, by_default=True):
                    raise ValueError(f"args is missing, expected {trainer.__name__}'s: by default its beta is above 0")
                _refuse(model, config, trainer)
                if getattr(model, "is_quantized", False) and _takes_ref_model(trainer) and not kwargs.get("ref_model"):
                    raise ValueError(
                        f"{trainer.__name__} would load its reference by name, not quantised: expected a ref_model"
                    )
            rollouts = vllm.unmerged(trainer, ours) if getattr(config, "use_vllm", False) else contextlib.nullcontext()
            if beta:
                config.beta = 0.0  # while it builds, for with another one it loads the base model a second time
            try:
                with _known_to_be_adapted(model) if ours else contextlib.nullcontext(), rollouts:
                    super().__init__(model, *args, **kwargs)
            finally:
                if beta:
                    config.beta = beta
            if (
                ours
                and getattr(config, "cache_implementation", None) == "static"
                and hasattr(self, "generation_config")
            ):
                self.generation_config.disable_compile = False
            if beta:
                self.beta, self.ref_model = beta, functools.partial(_run_disabled, self.model)

        def train(self, *args, **kwargs):
            with _hooked_once(self.model):
                return super().train(*args, **kwargs)

        def evaluate(self, *args, **kwargs):
            with _hooked_once(self.model):
                return super().evaluate(*args, **kwargs)

        def predict(self, *args, **kwargs):
            with _hooked_once(self.model):
                return super().predict(*args, **kwargs)

        def _save(self, output_dir=None, state_dict=None):
            if not adapter_names(self.model):
                return super()._save(output_dir, state_dict)
            if self.args.should_save:
                save_adapter(self.model, output_dir or self.args.output_dir)

        def create_model_card(self, *args, **kwargs):
            if not adapter_names(self.model) or not trainer.create_model_card.__module__.startswith("trl."):
                super().create_model_card(*args, **kwargs)

        def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
            if not adapter_names(self.model):
                return super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_adapter(self.model, resume_from_checkpoint)
            if hasattr(self, "_total_train_tokens"):  # SFTTrainer's count, which it would start again
                history = json.loads((Path(resume_from_checkpoint) / _STATE).read_text())["log_history"]
                self._total_train_tokens = max((e.get("num_tokens", 0) for e in history), default=0)

        def _load_best_model(self):
            if not adapter_names(self.model):
                return super()._load_best_model()
            load_adapter(self.model, self.state.best_model_checkpoint)

        def _get_train_sampler(self, *args, **kwargs):
            sampler = super()._get_train_sampler(*args, **kwargs)
            return _InEpoch(sampler, self) if _continues_its_generator(sampler) else sampler

    AdapterTrainer.__name__ = AdapterTrainer.__qualname__ = trainer.__name__
    AdapterTrainer.__doc__ = trainer.__doc__
    return AdapterTrainer


@contextlib.contextmanager
def _known_to_be_adapted(model: nn.Module) -> Iterator[None]:
    """transformers' Trainer refuses a quantised model (4 bits) unless it knows of an adapter, and knows PEFT's alone.

    While it is built only: the mark would make save_pretrained look for PEFT's adapter. What trains keeps its numbers:
    on a quantised model TRL casts them to bf16, in which v would stand still.
    """
    marked = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
    kept = [(p, p.data) for p in model.parameters() if p.requires_grad and marked]
    if marked:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        for p, numbers in kept:
            p.data = numbers.to(p.device)
        if marked:
            del model._hf_peft_config_loaded


@contextlib.contextmanager
def _hooked_once(model: nn.Module) -> Iterator[None]:
    """TRL switches checkpointing off and on around every generation, and transformers then hooks the embedding again.

    The hooks that it forgets are called in every decode step, and no compiled one outlives a change of their number.
    """
    own = "enable_input_require_grads"
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT's
    if not hasattr(model, own) or own in model.__dict__:
        yield
        return
    setattr(model, own, types.MethodType(_hook_once, model))
    try:
        yield
    finally:
        delattr(model, own)


def _hook_once(model: nn.Module) -> None:
    model.disable_input_require_grads()
    type(model).enable_input_require_grads(model)


def _takes_ref_model(trainer: type) -> bool:
    return "ref_model" in inspect.signature(trainer.__init__).parameters


def _has_reference(trainer: type, by_default: bool = False) -> bool:
    """Whether it runs `ref_model` for log-probabilities, and loads the base by name for one, unless beta is 0."""
    from trl import GRPOTrainer, RLOOTrainer

    return issubclass(trainer, RLOOTrainer if by_default else GRPOTrainer | RLOOTrainer)


def _refuse(model: nn.Module, config, trainer: type) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, Linear | SavedModule):
        raise ValueError(
            "lm_head has an adapter or is in modules_to_save, expected neither: TRL's trainers multiply by "
            "lm_head.weight themselves, and nothing there would train"
        )
    if getattr(config, "use_vllm", False):
        vllm.refuse(model, config)
    if getattr(config, "sync_ref_model", False):
        raise ValueError("sync_ref_model is True, expected False: with our adapter a reference stays the base")
    if any(map(is_dtensor, model.parameters())):
        raise ValueError(
            "the model is spread over processes (tensor parallelism), expected a whole one in each: TRL gives every "
            "process prompts of its own. A loop of your own trains it"
        )
    sharded = {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
    for what, variable in sharded.items():
        if getattr(config, what, None) or os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in ("true", "1"):
            raise ValueError(
                f"{what} is on, expected it off: several processes by themselves are data parallel (DDP). Where the "
                f"base does not fit on one GPU, use {trainer.__name__} itself with FSDP2, whose checkpoints are of the "
                "whole model, and tinylora.save in all processes at the end"
            )
    reentrant = (getattr(config, "gradient_checkpointing_kwargs", None) or {}).get("use_reentrant", False)
    if processes.count() > 1 and reentrant and not config.ddp_static_graph and _tied(model):
        raise ValueError(
            f"gradient_checkpointing_kwargs has use_reentrant True, expected False with {processes.count()} processes: "
            "each layer's backward is then one of its own, and DDP takes the first one's gradient of a shared v for all"
        )


def _tied(model: nn.Module) -> bool:
    """Whether several layers share numbers that train."""
    return any(p.requires_grad for p in model._modules[STORE].parameters())


def _run_disabled(model: nn.Module, **inputs):
    """What GRPO's loss asks of its reference model: the base's log-probabilities."""
    with disabled(model):
        return model(**inputs)


def _continues_its_generator(sampler) -> bool:
    """Whether this is TRL's RepeatSampler, whose order of the second epoch depends on having drawn the first one's."""
    from trl.trainer.utils import RepeatSampler

    return isinstance(sampler, RepeatSampler) and sampler.shuffle


class _InEpoch(torch.utils.data.Sampler):
    """TRL's RepeatSampler, whose order is that of the epoch the trainer is in, resumed or not."""

    def __init__(self, sampler, trainer):
        self.sampler, self.trainer = sampler, trainer
        self.generator = sampler.generator  # accelerate looks for it

    def __iter__(self):
        generator = self.sampler.generator.manual_seed(self.sampler.seed)
        for _ in range(int((self.trainer.state.epoch or 0) + 1e-6)):
            torch.randperm(self.sampler.num_samples, generator=generator)
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter that trains into a checkpoint: `tinylora.save`, and what training alone needs of it."""
    name = trained_adapter(model)
    averages = {n: t.detach().cpu().contiguous() for n, t in _averages(model, name).items()}
    if averages:
        files.write_whole(Path(folder) / AVERAGES, lambda path: save_file(averages, path))
    checkpoint.save(model, folder, name)


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Read it back onto the model that wrote it. ValueError as `tinylora.load`."""
    name = trained_adapter(model)
    checkpoint.load(model, folder, name)
    averages = _averages(model, name)
    if averages:
        path = Path(folder) / AVERAGES
        if not path.is_file():
            raise ValueError(f"{path} does not exist, expected the averages that this adapter's training needs")
        found = load_file(path)
        with torch.no_grad():
            for n, t in averages.items():
                t.copy_(found[n])


def _averages(model: nn.Module, name: str) -> dict[str, Tensor]:
    """State that changes in training and that no adapter's file holds: AdaLoRA's averages of importance."""
    found = {}
    for site, layer in layers_with(model, name).items():
        adapter = layer.adapters[name]
        made_anew = {*adapter.from_weight, *adapter.shared.config.local(adapter.site)}
        lasting = adapter.state_dict(keep_vars=True)
        found |= {f"{site}.{n}": t for n, t in adapter.named_buffers() if n not in made_anew and n not in lasting}
    return found


def last_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest checkpoint in a run's folder that is whole, None if there is none.

    One that was being written when a process died is passed over, and said so on stderr: every file is opened, and
    the trainer's state, which the first process writes last, has to be that of its step. Every process of the run has
    its random generators there: one that was written by more processes, or fewer, than there are now is not whole.
    """
    for step, path in checkpoints(Path(folder)):
        reason = _incomplete(path, step)
        if reason is None:
            return path
        if processes.rank() == 0:
            print(f"{path} is not whole and is passed over: {reason}", file=sys.stderr)
    return None


def _incomplete(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        if json.loads((path / _STATE).read_text())["global_step"] != step:
            return f"{_STATE} is of another step"
        if (path / "adapter_config.json").exists():  # PEFT's
            load_file(path / "adapter_model.safetensors")
        else:
            checkpoint.read(path / checkpoint.FILE)
        several = processes.count() > 1
        generators = [f"rng_state_{i}.pth" for i in range(processes.count())] if several else ["rng_state.pth"]
        for name in (_OPTIMIZER, _SCHEDULER, *generators):
            damaged = zipfile.ZipFile(path / name).testzip()  # torch.save writes zip files: nothing is unpickled here
            if damaged is not None:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
        return f"{type(error).__name__}: {error}"
    return None
