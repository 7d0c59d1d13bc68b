"""`python -m bench tune`: which launch shapes are the fastest on this card, for the table in kernels/tables.

Every one of `bench.candidates` for the distinct (N, K) of the models, alone and as siblings, every bucket of M
and both directions is held against fp64, then timed beside the default; a wrong one gets no time. Each finished cell is
appended to <out>/sm_<capability>.csv at once, so a killed run goes on where it stopped, and the table,
<out>/sm_<capability>.json, is written anew from all rows: an entry wherever something beat the default. Kernels are
compiled before, in as many processes as there are cores. `--dry-run` does all of it in Triton's interpreter with tiny
sizes: its times mean nothing.
"""

import csv
import json
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bench import rows, shapes, timing
from bench.check import reason
from bench.children import end_with_parent
from bench.rows import now, version

FORWARD, BACKWARD = DIRECTIONS = ("forward", "backward")
# By how much an entry must beat the default: what a second run would not measure again is no reason to differ.
MARGIN = 0.02
# What one launch less may cost: as much is lost again wherever the host is the slower one.
LAUNCH = 0.01
# At how many rows the candidates for batch invariance are timed: rollouts of some widths, and training.
PINNED_AT = (16, 128, 1024, 8192)
LEFT = 3  # the exit status where the minutes were over before all cells were measured
CHECKED = 64  # rows that are held against fp64
DRY = ((16, False), (130, False), (130, True))  # M, pinned


@dataclass(frozen=True)
class Cell:
    """Y [M, N] from K, or the backward's dX of that size, where the weight is seen through its transpose."""

    N: int
    K: int
    dtype: str
    r: int
    direction: str
    M: int
    pinned: bool = False  # one choice for every M (batch invariance); then M is where its candidates were timed
    parts: str = ""  # the widths of siblings' dY, "3584+512+512", where x comes as those


@dataclass
class Row:
    """One candidate of one cell; `of`: how many the cell has, so that half a cell is known as such."""

    N: int
    K: int
    dtype: str
    r: int
    direction: str
    M: int
    pinned: bool
    parts: str
    candidate: int  # 0 is the default
    of: int
    choice: str  # as JSON
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    note: str = ""  # why there is no time, or why the time does not count
    device: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""

    @property
    def cell(self) -> Cell:
        return Cell(self.N, self.K, self.dtype, self.r, self.direction, self.M, self.pinned, self.parts)


def cells(models: list[str], dtypes: list[str], ranks: list[int], buckets: list[int]) -> list[Cell]:
    """Every cell, those of many numbers first; dX of a layer [N, K] is the cell of K and N, transposed.

    Siblings are one layer, whose dY comes in parts. Batch-invariant layers run alone.
    """
    wanted: dict[tuple[int, int, str], int] = {}
    for model in models:
        shape, depth = shapes.projections(model), shapes.config(model)["num_hidden_layers"]
        groups = [(name,) for name in shape]
        groups += [group for group in shapes.SIBLINGS if len(group) > 1 and group[0] in shape]
        for group in groups:
            widths = [shape[name][0] for name in group]
            key = sum(widths), shape[group[0]][1], "+".join(map(str, widths)) if len(group) > 1 else ""
            wanted[key] = wanted.get(key, 0) + depth * key[0] * key[1]
    ordered = sorted(wanted, key=lambda shape: -wanted[shape])
    return [
        Cell(N, K, dtype, r, FORWARD, M, pinned)
        if direction == FORWARD
        else Cell(K, N, dtype, r, BACKWARD, M, pinned, parts)
        for M, pinned in [(M, False) for M in buckets] + [(M, True) for M in PINNED_AT if max(buckets) >= M]
        for dtype in dtypes
        for r in ranks
        for direction in DIRECTIONS
        for N, K, parts in ordered
        if not (pinned and parts)
    ]


