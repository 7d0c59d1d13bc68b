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
import tempfile
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

import tinylora
from tinylora.adapters import config_from_dict
from tinylora.integrations import problems as data
from tinylora.integrations import processes
from tinylora.integrations.transformers import as_prompt, load_model
from tinylora.integrations.trl import adapter_trainer, last_checkpoint, load_adapter
from tinylora.nn import checkpoint
from tinylora.nn.model import adapter_parameters, apply
from tinylora.tasks import gsm8k
from tinylora.tasks.gsm8k import Problem

RUN, LOG, ADAPTER = "run.json", "log.jsonl", "adapter"
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
    since. ImportError without trl.
    """
    out = Path(out)
    require_trl()
    if resume:
        stored = read_run(out)
        same_processes(stored, out)
    else:
        refuse_used(out)
    problems = data.load_problems(settings["data"], settings["split"])
    check(command, settings, len(problems))
    seen = data.digest(problems)
    if resume and stored["data_digest"] != seen:
        raise ValueError(f"{settings['data']} has other problems than when {out} was started, expected the same")
    config = config_from_dict(adapter_settings(command, settings, len(problems)))
    writable(out)
    arguments(command, settings, out)  # whatever is wrong with the settings is said before a model is loaded
    start = last_checkpoint(out) if resume else None
    model, tokenizer = load_model(settings["model"], settings["dtype"])
    with processes.one_first():  # it decomposes the weights, and the others find that on the disk
        apply(model, config)
    trainer = make_trainer(command, model, tokenizer, problems, settings, out)
    processes.wait()  # nobody looks for a run, or a checkpoint, in the folder any more
    if not resume:
        write_run(out, command, settings, seen)
    count = sum(p.numel() for p in adapter_parameters(model))
    steps = total_steps(command, settings, len(problems))
    whence = f", resumed from {start.name}" if start else ", from the beginning" if resume else ""
    if processes.rank() == 0:
        several = f", {processes.count()} processes" if processes.count() > 1 else ""
        what = f"{count:,} numbers train, {len(problems):,} problems, {steps} steps"
        print(f"{command}: {what}{several}{whence}", flush=True)
    if start and int(start.name.rpartition("-")[2]) >= steps:
        load_adapter(model, start)  # all done but for the result: TRL would train a step more
    else:
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if processes.rank() == 0:
        checkpoint.save(model, out / ADAPTER)
    return out / ADAPTER


def resumed(command: str, out: str | os.PathLike, asked: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run in `out`; `asked` are those that somebody gave again: {"adapter.r": 2, "seed": 0, ...}.

    ValueError if the run is of another command, or one that was asked for is not what the run has.
    """
    stored = read_run(out)
    if stored["command"] != command:
        raise ValueError(f"{out} is a run of {stored['command']!r}, expected {command!r} to resume it")
    settings = stored["settings"]
    for name, value in asked.items():
        section, _, key = name.rpartition(".")
        has = (settings[section] if section else settings).get(key)
        if has != value:
            raise ValueError(f"{name} is {value!r}, but the run in {out} has {has!r}: a resumed run keeps its settings")
    return settings


def refuse_used(out: Path) -> None:
    """ValueError for a folder with a run, or with somebody's files that a run would remove or write over."""
    if (out / RUN).exists():
        raise ValueError(f"{out} holds a run already ({RUN}), expected another folder, or --resume to go on with it")
    for name in ("checkpoint-*", LOG, ADAPTER, "README.md"):  # the last is TRL's
        for found in out.glob(name):
            raise ValueError(f"{out} holds {found.name} and no {RUN}, expected another folder")


def write_run(out: Path, command: str, settings: dict[str, Any], data_digest: str) -> None:
    """What a resumed run has to have in common with this one, and what it ran on. The first process writes it."""
    what = {"command": command, "settings": settings, "data_digest": data_digest, "processes": processes.count()}
    text = json.dumps(what | {"versions": versions()}, indent=1, ensure_ascii=False) + "\n"
    if processes.rank() == 0:
        checkpoint.write_whole(out / RUN, lambda path: Path(path).write_text(text, encoding="utf-8"))


def read_run(out: str | os.PathLike) -> dict[str, Any]:
    """What a run's folder says of it. ValueError if there is no run."""
    path = Path(out) / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist, expected the folder of a run to resume") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not {"command", "settings", "data_digest"} <= found.keys():
        raise ValueError(f"{path} is not what a run writes, expected its command, settings and data_digest")
    return found


