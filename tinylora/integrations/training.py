"""A training run in a folder: GRPO or SFT by TRL on any adapter of ours, logged, checkpointed, resumable.

    run.json        the settings, written once at the start: a resumed run has the same
    log.jsonl       one line a step: loss, learning rate, and for GRPO reward, strict, lenient, groups_without_signal
    checkpoint-<n>  the adapter, the optimiser, the scheduler, the random generators: the last two
    adapter         the result, as `tinylora.save` writes it

A run killed at any moment and resumed gives the curve of one that was not.

Under torchrun or accelerate launch the processes share every step's batch, and v is the same on all (DDP). The first
writes the folder; a checkpoint has the random generators of each.
"""

import contextlib
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from tinylora.adapters import config_from_dict
from tinylora.integrations import processes
from tinylora.integrations.optional import needed
from tinylora.integrations.run_folder import (
    ADAPTER,
    LOG,
    append,
    at_work,
    cut_log,
    enter,
    read_run,
    write_run,
)
from tinylora.integrations.transformers import as_prompt, load_model
from tinylora.integrations.trl import adapter_trainer, last_checkpoint, load_adapter
from tinylora.nn import checkpoint
from tinylora.nn.model import adapter_parameters, apply, shared_of
from tinylora.tasks import gsm8k
from tinylora.tasks.gsm8k import Problem

# TRL's names in the log, and ours.
_NAMES = {
    "reward": "reward",
    "rewards/strict/mean": "strict",
    "rewards/lenient/mean": "lenient",
    "frac_reward_zero_std": "groups_without_signal",
}
_SHOWN = ("loss", *_NAMES.values(), "mean_token_accuracy")