class Operands:
    """x, w and factors of one cell, in copies enough to pass the cache; and what they give in fp64."""

    def __init__(self, cell: Cell, device: torch.device, buffers: int | None = None):
        from tinylora.kernels import tiles

        dtype = tiles.DTYPES[cell.dtype]
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

        bytes_ = dtype.itemsize * (cell.N * cell.K + cell.M * (cell.N + cell.K))
        self.buffers = buffers or timing.buffers_past_cache(bytes_, device)
        # As layers hold them: D [r, K] and Uᵀ [r, N]; the backward sees W through its transpose.
        x, w = normal(cell.M, cell.K), normal(cell.N, cell.K, scale=cell.K**-0.5)
        self.down, self.up = normal(cell.r, cell.K, scale=cell.K**-0.5), normal(cell.r, cell.N, scale=cell.r**-0.5).T
        self.core = torch.randn(cell.r, cell.r, generator=g, device=device) * cell.r**-0.5
        if cell.direction == BACKWARD:
            w = w.T.contiguous().T
        self.widths = [int(width) for width in cell.parts.split("+")] if cell.parts else [cell.K]
        self.xs = [[part.contiguous() for part in x.split(self.widths, 1)] for _ in range(self.buffers)]
        self.ws = [w.clone(memory_format=torch.preserve_format) for _ in range(self.buffers)]
        self.place(0)
        some = torch.linspace(0, cell.M - 1, min(CHECKED, cell.M), device=device).long()
        self.some, x64 = some, x[some].double()
        low_rank = x64 @ self.down.double().T @ self.core.double().T @ self.up.double().T
        self.exact = x64 @ w.double().T + low_rank
        own = (x @ w.T)[some] + ((x @ self.down.T) @ self.core.to(dtype).T @ self.up.T)[some]
        floor = torch.finfo(dtype).eps * self.exact.abs().max().item()
        self.allowed = 2 * (own.double() - self.exact).abs().max().item() + floor

    def place(self, i: int) -> None:
        self.x, self.w = self.xs[i], self.ws[i]

    def run(self, choice) -> Tensor:
        from tinylora.kernels import tiles
        from tinylora.kernels.core import Core
        from tinylora.ops.matmul import linear

        x = self.x[0] if len(self.x) == 1 else self.x
        want_z = len(self.x[0]) > tiles.DECODE_ROWS  # few rows are rollouts', which keep none
        return linear(x, self.w, self.down, Core(self.core), self.up, None, choice, want_z=want_z)[0]

    def wrong(self, choice) -> str:
        """Why this candidate gets no time, or nothing."""
        # What the memory holds of the candidate before must not pass for the numbers of one that stores nothing.
        first = self.x[0]
        stale = [first.new_full((len(first), self.w.shape[0]), math.nan) for _ in range(2)]
        del stale
        try:
            error = (self.run(choice)[self.some].double() - self.exact).abs().max().item()
        except Exception as failed:  # one that does not compile or launch must not end the others
            return " ".join(f"failed: {type(failed).__name__}: {failed}".split())[:200]
        return "" if error <= self.allowed else f"wrong: error {error:.1e}, allowed {self.allowed:.1e}"


def choices_of(cell: Cell, capability) -> list:
    """The candidates of a cell, the default first."""
    from bench import candidates
    from tinylora.kernels import tiles

    dtype = tiles.DTYPES[cell.dtype]
    if cell.pinned:
        return candidates.pinned(cell.N, cell.K, cell.r, dtype, capability)
    return candidates.of(cell.M, cell.N, cell.K, cell.r, dtype, capability)


def compile_once(cell: Cell, choices: list) -> None:
    """Run these candidates on few rows: Triton's cache on disk then holds their kernels."""
    operands = Operands(replace(cell, M=min(cell.M, 256)), torch.device("cuda"), buffers=1)
    for choice in choices:
        operands.wrong(choice)  # one that fails says so again when its turn comes