def same_processes(stored: dict[str, Any], out: Path) -> None:
    """ValueError unless there are as many processes as when the run in `out` was started."""
    before = stored.get("processes", 1)
    if before != processes.count():
        raise ValueError(
            f"the run in {out} has {before} processes, and now there are {processes.count()}: expected as many, for "
            f"each samples with random numbers of its own (torchrun --nproc-per-node {before} -m tinylora ...)"
        )


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """A log's lines. A last one that was being written when the process died is not among them."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # every whole line ends in a newline


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
    if settings["reward"] not in gsm8k.SCORERS:
        raise ValueError(f"reward is {settings['reward']!r}, expected one of {', '.join(gsm8k.SCORERS)}")
    if command == "grpo" and batch % settings["grpo"]["num_generations"]:
        raise ValueError(
            f"batch_size is {batch} sequences, expected a multiple of num_generations, "
            f"{settings['grpo']['num_generations']}: groups are whole"
        )
    cycle = settings["grpo"].get("num_iterations") or 1 if command == "grpo" else 1
    if settings["save_every"] % cycle:
        raise ValueError(
            f"save_every is {settings['save_every']}, expected a multiple of grpo.num_iterations, {cycle}: TRL keeps "
            "what it sampled for so many steps in memory alone, and a run resumed between them would be another"
        )
    if problems < _problems_a_step(command, settings):
        raise ValueError(
            f"{settings['data']} has {problems} problems, and a step takes {_problems_a_step(command, settings)} "
            f"(batch_size {batch}): expected a smaller batch, or more problems"
        )


def check_counts(command: str, settings: dict[str, Any]) -> None:
    """ValueError for a number that no run can have."""
    own = settings[command]
    whole = {"steps": settings.get("steps"), "save_every": settings["save_every"]}
    whole["micro_batch_size"] = settings["micro_batch_size"]
    names = ("num_generations", "max_completion_length", "max_length", "population", "prompts")
    whole |= {f"{command}.{n}": own.get(n) for n in names}
    for name, value in whole.items():
        least = 2 if name == "grpo.num_generations" else 1
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    for name in ("learning_rate",) if settings.get("steps") else ("num_train_epochs", "learning_rate"):
        value = own.get(name)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{command}.{name} is {value}, expected a number above 0")


def writable(folder: Path) -> None:
    """ValueError where no such folder can be made, or nothing written to it. It is not made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to: {error.strerror}") from None


def total_steps(command: str, settings: dict[str, Any], problems: int) -> int:
    """Optimiser steps of the whole run."""
    if settings.get("steps"):
        return settings["steps"]
    each = _problems_a_step(command, settings)
    # GRPO leaves out the last prompts of an epoch that fill no batch, SFT makes a smaller batch of them.
    an_epoch = problems // each if command == "grpo" else math.ceil(problems / each)
    return math.ceil(settings[command]["num_train_epochs"] * an_epoch)


def adapter_settings(command: str, settings: dict[str, Any], problems: int) -> dict[str, Any]:
    """The adapter's settings; AdaLoRA's schedule is that of the run unless it has one of its own."""
    adapter = dict(settings["adapter"])
    adapter.setdefault("seed", settings["seed"])
    if adapter["kind"] == "adalora":
        adapter.setdefault("total_steps", total_steps(command, settings, problems))
    return adapter


def _problems_a_step(command: str, settings: dict[str, Any]) -> int:
    return settings["batch_size"] // (settings["grpo"]["num_generations"] if command == "grpo" else 1)


def _micro(settings: dict[str, Any]) -> int:
    return min(settings["micro_batch_size"], settings["batch_size"] // processes.count())


def make_trainer(
    command: str,
    model: nn.Module,
    tokenizer,
    problems: Sequence[Problem],
    settings: dict[str, Any],
    out: str | os.PathLike,
):
    """TRL's GRPOTrainer or SFTTrainer, as the settings say, with our log in `out`; not started.

    model: with an adapter of ours, or one that PEFT adapted (after `tinylora.patch_peft()` its layers run the fused
    operator here as everywhere). ValueError for a setting that TRL does not have.
    """
    require_trl()
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
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made


def arguments(command: str, settings: dict[str, Any], out: str | os.PathLike):
    """TRL's GRPOConfig or SFTConfig for these settings. ValueError for one that it does not have."""
    import trl
    from transformers import GenerationConfig

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
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,  # our own bar says more
        "report_to": [],
    }
    defaults, cache = {}, settings[command].get("cache_implementation")
    GenerationConfig(cache_implementation=cache)  # ValueError for a name that it does not have
    if cache == "static":  # a longer prompt is a larger cache, compiled anew
        defaults["pad_to_multiple_of"] = 128
    if command == "grpo":
        own["reward_weights"] = [float(name == settings["reward"]) for name in gsm8k.SCORERS]
    return config(**defaults | settings[command] | own)


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


def _callbacks(path: Path) -> list:
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        """One line of JSON a step, on the disk before the next one starts."""

        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:  # what a killed run did after its last checkpoint is done again
                kept = [json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= state.global_step]
                checkpoint.write_whole(path, lambda scratch: Path(scratch).write_text("".join(kept), encoding="utf-8"))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero and "loss" in logs:
                entry = {"step": state.global_step} | {_NAMES.get(k, k): v for k, v in logs.items() if k != "step"}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                    os.fsync(file.fileno())

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


def require_trl() -> None:
    """ImportError that names the extra, without trl."""
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ImportError('training needs trl: pip install "tinylora[rl]"') from error


def versions() -> dict[str, str]:
    """What ran: for run.json and the results of an evaluation."""
    found = {"tinylora": tinylora.__version__}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
