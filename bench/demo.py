"""`python -m bench demo`: 13 numbers under GRPO, SFT and evolution strategies, on a model trained in the run.

A small character model learns to add in three ways, mostly carelessly (bench/addition.py). Then TRL's own GRPOTrainer
and SFTTrainer train it, with 13 numbers (TinyLoRA), with LoRA and in full; SFT on demonstrations that are clean, and on
ones with letters before the answer, that mean nothing. Three seeds; settings come from `--choose`, which looks at the
validation pairs alone; figures are of the test pairs. docs/demo.md says what this shows, and what it does not.
"""

import hashlib
import logging
import multiprocessing
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import tinylora
from bench import addition
from bench.children import end_with_parent
from bench.demo_rows import (
    NOISE,
    SEEDS,
    SWEEP_RATES,
    SWEEP_SEEDS,
    SWEEP_STEPS,
    SWEEP_TIE,
    SWEEP_U,
    Row,
    Run,
    key,
    key_of,
    read,
    run_of,
    tiny,
    unfinished,
    write,
)
from bench.demo_tables import (
    evolution_table,
    grouped,
    percent,
    plot,
    plot_evolution,
    plot_sweep,
    sweep_table,
    table,
    validation,
)
from bench.rows import commit, device_name, locked, now, version
from tinylora.evolution import Evolution

BATCH, GROUP = 256, 16  # texts in a step of GRPO and SFT; completions of one prompt in GRPO
PROMPTS = 16  # of a generation of ES
NEW = 8  # tokens a rollout may have; an answer has four
WORKERS = 2
PRETRAINING = 1000  # steps of the base

LORA, FULL = {"adapter": "LoRA", "r": 8}, {"adapter": "full"}

# What `make demo` trains. Rates, and the population of ES, are the best in bench/results/demo/choose.csv, by the mean
# of greedy and sampled accuracy on the validation pairs, with seed 0.
DEMO = (
    Run("GRPO", "", **tiny(), lr=0.005, steps=80),
    Run("SFT", "clean", **tiny(), lr=0.005, steps=80),
    Run("SFT", "noisy", **tiny(), lr=0.0002, steps=80),
    Run("ES", "", **tiny(population=16), lr=0.02, steps=160),
    Run("GRPO", "", **LORA, lr=0.001, steps=80),
    Run("SFT", "noisy", **LORA, lr=0.01, steps=100),
    Run("GRPO", "", **FULL, lr=0.0001, steps=80),
    Run("SFT", "noisy", **FULL, lr=0.003, steps=100),
)
# What `--choose` tries: rates, widened where the best stood at an end.
RATES = {
    ("GRPO", "TinyLoRA"): (0.0002, 0.001, 0.005, 0.02, 0.05, 0.1),
    ("SFT", "TinyLoRA"): (0.00001, 0.00005, 0.0002, 0.001, 0.005, 0.02, 0.05, 0.1),
    ("GRPO", "LoRA"): (0.0001, 0.0003, 0.001, 0.003, 0.01),
    ("SFT", "LoRA"): (0.001, 0.003, 0.01, 0.03),
    ("GRPO", "full"): (0.00003, 0.0001, 0.0003, 0.001, 0.003),
    ("SFT", "full"): (0.0003, 0.001, 0.003, 0.01),
    ("ES", "TinyLoRA"): (0.01, 0.02, 0.05, 0.1, 0.2),
}
POPULATIONS = {64: 60, 16: 240}  # of ES, and generations: as many texts in all
DUEL = ("GRPO", "ES")
CHOSEN = {"lr": None, "population": None, "steps": 0}


# --- one training, in a worker ---------------------------------------------------------------------------------------


def adapt(model: nn.Module, run: Run) -> nn.Module:
    """The model with the run's adapter, or with every parameter training."""
    if run.adapter == "TinyLoRA":
        return tinylora.apply(model, tinylora.TinyLoraConfig(r=run.r, u=run.u, n_tie=run.n_tie, seed=run.seed or 0))
    if run.adapter == "LoRA":
        return tinylora.apply(model, tinylora.LoraConfig(r=run.r, alpha=run.r, seed=run.seed or 0))
    return model.requires_grad_(run.adapter == "full")


