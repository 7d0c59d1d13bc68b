"""Tidy rows, one per measurement, in a CSV that is written row by row: a crash keeps what was measured."""

import contextlib
import csv
import datetime
import io
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # not on Windows; there nobody stops two runs
    fcntl = None

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"  # in git
OUT = Path(__file__).parent / "out"  # not in git
NO_PLOT = "no plot: matplotlib is not installed (pip install matplotlib)"


def now() -> str:
    """As it stands in every file of results."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_figure(width: float, height: float):
    """matplotlib's, in inches; None, and a line that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(NO_PLOT)
        return None
    return Figure(figsize=(width, height))


@dataclass
class Row:
    """One measurement. A number that was not measured is None, an empty field in the file."""

    op: str  # linear | layer | host | svd | model | peft | rollout | ceilings | parts | memory | folders
    model: str
    layer: str
    provider: str
    pass_: str  # `pass` in the file
    M: int | None = None
    N: int | None = None
    K: int | None = None
    r: int | None = None
    u: int | None = None
    dtype: str = ""
    p50_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    ratio_to_bare: float | None = None
    mode: str = ""  # on a GPU: eager, or captured in a CUDA graph
    bound_ms: float | None = None  # what the roofline of the same run allows at best
    peak_mb: float | None = (
        None  # allocated above what the layer itself holds (CUDA only), or kept (`memory`), or a process's (`folders`)
    )
    gb_per_s: float | None = None  # the fewest bytes the bare layer must move, per second
    tflops: float | None = None  # the bare layer's operations, per second
    angle_deg: float | None = None  # svd: largest angle to PEFT's subspace (a full SVD)
    rounds: int | None = None
    note: str = ""  # why there is no time
    device: str = ""
    threads: int | None = None
    torch: str = ""
    triton: str = ""
    peft: str = ""
    commit: str = ""  # tinylora's; "+dirty" where tracked files differ from it
    date: str = ""


COLUMNS = [f.name.rstrip("_") for f in fields(Row)]


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short commit of this checkout, "+dirty" if tracked files differ, "" outside of git."""

    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Unusable(ValueError):
    """A file of results that cannot be used; the message says all that there is to know."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """In here nobody else is, for the same path: two runs that each put a whole file in place lose rows.

    A file beside it is locked, not the path itself, which is replaced; a process that dies unlocks it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"{path.parent} cannot be made ({error.strerror}), expected a folder to write to") from None
    if fcntl is None:
        yield
        return
    beside = path.with_name(f".{path.name}.lock")
    while True:
        with beside.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Unusable(
                    f"{path} is being written by process {lock.read()}, expected no other run in this folder: wait "
                    "for it, or give --out another folder"
                ) from None
            if not os.fstat(lock.fileno()).st_nlink:
                continue  # the one before has just removed it
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                yield
            finally:
                beside.unlink(missing_ok=True)
            return


class Results:
    """The rows of one device in `folder`/<device>.csv, old ones and new.

    As a context: rows given to `add` are in the file at once, whatever happens afterwards. A row that one of them
    replaces (`newest`) is not read any more, and leaves the file at the end.
    """

    def __init__(self, folder: Path, device: torch.device):
        name = device_name(device)
        self.path = folder / f"{slug(name)}.csv"
        self.rows: list[Row] = []
        self._same = {
            "device": name,
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "torch": torch.__version__,
            "triton": version("triton"),
            "peft": version("peft"),
            "commit": commit(),
        }

    def __enter__(self) -> "Results":
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.path))
            self._tidy()  # what a killed run left half written must not run into the first row of this one
            self._file = stack.enter_context(self.path.open("a", newline="", encoding="utf-8"))
            self._leave = stack.pop_all()
        self._writer = csv.writer(self._file, lineterminator="\n")
        return self

    def __exit__(self, *_) -> None:
        with self._leave:
            self._tidy()

    def _tidy(self) -> None:
        """The file written anew: whole rows, the newest of each kind."""
        kept = read(self.path) if self.path.exists() else []
        fresh = self.path.with_suffix(".tmp")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(_cells(row) for row in kept)
        fresh.replace(self.path)

    def add(self, row: Row) -> Row:
        for name, value in self._same.items():
            setattr(row, name, value)
        row.date = now()
        self.rows.append(row)
        self._writer.writerow(_cells(row))
        self._file.flush()
        return row


