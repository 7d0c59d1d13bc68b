"""A run of evolution strategies in a folder, like those of `training`: logged, checkpointed, resumable. No TRL.

    run.json        the settings, written once at the start: a resumed run has the same
    log.jsonl       one line a generation: reward, best, spread, strict, lenient, moved, completions
    checkpoint-<n>  the adapter after n generations, the last two: its numbers and n are all the state there is
    adapter         the result, as `tinylora.save` writes it

A run killed at any moment and resumed gives the curve of one that was not.

Under torchrun each process evaluates its share of a generation's adapters; all then take the same step, and the first
writes the folder.
"""

import dataclasses
import math
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tinylora.adapters import config_from_dict
from tinylora.evolution import Evolution
from tinylora.integrations import processes, run_folder, training
from tinylora.integrations.run_folder import ADAPTER, LOG
from tinylora.integrations.transformers import load_model, prompt_ids
from tinylora.nn import checkpoint
from tinylora.nn.model import apply
from tinylora.tasks import gsm8k

KEYS = ("population", "prompts", "sigma", "learning_rate", "temperature", "max_completion_length", "num_train_epochs")
_SHOWN = ("reward", "best", "spread", "strict", "lenient", "moved")


class _SharedOut(Evolution):
    """Each process's generate() has every n-th adapter, n processes, and all get all rewards: so they agree on v."""

    def rewards(self, adapters: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> Tensor:
        mine = super().rewards(adapters[processes.rank() :: processes.count()], prompts, answers)
        found = torch.empty(len(adapters), len(prompts))
        for rank, rewards in enumerate(processes.gathered(mine)):
            found[rank :: processes.count()] = rewards
        return found


def run(settings: dict[str, Any], out: str | os.PathLike, resume: bool = False) -> Path:
    """Evolve as `settings` say (a recipe's values), in the folder `out`. Returns the adapter's.

    settings["es"] has KEYS: those of `Evolution`, the prompts of a generation, and passes over the data; and may have
    cache_implementation, `Evolution`'s cache, and tensor_parallel: all processes are one model then, and none has a
    share. "steps" beside them stands for so many generations instead. Rewards, resuming and errors are those of
    `training.run`; ValueError, too, for an adapter whose thin factors train: see `Evolution`.
    """
    with run_folder.at_work(Path(out)):
        return _run(settings, Path(out), resume)


def _run(settings: dict[str, Any], out: Path, resume: bool) -> Path:
    es = settings["es"]
    odd = sorted(es.keys() - {"cache_implementation", "tensor_parallel"} ^ set(KEYS))
    if odd:
        raise ValueError(f"es.{odd[0]} is {'missing' if odd[0] in KEYS else 'unknown'}, expected {', '.join(KEYS)}")
    training.check_counts("es", settings)
    training.check_cache("es", settings)
    if es["population"] % 2:
        raise ValueError(f"es.population is {es['population']}, expected an even number: pairs v ± σ ε")
    together = es.get("tensor_parallel", False)
    if type(together) is not bool:
        raise ValueError(f"es.tensor_parallel is {together!r}, expected true or false")
    if not together and processes.count() > 1 and es["population"] < processes.count():
        raise ValueError(
            f"es.population is {es['population']}, expected at least {processes.count()}: so many processes share it"
        )
    config = config_from_dict({"seed": settings["seed"]} | settings["adapter"])
    if not config.adapter_class.core_alone_trains:  # `Evolution` says so, too, once the model is there
        raise ValueError(f"the adapter is a {type(config).__name__}, expected TinyLoraConfig or LoraXSConfig")
    problems, seen = run_folder.enter(settings, out, resume)
    if not 0 < es["prompts"] <= len(problems):
        raise ValueError(f"es.prompts is {es['prompts']}, expected 1 to {len(problems)}, the problems that there are")
    processes.start()
    model, tokenizer = load_model(settings["model"], settings["dtype"], together)
    with processes.one_first(together):  # it decomposes the weights, and the others find that on the disk
        apply(model, config)
    start = _last_checkpoint(model, out) if resume else 0
    scores: dict[str, list[float]] = {}

    def reward(completions: Sequence[str], finals: Sequence[str]) -> list[float]:
        pairs = list(zip(completions, finals, strict=True))
        found = {name: [float(score(*pair)) for pair in pairs] for name, score in gsm8k.SCORERS.items()}
        scores.update(found)
        return found[settings["reward"]]

    evolution = (Evolution if together else _SharedOut)(
        model, tokenizer, reward, max_new_tokens=es["max_completion_length"], population=es["population"],
        sigma=es["sigma"], lr=es["learning_rate"], temperature=es["temperature"], seed=settings["seed"], number=start,
        cache=es.get("cache_implementation"),
    )  # fmt: skip
    processes.wait()  # nobody looks for a run, or a checkpoint, in the folder any more
    writes = processes.rank() == 0
    if not resume:
        run_folder.write_run(out, "es", settings, seen)
    if writes:
        run_folder.cut_log(out / LOG, start)
    an_epoch = len(problems) // es["prompts"]
    steps = settings.get("steps") or math.ceil(es["num_train_epochs"] * an_epoch)
    whence = f", resumed from checkpoint-{start}" if start else ", from the beginning" if resume else ""
    if writes:
        several = f", {processes.count()} processes" if processes.count() > 1 else ""
        what = f"{len(evolution.numbers()):,} numbers evolve, {len(problems):,} problems, {steps} generations"
        print(f"es: {what}{several}{whence}", flush=True)
    with tqdm(total=steps, initial=start, unit="generation", disable=None if writes else True) as bar:
        for step in range(start + 1, steps + 1):
            chosen = _problems_of(step - 1, an_epoch, problems, es["prompts"], settings["seed"])
            texts = [gsm8k.prompt(p.question, settings["instruction"]) for p in chosen]
            done = evolution.step([prompt_ids(tokenizer, text) for text in texts], [p.final for p in chosen])
            everybodys = processes.gathered(scores)
            if not writes:
                continue
            entry = {"step": step} | dataclasses.asdict(done)
            del entry["number"]
            for name in scores:
                values = [value for own in everybodys for value in own[name]]
                entry[name] = sum(values) / len(values)
            run_folder.append(out / LOG, entry)
            shown = {k: f"{entry[k]:.3g}" for k in _SHOWN}
            bar.set_postfix(shown)
            bar.update()
            if bar.disable:
                print(f"generation {step}/{steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
            if step % settings["save_every"] == 0:
                checkpoint.save(model, out / f"checkpoint-{step}")
                # Later ones could not be read, and stay: counted, they would have the new ones removed.
                for _, old in [found for found in run_folder.checkpoints(out) if found[0] <= step][2:]:
                    shutil.rmtree(old)
    if writes:
        checkpoint.save(model, out / ADAPTER)
    return out / ADAPTER


def _problems_of(number: int, an_epoch: int, problems: Sequence, count: int, seed: int) -> list:
    """The problems of a generation: every epoch has an order of its own, by the seed and the epoch alone."""
    epoch, place = divmod(number, an_epoch)
    order = random.Random(f"{seed} {epoch}").sample(range(len(problems)), len(problems))
    return [problems[i] for i in order[place * count : (place + 1) * count]]


def _last_checkpoint(model, out: Path) -> int:
    """Load the newest checkpoint that is whole; 0 if there is none. One that is not is named on stderr.

    ValueError if that one was made for another base.
    """
    for number, path in run_folder.checkpoints(out):
        try:
            checkpoint.read(path / checkpoint.FILE)
        except ValueError as error:
            if processes.rank() == 0:
                print(f"{path} is not whole and is passed over: {error}", file=sys.stderr)
        else:  # what is whole and does not fit (another base) ends the run: from the beginning it would be another
            checkpoint.load(model, path)
            return number
    return 0
