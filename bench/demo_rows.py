"""The demo's runs and their rows, in a file: what trains them (demo.py) and what shows them (demo_tables.py) share."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

NOISE = 6  # letters before the answer in a noisy demonstration
SEEDS = (0, 1, 2)
ALL = 1000  # n_tie: more than there are modules, so one v for all
SWEEP_U, SWEEP_TIE, SWEEP_RATES, SWEEP_SEEDS = (1, 4, 13, 52), (1, 4, ALL), (0.005, 0.02), (0,)
SWEEP_STEPS = 60


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


def read(path: Path) -> list[dict[str, str]]:
    """The whole rows of a file of results, [] if there is none; a line that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        found = list(csv.DictReader(file))
    return [row for row in found if None not in row.values() and row.keys() == set(COLUMNS)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    with fresh.open("w", newline="", encoding="utf-8") as file:
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
    have = {key(row) for row in rows if row["step"] == row["steps"]}  # its last row is there, and so all of them
    rows = [row for row in rows if key(row) in have]
    if have == wanted:
        rows, have = [], set()
    return rows, [run for run in runs if key_of(run) not in have]


def run_of(row: dict) -> Run:
    """The run of a row."""
    whole, text = {"r", "u", "n_tie", "population", "steps", "seed"}, {"method", "data", "adapter"}
    return Run(**{
        c: row[c] if c in text else None if row[c] in ("", None) else int(row[c]) if c in whole else float(row[c])
        for c in RUN_COLUMNS
    })  # fmt: skip