def compile_all(wanted: list[Cell], capability, workers: int) -> None:
    """`compile_once` for every kernel that the cells need, in processes of their own."""
    jobs, seen = [], set()
    for cell in wanted:
        fresh = []
        for choice in choices_of(cell, capability):
            # As much as the compiler sees of it; how K is cut, it only sees whether.
            thin = choice.thin and replace(choice.thin, split=min(choice.thin.split, 2))
            main = choice.main and (
                replace(choice.main, split=min(choice.main.split, 2)) if hasattr(choice.main, "split") else choice.main
            )
            whole = tuple(cell.K % t.k == 0 for t in (thin, main) if t)
            key = cell.dtype, cell.r, cell.direction, cell.parts.count("+"), thin, main, choice.expand, whole
            if key not in seen:
                seen.add(key)
                fresh.append(choice)
        jobs += [(cell, fresh[i : i + 4]) for i in range(0, len(fresh), 4)]
    if not jobs:
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        running = [pool.submit(compile_once, *job) for job in jobs]
        for done in tqdm(as_completed(running), total=len(jobs), desc="compile", unit="job"):
            done.result()


def measure(cell: Cell, capability, device: torch.device, budget: float) -> list[Row]:
    """All candidates of a cell."""
    from tinylora.kernels import tiles

    choices = choices_of(cell, capability)
    found = [
        Row(**asdict(cell), candidate=i, of=len(choices), choice=json.dumps(tiles.to_json(choice)))
        for i, choice in enumerate(choices)
    ]
    operands = Operands(cell, device)
    calls = {}
    for row, choice in zip(found, choices, strict=True):
        row.note = operands.wrong(choice)
        if not row.note:
            calls[row.candidate] = lambda choice=choice: operands.run(choice)
    if calls:

        def failed(i, error):
            found[i].note = reason(error)

        times = timing.alternate(calls, operands.place, operands.buffers, budget, device, failed=failed)
        for i, t in times.items():
            found[i].p50_ms, found[i].p20_ms, found[i].p80_ms, found[i].rounds = t.p50, t.p20, t.p80, t.rounds
    return found


def read(path: Path) -> list[Row]:
    """The rows of finished cells; what a killed run left of its last one is left out. Of a cell that two devices
    measured the later one's."""
    if not path.exists():
        return []
    kinds = {f.name: f.type for f in fields(Row)}
    found: dict[tuple[Cell, str], list[Row]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if None in line.values() or None in line:
                continue
            values = {}
            for name, text in line.items():
                kind = {int: int, bool: "True".__eq__, int | None: int, float | None: float}.get(kinds[name], str)
                values[name] = kind(text) if text or kind is str else None
            row = Row(**values)
            found.setdefault((row.cell, row.device), []).append(row)
    whole: dict[Cell, list[Row]] = {}
    for (cell, _), of_cell in found.items():
        if len(of_cell) == of_cell[0].of:
            whole.pop(cell, None)
            whole[cell] = of_cell
    return [row for of_cell in whole.values() for row in of_cell]


def entries(measured: list[Row]) -> list[dict]:
    """The table's entries: the fastest candidate of every cell where it beats the default by MARGIN; of a pinned shape
    the one with the least geometric mean over all of PINNED_AT, and none before it was timed at each of them."""
    from tinylora.kernels import tiles

    times: dict[Cell, dict[str, list[float]]] = {}  # by cell (pinned ones without their M), then by choice
    for row in measured:
        cell = replace(row.cell, M=tiles.ANY_M) if row.pinned else row.cell
        of_choice = times.setdefault(cell, {}).setdefault(row.choice, [])
        of_choice.append(math.inf if row.p50_ms is None or row.note else row.p50_ms)
    found = []
    for cell, by_choice in times.items():
        if cell.pinned and max(map(len, by_choice.values())) < len(PINNED_AT):
            continue
        means = {choice: statistics.geometric_mean(ms) for choice, ms in by_choice.items()}
        default, best = means[next(iter(means))], min(means, key=lambda c: means[c] * (1 + LAUNCH * _launches(c)))
        if means[best] < (1 - MARGIN) * default < math.inf:
            found.append({
                "N": cell.N, "K": cell.K, "rank": tiles.rank_class(cell.r), "dtype": cell.dtype,
                "transposed": cell.direction == BACKWARD, "M": cell.M,
                "ms": round(means[best], 6), "default_ms": round(default, 6), "choice": json.loads(best),
            })  # fmt: skip
    return found


def _launches(choice: str) -> int:
    """How many there are; without a `main` of ours the library's is one."""
    kernels = json.loads(choice)
    return len(kernels) + ("main" not in kernels)


def write_table(path: Path, file: "Rows") -> None:
    """The table, written whole and then put in place. Its head says where its rows were measured."""
    head = {
        name: ", ".join(sorted({getattr(row, name) for row in file.measured} or {file.same[name]}))
        for name in ("device", "torch", "triton", "commit")
    }
    lines = ",\n".join(json.dumps(entry) for entry in entries(file.measured))
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(head | {"rows": file.path.name})[:-1] + f', "entries": [\n{lines}\n]}}\n')
    fresh.replace(path)