def train_with_trl(model: nn.Module, words, run: Run, pairs: Sequence[addition.Pair], after_step) -> None:
    """GRPO or SFT by TRL's trainers, as they are. after_step(number) is called after every step."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    disable_progress_bars()  # theirs; ours is for the whole

    class AfterStep(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            after_step(state.global_step)

    common = {
        "output_dir": tempfile.gettempdir(),  # nothing is written
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": run.lr,
        "lr_scheduler_type": "constant",
        "max_steps": run.steps,
        "per_device_train_batch_size": BATCH,
        "seed": run.seed,
    }
    data = {"prompt": [addition.prompt(p) for p in pairs]}
    kwargs = {"model": model, "processing_class": words}
    if run.method == "GRPO":
        data["answer"] = [addition.answer(p) for p in pairs]
        settings = GRPOConfig(**common, num_generations=GROUP, max_completion_length=NEW)
        kwargs["reward_funcs"] = lambda completions, answer, **_: addition.reward(completions, answer)
        make = GRPOTrainer
    else:
        rng, noise = random.Random(run.seed), NOISE if run.data == "noisy" else 0
        data["completion"] = [addition.demonstration(p, noise, rng) for p in pairs]
        settings = SFTConfig(**common, max_length=None, eos_token=addition.EOS)
        make = SFTTrainer
    trainer = make(**kwargs, args=settings, train_dataset=Dataset.from_dict(data), callbacks=[AfterStep()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_with_evolution(model: nn.Module, words, run: Run, pairs: Sequence[addition.Pair], after_step) -> None:
    """tinylora.evolution, greedy answers, sigma as large as a step."""
    es = Evolution(
        model,
        words,
        addition.reward,
        max_new_tokens=NEW,
        population=run.population,
        sigma=run.lr,
        lr=run.lr,
        seed=run.seed,
    )
    rng = random.Random(run.seed)
    for step in range(1, run.steps + 1):
        chosen = rng.sample(pairs, PROMPTS)
        es.step(words([addition.prompt(p) for p in chosen]).input_ids, [addition.answer(p) for p in chosen])
        after_step(step)


def measure(run: Run, folder: Path, parts: Sequence[str], every: int = 0) -> list[dict]:
    """Train one run and evaluate it on `parts`; with `every`, on the way, too. The rows, as cells."""
    words, pairs = addition.tokenizer(), addition.split()
    model, digest = load_base(folder, words)
    adapt(model, run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_step = BATCH if run.method == "GRPO" else (run.population or 0) * PROMPTS
    same = {
        "run": run,
        "trained": trained,
        "base": digest,
        "device": device_name(torch.device("cpu")),
        **{package: version(package) for package in ("torch", "transformers", "trl")},
        "commit": commit(),
    }
    if run.method in ("GRPO", "SFT"):
        _import()  # outside of what is timed
    rows: list[dict] = []
    spent = {"cpu": 0.0, "wall": 0.0}  # by evaluation, to be left out
    start = {"cpu": time.process_time(), "wall": time.perf_counter()}

    def elapsed() -> dict[str, float]:
        return {"cpu": time.process_time() - start["cpu"], "wall": time.perf_counter() - start["wall"]}

    def evaluate(step: int) -> None:
        before = elapsed()
        found = {
            f"{part}_{how}": addition.accuracy(model, words, pairs[part], temperature) if part in parts else None
            for part in ("validation", "test")
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0))
        }
        times = {f"{k}_s": before[k] - spent[k] for k in before}
        rows.append(Row(**same, **found, **times, step=step, completions=step * per_step, date=now()).cells())
        after = elapsed()
        for k in spent:
            spent[k] += after[k] - before[k]

    def after_step(step: int) -> None:
        _tick()
        if every and step % every == 0 and step < run.steps:
            evaluate(step)

    if every:
        evaluate(0)
    if run.method in ("GRPO", "SFT"):
        train_with_trl(model, words, run, pairs["train"], after_step)
    elif run.method == "ES":
        train_with_evolution(model, words, run, pairs["train"], after_step)
    evaluate(run.steps)
    return rows


# --- the base model --------------------------------------------------------------------------------------------------


def make_base(folder: Path) -> dict[str, str]:
    """Pretrain, write the weights, return what it took as the columns cpu_s and wall_s."""
    from safetensors.torch import save_model

    cpu, wall = time.process_time(), time.perf_counter()
    model = addition.pretrain(addition.tokenizer(), addition.split()["train"], PRETRAINING, tick=_tick)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / "base.tmp"
    save_model(model, fresh)
    fresh.replace(folder / "base.safetensors")
    return {"cpu_s": f"{time.process_time() - cpu:.5g}", "wall_s": f"{time.perf_counter() - wall:.5g}"}


def load_base(folder: Path, words) -> tuple[nn.Module, str]:
    from safetensors.torch import load_model

    path = folder / "base.safetensors"
    model = addition.small_qwen2(words)
    load_model(model, path)
    return model.eval(), hashlib.sha256(path.read_bytes()).hexdigest()[:10]


# --- workers ---------------------------------------------------------------------------------------------------------

_steps = None  # in a worker: the counter that the progress bar shows


def _tick() -> None:
    if _steps is not None:
        with _steps.get_lock():
            _steps.value += 1


def _start_worker(steps) -> None:
    global _steps
    _steps = steps
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: what is whole is in the file
    torch.set_num_threads(1)  # tiny models are fastest so, and there is a worker for every core
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _import() -> None:
    import trl  # noqa: F401  takes seconds, meanwhile another worker pretrains


class Workers:
    """Processes of one thread each, and one progress bar of all their steps."""

    def __init__(self, steps: int, what: str):
        context = multiprocessing.get_context("spawn")
        self.steps = context.Value("q", 0)
        self.pool = ProcessPoolExecutor(WORKERS, context, _start_worker, (self.steps,))
        self.bar = tqdm(total=steps, desc=what, unit="step", smoothing=0.05)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.pool.shutdown(wait=kind is None, cancel_futures=True)
        self.bar.close()

    def results(self, calls: Iterable[tuple[Callable, tuple]]) -> Iterable:
        """What the calls return, as they end."""
        pending = {self.pool.submit(function, *arguments) for function, arguments in calls}
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            self.bar.update(self.steps.value - self.bar.n)
            for future in done:
                yield future.result()


# --- all runs of a part ----------------------------------------------------------------------------------------------


def carry_out(
    folder: Path, name: str, runs: Sequence[Run], parts: Sequence[str], every: int = 0, anew: bool = False
) -> list[dict]:
    """Every run's rows, in <folder>/<name>.csv as they come.

    A file that an interrupted call left is completed: its runs are not repeated if the base is still the same. A whole
    file is made again. `anew`: with a base pretrained again, too; otherwise one is pretrained if there is none.
    """
    path, base = folder / f"{name}.csv", folder / "base.safetensors"
    digest = hashlib.sha256(base.read_bytes()).hexdigest()[:10] if base.exists() else None
    rows, left = unfinished(read(path), runs, digest)
    pretrain = digest is None or (anew and not rows)
    steps = sum(run.steps for run in left if run.method != "base") + pretrain * PRETRAINING
    with Workers(steps, name) as workers:
        seconds = {}
        if pretrain:
            for done in workers.results([(make_base, (folder,)), (_import, ())]):
                seconds |= done or {}
        write(path, rows)
        longest_first = sorted(left, key=lambda run: -run.steps * (1 + (run.adapter != "TinyLoRA")))
        for found in workers.results((measure, (run, folder, parts, every)) for run in longest_first):
            if found[0]["method"] == "base":
                found[0] |= seconds
            rows += found
            write(path, rows)
            last = found[-1]
            workers.bar.set_postfix_str(f"{run_of(last).name} {float(last[f'{parts[-1]}_greedy']):.3f}", refresh=False)
    order = {key_of(run): i for i, run in enumerate(runs)}
    rows = sorted(rows, key=lambda row: (order[key(row)], int(row["step"])))
    write(path, rows)
    return [{k: str(v) for k, v in row.items()} for row in rows]


# --- the parts of the demo -------------------------------------------------------------------------------------------


def run_demo(folder: Path) -> None:
    controls = [Run("base", steps=PRETRAINING), *(Run("zero adapter", **tiny(), seed=s) for s in SEEDS)]
    runs = [*controls, *(replace(run, seed=s) for s in SEEDS for run in DEMO)]
    rows = carry_out(folder, "demo", runs, ("test",), anew=True)
    text = table(rows)
    (folder / "demo.md").write_text(text + "\n", encoding="utf-8")
    plot(rows, folder / "demo.png")
    print(f"\n{text}\n\n{folder / 'demo'} (.csv, .md, .png)")


def run_choose(folder: Path) -> None:
    """Rates on the validation pairs, seed 0; the test pairs are not looked at."""
    runs = []
    for run in DEMO:
        tried = [replace(run, population=p, steps=n) for p, n in POPULATIONS.items()] if run.method == "ES" else [run]
        runs += [replace(r, lr=lr, seed=0) for r in tried for lr in RATES[run.method, run.adapter]]
    rows = carry_out(folder, "choose", runs, ("validation",))
    best = {name: max(group, key=validation) for name, group in grouped(rows, **CHOSEN).items()}
    lines = [[run_of(r).name, f"{float(r['lr']):g}", percent(r["validation_greedy"]), percent(r["validation_sampled"]),
              "best" if r is best[replace(run_of(r), **CHOSEN)] else ""] for r in rows]  # fmt: skip
    print(tabulate(lines, ["", "rate", "greedy", "T = 1", ""], tablefmt="github", disable_numparse=True))


def run_evolution(folder: Path) -> None:
    """ES against GRPO, 13 numbers, by seconds and by texts generated, on the test pairs."""
    runs = [replace(run, seed=s) for s in SEEDS for run in DEMO if run.adapter == "TinyLoRA" and run.method in DUEL]
    rows = carry_out(folder, "evolution", [replace(r, steps=160) for r in runs], ("test",), every=8)
    plot_evolution(rows, folder / "evolution.png")
    text = evolution_table(rows)
    (folder / "evolution.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'evolution'} (.csv, .md, .png)")


def run_sweep(folder: Path) -> None:
    """GRPO over u and n_tie. The rate of each cell is the best of SWEEP_RATES on the validation pairs."""
    runs = [
        Run("GRPO", "", **tiny(u=u, n_tie=n_tie), lr=lr, steps=SWEEP_STEPS, seed=seed)
        for n_tie in SWEEP_TIE
        for u in SWEEP_U
        for lr in SWEEP_RATES
        for seed in SWEEP_SEEDS
    ]
    rows = carry_out(folder, "sweep", [Run("base", steps=PRETRAINING), *runs], ("validation", "test"))
    plot_sweep(rows, folder / "sweep.png")
    text = sweep_table(rows)
    (folder / "sweep.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'sweep'} (.csv, .md, .png)")


MINUTES = {  # of the parts beside the demo itself, on two quiet cores
    "choose": "the rates, on the validation pairs: about 4 minutes",
    "sweep": "GRPO over u and n_tie, as the paper's Figure 8: about 3 minutes",
    "evolution": "evolution strategies against GRPO, by seconds and by texts: about 3 minutes",
}
PARTS = {"demo": run_demo, "choose": run_choose, "sweep": run_sweep, "evolution": run_evolution}


def run(out: Path, part: str = "demo") -> None:
    """One part, into <out>/demo/."""
    started = time.perf_counter()
    with locked(out / "demo" / "base.safetensors"):  # every part reads it, and some make it
        PARTS[part](out / "demo")
    print(f"{time.perf_counter() - started:.0f} s")
