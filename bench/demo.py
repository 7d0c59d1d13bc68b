"""`python -m bench demo`: 13 numbers under GRPO, SFT and evolution strategies, on a model trained in the run.

A small character model learns to add in three ways, mostly carelessly (bench/addition.py). Then TRL's own GRPOTrainer
and SFTTrainer train it, with 13 numbers (TinyLoRA), with LoRA and in full; SFT on demonstrations that are clean, and on
ones with letters before the answer, that mean nothing. Three seeds; settings come from `--choose`, which looks at the
validation pairs alone; figures are of the test pairs. docs/demo.md says what this shows, and what it does not.
"""

import csv
import datetime
import hashlib
import logging
import multiprocessing
import os
import random
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import tinylora
from bench import addition
from bench.rows import NO_PLOT, commit, device_name, locked, version
from tinylora.evolution import Evolution

NOISE = 6  # letters before the answer in a noisy demonstration
BATCH, GROUP = 256, 16  # texts in a step of GRPO and SFT; completions of one prompt in GRPO
PROMPTS = 16  # of a generation of ES
NEW = 8  # tokens a rollout may have; an answer has four
SEEDS = (0, 1, 2)
WORKERS = 2
ALL = 1000  # n_tie: more than there are modules, so one v for all
PRETRAINING = 1000  # steps of the base


@dataclass(frozen=True)
class Run:
    """One training: what, on what, how. The first columns of the results."""

    method: str  # base | zero adapter | GRPO | SFT | ES
    data: str = ""  # SFT: clean | noisy
    adapter: str = ""  # TinyLoRA | LoRA | full
    r: int | None = None
    u: int | None = None
    n_tie: int | None = None
    population: int | None = None  # ES: perturbed adapters in a generation
    lr: float | None = None
    steps: int = 0
    seed: int | None = None

    @property
    def name(self) -> str:
        what = self.method + (f", {self.data} demonstrations" if self.data else "")
        what += f" of {self.population}" if self.population else ""
        tying = "tied" if self.n_tie == ALL else f"n_tie={self.n_tie}"
        how = {"TinyLoRA": f"TinyLoRA u={self.u} {tying}", "LoRA": f"LoRA r={self.r}", "full": "full fine-tuning"}
        return f"{what}: {how[self.adapter]}" if self.adapter else what


@dataclass(frozen=True)
class Row:
    """A run and what came of it. Accuracies of exact answers; empty where not measured."""

    run: Run
    trained: int
    step: int  # of the run, when measured: less than run.steps on the way
    completions: int  # texts generated for it by then
    validation_greedy: float | None
    validation_sampled: float | None
    test_greedy: float | None
    test_sampled: float | None
    cpu_s: float  # of training, evaluation left out
    wall_s: float
    base: str  # digest of the base's weights
    device: str
    torch: str
    transformers: str
    trl: str
    commit: str
    date: str

    def cells(self) -> dict[str, object]:
        values = asdict(self)
        values = values.pop("run") | values
        return {k: "" if v is None else f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}


RUN_COLUMNS = [f.name for f in fields(Run)]
COLUMNS = RUN_COLUMNS + [f.name for f in fields(Row) if f.name != "run"]


def tiny(**settings) -> dict:
    return {"adapter": "TinyLoRA", "r": 2, "u": 13, "n_tie": ALL} | settings


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
SWEEP_U, SWEEP_TIE, SWEEP_RATES, SWEEP_SEEDS = (1, 4, 13, 52), (1, 4, ALL), (0.005, 0.02), (0,)
SWEEP_STEPS = 60


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

    def now() -> dict[str, float]:
        return {"cpu": time.process_time() - start["cpu"], "wall": time.perf_counter() - start["wall"]}

    def evaluate(step: int) -> None:
        before = now()
        found = {
            f"{part}_{how}": addition.accuracy(model, words, pairs[part], temperature) if part in parts else None
            for part in ("validation", "test")
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0))
        }
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        times = {f"{k}_s": before[k] - spent[k] for k in before}
        rows.append(Row(**same, **found, **times, step=step, completions=step * per_step, date=date).cells())
        after = now()
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # tiny models are fastest so, and there is a worker for every core
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _end_with_parent() -> None:
    """A killed parent ends nobody: without this its workers would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


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


# --- files -----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """The whole rows of a file of results, [] if there is none; a line that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and row.keys() >= set(COLUMNS)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fresh.replace(path)


def key(row: dict) -> tuple[str, ...]:
    return tuple(str(row[c]) for c in RUN_COLUMNS)


def key_of(run: Run) -> tuple[str, ...]:
    return tuple("" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in asdict(run).values())