class Rows:
    """The file of rows: finished cells are appended, and synced, one by one."""

    def __init__(self, path: Path, device: torch.device):
        self.path = path
        self.measured = read(path)
        self.same = {
            "device": rows.device_name(device), "torch": torch.__version__, "triton": version("triton"),
            "commit": rows.commit(),
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write(self.measured, "w")  # without what a killed run left half done

    def _write(self, found: list[Row], mode: str) -> None:
        target = self.path.with_suffix(".tmp") if mode == "w" else self.path
        with target.open(mode, newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if mode == "w":
                writer.writerow([f.name for f in fields(Row)])
            for row in found:
                values = asdict(row).values()
                writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
        if mode == "w":
            target.replace(self.path)

    def add(self, found: list[Row]) -> None:
        for row in found:
            for name, value in self.same.items():
                setattr(row, name, value)
            row.date = now()
        cells = {row.cell for row in found}
        self.measured = [row for row in self.measured if row.cell not in cells] + found
        self._write(found, "a")


def run(
    out: Path,
    device: torch.device,
    models: list[str],
    dtypes: list[str],
    ranks: list[int],
    buckets: list[int] | None,
    minutes: float,
    seconds: float = 2.0,
    dry: bool = False,
) -> int:
    """Measure what is not yet in the rows, for at most `minutes`; `seconds` a cell. Returns how many cells are left."""
    from tinylora.kernels import tiles
    from tinylora.ops.dispatch import capability_of

    capability = None if dry else capability_of(device)
    name = "dry_run" if dry else f"sm_{capability[0]}{capability[1]}"
    if dry:
        wanted = [Cell(40, 72, "fp16", 2, FORWARD, *cell) for cell in DRY] + [Cell(72, 40, "fp16", 2, BACKWARD, 16)]
    else:
        wanted = cells(models, dtypes, ranks, buckets or list(tiles.BUCKETS))
    file = Rows(out / f"{name}.csv", device)
    done = {row.cell for row in file.measured if row.device == file.same["device"]}
    left = [cell for cell in wanted if cell not in done]
    before = len(left)
    deadline = time.perf_counter() + 60 * minutes
    if not dry and os.cpu_count() > 2:
        compile_all(left, capability, os.cpu_count() - 1)
    with tqdm(total=len(wanted), initial=len(wanted) - len(left), desc="tune", unit="cell") as bar:
        while left and time.perf_counter() < deadline:
            cell = left.pop(0)
            bar.set_postfix_str(f"M = {cell.M}, {cell.N} x {cell.K} {cell.direction}")
            file.add(measure(cell, capability, device, seconds))
            bar.update()
    if len(left) < before or not (out / f"{name}.json").exists():
        write_table(out / f"{name}.json", file)
    count = len(json.loads((out / f"{name}.json").read_text())["entries"])
    print(f"{out / name}.json: {count} entries from {len(file.measured)} rows; {len(left)} of {len(wanted)} cells left")
    return len(left)