@contextlib.contextmanager
def _quiet():
    """Without warnings of TRL's and accelerate's own calls, which nobody here can heed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*(gradient|activation)_checkpointing.*", category=FutureWarning)
        yield


@_quiet()
def run(command: str, settings: dict[str, Any], out: str | os.PathLike, resume: bool = False) -> Path:
    """Train as `settings` say (a recipe's values, `tinylora.recipes.load`), in the folder `out`. Returns the adapter's.

    settings may have "steps" beside a recipe's keys: so many instead of the recipe's epochs. With `resume` the run in
    `out` goes on from its last whole checkpoint, with its own settings: see `resumed`.
    ValueError: a run in `out`, or what one would write over, and no `resume`, or no run and `resume`; settings that do
    not fit each other, the model, the number of processes or TRL; data, or a number of processes, that has changed
    since; another run at work in `out`. ImportError without trl.
    """
    needed("trl", "rl", "training")
    with at_work(Path(out)):
        return _run(command, settings, Path(out), resume)


def _run(command: str, settings: dict[str, Any], out: Path, resume: bool) -> Path:
    if not resume:
        _refuse_what_does_not_resume(command, settings)
    problems, seen = enter(settings, out, resume)
    check(command, settings, len(problems))
    arguments(command, settings, out)  # whatever is wrong with the settings is said before a model is loaded
    start = last_checkpoint(out) if resume else None
    adapter = adapter_settings(command, settings, len(problems))
    if start and adapter.get("kind") == "adalora":
        adapter["total_steps"] = checkpoint.read(start / checkpoint.FILE)[0]["config"]["total_steps"]
    config = config_from_dict(adapter)
    model, tokenizer = load_model(settings["model"], settings["dtype"])
    with processes.one_first():  # it decomposes the weights, and the others find that on the disk
        apply(model, config)
    count = sum(p.numel() for p in adapter_parameters(model))
    several = f", {processes.count()} processes" if processes.count() > 1 else ""
    whence = f", resumed from {start.name}" if start else ", from the beginning" if resume else ""

    def say(steps: int, kept: int) -> None:
        if adapter["kind"] == "adalora" and "total_steps" not in settings["adapter"] and not start:
            shared_of(model, "default").config = dataclasses.replace(config, total_steps=steps)
        if processes.rank() == 0:
            left = "" if kept == len(problems) else f" in {kept:,} sequences"  # packed, or left out as too long
            what = f"{count:,} numbers train, {len(problems):,} problems{left}, {steps} steps"
            print(f"{command}: {what}{several}{whence}", flush=True)

    trainer = make_trainer(command, model, tokenizer, problems, settings, out, say)
    processes.wait()  # nobody looks for a run, or a checkpoint, in the folder any more
    if not resume:
        write_run(out, command, settings, seen)
    state = json.loads((start / "trainer_state.json").read_text()) if start else {"global_step": 0, "max_steps": 1}
    if state["global_step"] >= state["max_steps"]:
        say(state["max_steps"], len(trainer.train_dataset))
        load_adapter(model, start)  # all done but for the result: TRL would train a step more
    else:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if processes.rank() == 0:
        checkpoint.save(model, out / ADAPTER)
    if getattr(trainer, "use_vllm", False):
        trainer.vllm_generation.close()
    return out / ADAPTER


def resumed(command: str, out: str | os.PathLike, asked: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in `out`; `asked` are those that somebody gave again: {"adapter.r": 2, "seed": 0, ...}.

    ValueError if the run is of another command, or one that was asked for is not what the run has.
    """
    stored = read_run(out)
    if stored["command"] != command:
        raise ValueError(f"{out} is a run of {stored['command']!r}, expected {command!r} to resume it")
    settings = stored["settings"]
    for name in settings[command].keys() & INSTEAD.keys():  # of before they were refused: they never acted
        del settings[command][name]
    for name, value in asked.items():
        section, _, key = name.rpartition(".")
        has = (settings[section] if section else settings).get(key)
        if has != value:
            raise ValueError(f"{name} is {value!r}, but the run in {out} has {has!r}: a resumed run keeps its settings")
    return settings


def check(command: str, settings: dict[str, Any], problems: int) -> None:
    """ValueError unless batch, groups, data and the number of processes fit each other."""
    check_counts(command, settings)
    batch, share, several = settings["batch_size"], processes.count(), processes.count() > 1
    if batch < 1 or batch % share:
        raise ValueError(
            f"batch_size is {batch} sequences, expected "
            + (f"a multiple of {share}: so many processes share it" if several else "at least 1")
        )
    micro = settings["micro_batch_size"]
    if micro < 1 or batch // share % _micro(settings):
        each = f", {batch // share} for each of {share} processes" if several else ""
        raise ValueError(f"batch_size is {batch}{each}, expected a multiple of micro_batch_size, {micro}")
    if command == "grpo" and batch % settings["grpo"]["num_generations"]:
        raise ValueError(
            f"batch_size is {batch} sequences, expected a multiple of num_generations, "
            f"{settings['grpo']['num_generations']}: groups are whole"
        )
    if command == "grpo":
        serves, own = _samples_serve(settings), _accumulates(settings)
        cycle = serves // math.gcd(serves, own)
        if settings["save_every"] % cycle:
            raise ValueError(
                f"save_every is {settings['save_every']}, expected a multiple of {cycle}, the steps that grpo's "
                "samples serve (num_iterations, steps_per_generation): TRL keeps them in memory alone, and a run "
                "resumed between them would be another"
            )
    if problems < _problems_at_once(command, settings):
        raise ValueError(
            f"{settings['data']} has {problems} problems, and a step takes {_problems_at_once(command, settings)} "
            f"(batch_size {batch}): expected a smaller batch, or more problems"
        )


def check_counts(command: str, settings: dict[str, Any]) -> None:
    """ValueError for a number that no run can have, or that is none, and for a reward that is none."""
    if settings["reward"] not in gsm8k.SCORERS:
        raise ValueError(f"reward is {settings['reward']!r}, expected one of {', '.join(gsm8k.SCORERS)}")
    own = settings[command]
    for name in ("num_train_epochs", "num_generations"):
        must = not settings.get("steps") if name == "num_train_epochs" else command == "grpo"
        if must and own.get(name) is None:
            raise ValueError(f"{command}.{name} is missing, expected a number")
    whole = {n: settings.get(n) for n in ("steps", "save_every", "batch_size", "micro_batch_size", "seed")}
    names = ("num_generations", "max_completion_length", "max_length", "population", "prompts", "num_iterations",
             "steps_per_generation", "generation_batch_size")  # fmt: skip
    whole |= {f"{command}.{n}": own.get(n) for n in names}
    for name, value in whole.items():
        least = {"grpo.num_generations": 2, "seed": 0}.get(name, 1)
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    if settings["seed"] >= 1 << 32:  # torch takes more, numpy does not
        raise ValueError(f"seed is {settings['seed']}, expected less than 2^32")
    for name in ("num_train_epochs", "learning_rate", "sigma", "temperature"):
        value = own.get(name)
        if name not in own or (name == "num_train_epochs" and settings.get("steps") and type(value) in (int, float)):
            continue
        least = 0 if name == "temperature" else math.ulp(0.0)
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise ValueError(
                f"{command}.{name} is {value!r}, expected a number {'of 0 or more' if not least else 'above 0'}"
            )


def check_cache(command: str, settings: dict[str, Any]) -> str | None:
    """The name of transformers' cache that generates. ValueError for one that it does not have."""
    from transformers import GenerationConfig

    return GenerationConfig(cache_implementation=settings[command].get("cache_implementation")).cache_implementation


def total_steps(command: str, settings: dict[str, Any], problems: int) -> int:
    """Optimiser steps of the whole run, if SFT takes every problem as a sequence."""
    if settings.get("steps"):
        return settings["steps"]
    each = _problems_at_once(command, settings)
    if command == "grpo":  # which leaves out the last prompts of an epoch that are too few
        an_epoch = math.ceil(problems // each * _samples_serve(settings) / _accumulates(settings))
    else:  # SFT makes a smaller batch of them
        an_epoch = math.ceil(problems / each)
    return math.ceil(settings[command]["num_train_epochs"] * an_epoch)


def adapter_settings(command: str, settings: dict[str, Any], problems: int) -> dict[str, Any]:
    """The adapter's settings; AdaLoRA's schedule is that of the run unless it has one of its own."""
    adapter = dict(settings["adapter"])
    adapter.setdefault("seed", settings["seed"])
    if adapter.get("kind") == "adalora":
        adapter.setdefault("total_steps", total_steps(command, settings, problems))
    return adapter


def _problems_at_once(command: str, settings: dict[str, Any]) -> int:
    """Of a step; for GRPO of what is sampled at once."""
    if command == "sft":
        return settings["batch_size"]
    return _sampled(settings) * _share(settings) // settings["grpo"]["num_generations"]


def _share(settings: dict[str, Any]) -> int:
    """Sequences of one forward and backward, of all processes."""
    return _micro(settings) * processes.count()


def _accumulates(settings: dict[str, Any]) -> int:
    """Forwards and backwards of a step."""
    return settings["batch_size"] // _share(settings)


def _sampled(settings: dict[str, Any]) -> int:
    """Forwards and backwards that see what GRPO samples at once, each for the first time."""
    own = settings["grpo"]
    given = own.get("steps_per_generation") or (own.get("generation_batch_size") or 0) // _share(settings)
    return given or _accumulates(settings)


def _samples_serve(settings: dict[str, Any]) -> int:
    """Forwards and backwards from one sampling to the next."""
    return _sampled(settings) * (settings["grpo"].get("num_iterations") or 1)


def _micro(settings: dict[str, Any]) -> int:
    return min(settings["micro_batch_size"], settings["batch_size"] // processes.count())


def make_trainer(
    command: str,
    model: nn.Module,
    tokenizer,
    problems: Sequence[Problem],
    settings: dict[str, Any],
    out: str | os.PathLike,
    begin: Callable[[int, int], None] | None = None,
):
    """TRL's GRPOTrainer or SFTTrainer, as the settings say, with our log in `out`; not started.

    begin: called when it starts, with the steps and the sequences that TRL makes of the problems.
    model: with an adapter of ours, or one that PEFT adapted (after `tinylora.patch_peft()` its layers run the fused
    operator here as everywhere). ValueError for a setting that TRL does not have.
    """
    needed("trl", "rl", "training")
    import datasets
    import trl
    from transformers import PrinterCallback, ProgressCallback

    if processes.rank() > 0:
        datasets.disable_progress_bars()
    trainer = {"grpo": trl.GRPOTrainer, "sft": trl.SFTTrainer}[command]
    extra = {"reward_funcs": [_reward(name) for name in gsm8k.SCORERS]} if command == "grpo" else {}
    made = adapter_trainer(trainer)(
        model=model,
        args=arguments(command, settings, out),
        train_dataset=_dataset(command, tokenizer, problems, settings["instruction"]),
        processing_class=tokenizer,
        callbacks=_callbacks(Path(out) / LOG),
        **extra,
    )
    if len(made.train_dataset) == 0:
        raise ValueError(
            f"no problem has a token of its solution within sft.max_length, {settings['sft'].get('max_length')}: "
            "expected more"
        )
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    if begin is not None:
        made.callback_handler.callbacks.insert(0, _first(begin, len(made.train_dataset)))  # before a bar stands there
    return made


# What a run sets itself of TRL's arguments, and what a recipe says of it.
INSTEAD = {
    "output_dir": None, "seed": "seed", "max_steps": "steps", "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "batch_size", "ddp_broadcast_buffers": None, "bf16": None, "use_cpu": None,
    "save_steps": "save_every", "logging_steps": None, "disable_tqdm": None, "reward_weights": "reward",
}  # fmt: skip


def arguments(command: str, settings: dict[str, Any], out: str | os.PathLike):
    """TRL's GRPOConfig or SFTConfig for these settings. ValueError for one that it does not have."""
    import trl

    config = {"grpo": trl.GRPOConfig, "sft": trl.SFTConfig}[command]
    unknown = sorted(settings[command].keys() - {f.name for f in dataclasses.fields(config)})
    if unknown:
        raise ValueError(f"{command}.{unknown[0]} is no argument of TRL's {config.__name__}")
    micro = _micro(settings)
    own = {
        "output_dir": str(out),
        "seed": settings["seed"],
        "max_steps": settings.get("steps") or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": settings["batch_size"] // (micro * processes.count()),
        "ddp_broadcast_buffers": False,  # the frozen factors: 20 MB of a 7B model at every forward, the same everywhere
        "bf16": False,  # no autocast: the base has its dtype, v is fp32, rollouts and training compute the same
        "use_cpu": not torch.cuda.is_available(),
        "save_steps": settings["save_every"],
        "logging_steps": 1,
        "disable_tqdm": True,  # our own bar says more
    }
    defaults = {"save_total_limit": 2, "report_to": []}
    if check_cache(command, settings) == "static":  # a longer prompt is a larger cache, compiled anew
        defaults["pad_to_multiple_of"] = 128
    if command == "grpo":
        own["reward_weights"] = [float(name == settings["reward"]) for name in gsm8k.SCORERS]
    if settings[command].get("use_vllm"):
        for other in ("cache_implementation", "use_transformers_continuous_batching"):
            if settings[command].get(other):
                raise ValueError(f"{command}.{other} is {settings[command][other]!r}, expected none where vLLM samples")
    for name in settings[command].keys() & own.keys():
        what = f"the recipe's {INSTEAD[name]}" if INSTEAD[name] else "none: it is the run's own"
        raise ValueError(f"{command}.{name} is in the recipe, expected {what}")
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ValueError(
            f"accelerate's mixed_precision is {os.environ['ACCELERATE_MIXED_PRECISION']}, expected no (accelerate "
            "launch --mixed_precision no): the base has the dtype that --dtype says, and what trains is fp32"
        )
    return config(**defaults | settings[command] | own)


# Of TRL's arguments: an order drawn from random numbers that are gone, or checkpoints of less than there was.
# A server's random numbers are not even here.
NOT_RESUMED = {
    "train_sampling_strategy": "group_by_length", "ignore_data_skip": True, "save_only_model": True,
    "vllm_mode": "server",
}  # fmt: skip


def _refuse_what_does_not_resume(command: str, settings: dict[str, Any]) -> None:
    for name, value in NOT_RESUMED.items():
        if settings[command].get(name) == value:
            raise ValueError(f"{command}.{name} is {value!r}, expected none: no run resumes with it")


def _reward(name: str):
    """A scorer as TRL's reward function: 1 for a completion that it counts, else 0."""
    score = gsm8k.SCORERS[name]

    def reward(completions, final, **_):
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [float(score(text, f)) for text, f in zip(texts, final, strict=True)]

    reward.__name__ = name  # TRL logs it under this name
    return reward


def _dataset(command: str, tokenizer, problems: Sequence[Problem], instruction: str):
    from datasets import Dataset

    columns = {"prompt": [as_prompt(tokenizer, gsm8k.prompt(p.question, instruction)) for p in problems]}
    if command == "grpo":
        columns["final"] = [p.final for p in problems]
    elif tokenizer.chat_template is None:
        columns["completion"] = ["\n" + p.plain_solution for p in problems]
    else:
        columns["completion"] = [[{"role": "assistant", "content": p.plain_solution}] for p in problems]
    return Dataset.from_dict(columns)


def _first(begin: Callable[[int, int], None], kept: int):
    from transformers import TrainerCallback

    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            begin(state.max_steps, kept)

    return Begin()


def _callbacks(path: Path) -> list:
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        """One line of JSON a step, on the disk before the next one starts."""

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                cut_log(path, state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and "loss" in logs:
                named = {_NAMES.get(k, k): v for k, v in logs.items() if k != "step"}
                append(path, {"step": state.global_step} | named)

    class Progress(TrainerCallback):
        """A bar where somebody looks, a line a step where nobody does."""

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and "loss" in logs:
                found = {_NAMES.get(k, k): v for k, v in logs.items()}
                shown = {k: f"{found[k]:.3g}" for k in _SHOWN if isinstance(found.get(k), int | float)}
                self.bar.set_postfix(shown)
                self.bar.update(state.global_step - self.bar.n)
                if self.bar.disable:
                    words = "  ".join(f"{k} {v}" for k, v in shown.items())
                    print(f"step {state.global_step}/{state.max_steps}  {words}", flush=True)

        def on_train_end(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                self.bar.close()

    return [Log(), Progress()]