def unfinished(rows: list[dict], runs: Sequence[Run], base: str | None) -> tuple[list[dict], list[Run]]:
    """The rows that hold for these runs on this base, and the runs that are left; if all hold, none and all."""
    wanted = {key_of(run) for run in runs}
    rows = [row for row in rows if row["base"] == base and key(row) in wanted]
    have = {key(row) for row in rows}
    if have == wanted:
        rows, have = [], set()
    return rows, [run for run in runs if key_of(run) not in have]


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
            workers.bar.set_postfix_str(f"{_name(last)} {float(last[f'{parts[-1]}_greedy']):.3f}", refresh=False)
    order = {key_of(run): i for i, run in enumerate(runs)}
    rows = sorted(rows, key=lambda row: (order[key(row)], int(row["step"])))
    write(path, rows)
    return [{k: str(v) for k, v in row.items()} for row in rows]


def _run(row: dict) -> Run:
    """The run of a row."""
    whole, text = {"r", "u", "n_tie", "population", "steps", "seed"}, {"method", "data", "adapter"}
    return Run(**{
        c: row[c] if c in text else None if row[c] in ("", None) else int(row[c]) if c in whole else float(row[c])
        for c in RUN_COLUMNS
    })  # fmt: skip


def _name(row: dict) -> str:
    return _run(row).name


# --- the parts of the demo -------------------------------------------------------------------------------------------


def run_demo(folder: Path) -> None:
    controls = [Run("base", steps=PRETRAINING), *(Run("zero adapter", **tiny(), seed=s) for s in SEEDS)]
    runs = [*controls, *(replace(run, seed=s) for s in SEEDS for run in DEMO)]
    rows = carry_out(folder, "demo", runs, ("test",), anew=True)
    text = table(rows)
    (folder / "demo.md").write_text(text + "\n")
    plot(rows, folder / "demo.png")
    print(f"\n{text}\n\n{folder / 'demo'} (.csv, .md, .png)")


def run_choose(folder: Path) -> None:
    """Rates on the validation pairs, seed 0; the test pairs are not looked at."""
    runs = []
    for run in DEMO:
        tried = [replace(run, population=p, steps=n) for p, n in POPULATIONS.items()] if run.method == "ES" else [run]
        runs += [replace(r, lr=lr, seed=0) for r in tried for lr in RATES[run.method, run.adapter]]
    rows = carry_out(folder, "choose", runs, ("validation",))
    best = {name: max(group, key=_validation) for name, group in _grouped(rows, **CHOSEN).items()}
    lines = [[_name(r), f"{float(r['lr']):g}", _percent(r["validation_greedy"]), _percent(r["validation_sampled"]),
              "best" if r is best[replace(_run(r), **CHOSEN)] else ""] for r in rows]  # fmt: skip
    print(tabulate(lines, ["", "rate", "greedy", "T = 1", ""], tablefmt="github", disable_numparse=True))


CHOSEN = {"lr": None, "population": None, "steps": 0}


def _validation(row: dict) -> float:
    return float(row["validation_greedy"]) + float(row["validation_sampled"])


def _grouped(rows: list[dict], **without) -> dict[Run, list[dict]]:
    """Rows by their run with some of its fields set to `without`."""
    groups: dict[Run, list[dict]] = {}
    for row in rows:
        groups.setdefault(replace(_run(row), **without), []).append(row)
    return groups


def _percent(value) -> str:
    return f"{100 * float(value):.1f}"