def _cells(row: Row) -> list[str]:
    return ["" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in asdict(row).values()]


# What tells measurements of one device apart: of two rows with the same, the later one holds.
KEY = ("op", "model", "layer", "provider", "pass_", "M", "N", "K", "r", "u", "dtype", "mode")


def newest(rows: list[Row]) -> list[Row]:
    """The rows that hold, in the order of the file: of each KEY the last.

    A row that was "not measured" replaces no measurement. One that says why there is no time may leave fields empty (a
    provider that was not installed has no M): it holds until there is a later row of what it is about.
    """
    held: dict[tuple, Row] = {}
    for row in rows:
        key = tuple(getattr(row, name) for name in KEY)
        if key in held and row.note.startswith("not measured") and not _untimed(held[key]):
            continue
        held.pop(key, None)  # the later one stands where it was written
        held[key] = row
    whole = list(held.values())
    return [
        row
        for i, row in enumerate(whole)
        if not (_untimed(row) and any(_covers(later, row) for later in whole[i + 1 :]))
    ]


def _untimed(row: Row) -> bool:
    return row.note.startswith(("not measured", "wrong", "failed"))


def _covers(later: Row, row: Row) -> bool:
    return all(getattr(row, name) in (None, "", getattr(later, name)) for name in KEY)


def read(path: Path) -> list[Row]:
    """The rows of a CSV that hold (`newest`); a last line that was cut short is left out. Unusable, with the place,
    where somebody's edit left anything else."""
    kinds = {f.name.rstrip("_"): f.type for f in fields(Row)}

    def bad(line: int, column: str, why: str) -> Unusable:
        return Unusable(f"{path}, line {line}, column {column}: {why}")

    def value(text: str, line: int, column: str):
        kind, what = {int | None: (int, "a whole number"), float | None: (float, "a number")}.get(
            kinds[column], (str, "")
        )
        try:
            return kind(text) if text or kind is str else None
        except ValueError:
            raise bad(line, column, f"{text!r}, expected {what}") from None

    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # as spreadsheets write it
    except UnicodeDecodeError as error:
        raise Unusable(f"{path} is not UTF-8 ({error.reason} at byte {error.start}), expected it") from None
    # A last line that was cut within its date has as many cells as a whole one.
    if not text.rstrip(' \t"').endswith(("\n", "Z")):
        text = text[: text.rfind("\n") + 1]
    with io.StringIO(text, newline="") as file:
        lines = csv.reader(file)
        columns = next(lines, COLUMNS)
        for place, column in enumerate(columns, 1):
            if column not in kinds:
                raise bad(1, str(place), f"{column!r}, expected one of {', '.join(COLUMNS)}")
        for column in COLUMNS[:5]:
            if column not in columns:
                raise bad(1, column, "is missing")
        short = None  # the line that was
        for cells in lines:
            if cells == columns or not cells:
                continue
            if short:
                raise bad(*short)
            if len(cells) > len(columns):
                more = f"{len(cells)} cells, expected {len(columns)}"
                raise bad(lines.line_num, str(len(columns) + 1), more)
            if len(cells) < len(columns):
                short = lines.line_num, str(len(cells) + 1), f"{len(cells)} cells, expected {len(columns)}"
                continue
            named = zip(columns, cells, strict=True)
            values = {column: value(text, lines.line_num, column) for column, text in named}
            rows.append(Row(pass_=values.pop("pass"), **values))
    return newest(rows)