def table(rows: list[dict]) -> str:
    """One line a method, mean and range over the seeds, as markdown; below it what it depends on."""
    lines = []
    for run, group in _grouped(rows, seed=None).items():
        line = [run.name, f"{int(group[0]['trained']):,}", f"{run.lr:g}" if run.lr else "", run.steps]
        for column in ("test_greedy", "test_sampled"):
            values = [float(row[column]) for row in group]
            spread = f" ({_percent(min(values))} to {_percent(max(values))})" if len(values) > 1 else ""
            line.append(_percent(sum(values) / len(values)) + spread)
        lines.append([*line, f"{sum(float(row['cpu_s']) for row in group) / len(group):.0f}"])
    headers = ["", "trained", "rate", "steps", "greedy, %", "T = 1, %", "CPU seconds"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n\n" + CAPTION


CAPTION = f"""\
Exact answers on {len(addition.split()["test"])} pairs that no training saw; mean (and range) over {len(SEEDS)} seeds,
on one base model. One accuracy has a standard error of at most 1.6 points; the seed draws the 13 directions, too.
What the effect depends on: the demonstrations. On clean ones SFT with the same 13 numbers does what GRPO does. Noisy
ones begin with {NOISE} random letters, which the base never saw, so that SFT's first loss is far higher than on
anybody's real demonstrations; LoRA and full fine-tuning learn the sum from them all the same. Most of what 13 numbers
gain is a choice among ways of answering that the base has already. It is the paper's mechanism in a toy, and no
replication of its result on GSM8K."""


def markdown(folder: Path) -> str:
    """The demo's results as bench/results/README.md shows them, "" if there are none."""
    rows = read(folder / "demo.csv")
    if not rows:
        return ""
    where = (
        f"{rows[0]['device']}; torch {rows[0]['torch']}, transformers {rows[0]['transformers']}, TRL {rows[0]['trl']}"
    )
    head = f"`make demo` (**{where}**; commit {rows[0]['commit']}, {rows[0]['date'][:10]}):"
    figure = "![accuracy against trained parameters](demo/demo.png)"
    return f"{head}\n\n{table(rows)}\n\n{figure}"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against trained parameters, RL and SFT, as Figures 1 and 2 of arXiv 2602.04118."""
    if not (plt := _pyplot()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.2), sharey=True)
    groups = _grouped(rows, seed=None)
    base = next(group[0] for run, group in groups.items() if run.method == "base")
    for axis, column, title in zip(
        axes, ("test_greedy", "test_sampled"), ("greedy answers", "sampled at T = 1"), strict=True
    ):
        kinds = [("GRPO", ""), ("SFT", "clean"), ("SFT", "noisy"), ("ES", "")]
        for color, (method, data) in enumerate(kinds):
            points = {}
            for run, group in groups.items():
                if (run.method, run.data) == (method, data):
                    points[int(group[0]["trained"])] = [float(row[column]) for row in group]
            label = f"SFT, {data} demonstrations" if data else method
            beside = {x: x * 1.2 ** (color - 1.5) for x in sorted(points)}  # so that no contestant hides another
            means = [sum(points[x]) / len(points[x]) for x in beside]
            axis.plot(beside.values(), means, f"C{color}-", marker="_", ms=12, label=label)
            for x, values in points.items():
                axis.plot([beside[x]] * len(values), values, f"C{color}o", ms=4, alpha=0.7)
        axis.axhline(float(base[column]), color="gray", ls="--", lw=1, label="base, 0 parameters")
        axis.set(xscale="log", xlabel="trained parameters", title=title, ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, test pairs")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names), bbox_to_anchor=(0.5, 0.2), frameon=False)
    figure.text(0.5, 0.01, "A dot is a seed. " + CAPTION, ha="center", va="bottom", fontsize=7.5)
    figure.tight_layout(rect=(0, 0.26, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run_evolution(folder: Path) -> None:
    """ES against GRPO, 13 numbers, by seconds and by texts generated, on the test pairs."""
    runs = [replace(run, seed=s) for s in SEEDS for run in DEMO if run.adapter == "TinyLoRA" and run.method in DUEL]
    rows = carry_out(folder, "evolution", [replace(r, steps=160) for r in runs], ("test",), every=8)
    plot_evolution(rows, folder / "evolution.png")
    text = evolution_table(rows)
    (folder / "evolution.md").write_text(text + "\n")
    print(f"\n{text}\n\n{folder / 'evolution'} (.csv, .md, .png)")


DUEL = ("GRPO", "ES")
MARKS = (0.4, 0.5, 0.6, 0.7)  # greedy accuracy, and what it takes to get there


def evolution_table(rows: list[dict]) -> str:
    """What each seed took to a greedy accuracy: CPU seconds and texts; "-" where it did not get there."""
    lines = []
    for run, group in _grouped(rows, seed=None).items():
        of_seed = _grouped(group).values()
        for mark in MARKS:
            reached = [next((r for r in curve if float(r["test_greedy"]) >= mark), None) for curve in of_seed]
            cells = [
                ", ".join("-" if r is None else f"{float(r[column]):,.{digits}f}" for r in reached)
                for column, digits in (("cpu_s", 1), ("completions", 0))
            ]
            lines.append([run.method, f"{mark:.0%}", *cells])
        ends = [
            ", ".join(_percent(curve[-1][column]) for curve in of_seed) for column in ("test_greedy", "test_sampled")
        ]
        lines.append([run.method, "at the end", f"greedy {ends[0]} %", f"T = 1 {ends[1]} %"])
    headers = ["method", "greedy accuracy", f"CPU seconds, seeds {SEEDS}", "texts generated"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def plot_evolution(rows: list[dict], path: Path) -> None:
    if not (plt := _pyplot()):
        return
    figure, axes = plt.subplots(2, 2, figsize=(10.5, 7), sharey="row")
    for i, (column, what) in enumerate((("test_greedy", "greedy"), ("test_sampled", "sampled at T = 1"))):
        for axis, x, label in zip(
            axes[i], ("cpu_s", "completions"), ("CPU seconds of training", "texts generated"), strict=True
        ):
            for run, curve in _grouped(rows).items():
                color = f"C{3 * (run.method == 'ES')}"
                values = [[float(row[c]) for row in curve] for c in (x, column)]
                axis.plot(*values, color, label=run.method if run.seed == SEEDS[0] else None, alpha=0.8)
            axis.set(xlabel=label)
            axis.grid(alpha=0.3)
        axes[i][0].set_ylabel(f"exact answers, {what}")
    axes[0][0].legend(loc="lower right")
    figure.suptitle(f"13 numbers, {len(SEEDS)} seeds: GRPO (with gradients) and evolution strategies (without)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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
    (folder / "sweep.md").write_text(text + "\n")
    print(f"\n{text}\n\n{folder / 'sweep'} (.csv, .md, .png)")


def chosen(rows: list[dict]) -> dict[Run, list[dict]]:
    """By cell (u, n_tie), the rows of the rate that did best on the validation pairs."""
    cells: dict[Run, list[dict]] = {}
    for run, group in _grouped([r for r in rows if r["method"] == "GRPO"], seed=None).items():
        cell = replace(run, lr=None)
        if cell not in cells or sum(map(_validation, group)) > sum(map(_validation, cells[cell])):
            cells[cell] = group
    return cells


def sweep_table(rows: list[dict]) -> str:
    cells = chosen(rows)
    lines = []
    for n_tie in SWEEP_TIE:
        line = ["all" if n_tie == ALL else n_tie]
        for u in SWEEP_U:
            group = next(g for run, g in cells.items() if (run.u, run.n_tie) == (u, n_tie))
            mean, sampled = (sum(float(r[c]) for r in group) / len(group) for c in ("test_greedy", "test_sampled"))
            line.append(f"{_percent(mean)} / {_percent(sampled)} ({int(group[0]['trained'])})")
        lines.append(line)
    base = next(r for r in rows if r["method"] == "base")
    head = f"Base: {_percent(base['test_greedy'])} / {_percent(base['test_sampled'])}. "
    head += f"Greedy / T = 1 accuracy in %, seed {', '.join(map(str, SWEEP_SEEDS))} (trained parameters):\n\n"
    return head + tabulate(lines, ["n_tie", *(f"u={u}" for u in SWEEP_U)], tablefmt="github", disable_numparse=True)


def plot_sweep(rows: list[dict], path: Path) -> None:
    """Accuracy against trained parameters, a line for each n_tie, as Figure 8 of arXiv 2602.04118."""
    if not (plt := _pyplot()):
        return
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    base = next(r for r in rows if r["method"] == "base")
    cells = chosen(rows)
    for axis, column, title in zip(
        axes, ("test_greedy", "test_sampled"), ("greedy answers", "sampled at T = 1"), strict=True
    ):
        for color, n_tie in enumerate(SWEEP_TIE):
            groups = sorted((g for run, g in cells.items() if run.n_tie == n_tie), key=lambda g: int(g[0]["trained"]))
            xs = [int(g[0]["trained"]) for g in groups]
            means, bars = _mean_and_range([[float(r[column]) for r in g] for g in groups])
            label = f"n_tie = {'all' if n_tie == ALL else n_tie}"
            axis.errorbar(xs, means, bars, fmt=f"C{color}o-", label=label, capsize=3)
        axis.axhline(float(base[column]), color="gray", ls="--", lw=1, label="base, 0 parameters")
        axis.set(xscale="log", xlabel="trained parameters (u = " + ", ".join(map(str, SWEEP_U)) + ")", title=title)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact answers, test pairs")
    axes[0].legend()
    figure.suptitle(
        f"GRPO, TinyLoRA r = 2, {SWEEP_STEPS} steps, {len(SWEEP_SEEDS)} seed; rates chosen on validation pairs"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


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


def _mean_and_range(values: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """Means, and the bars of an errorbar down to the least and up to the greatest value."""
    means = [sum(v) / len(v) for v in values]
    low = [max(0.0, m - min(v)) for m, v in zip(means, values, strict=True)]
    high = [max(0.0, max(v) - m) for m, v in zip(means, values, strict=True)]
    return means, [low, high]


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        print(NO_PLOT)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
