"""A run's folder: who may write into it, and what says what ran there.

run.json        the settings, written once at the start: a resumed run has the same
log.jsonl       one line a step
checkpoint-<n>  the last two
adapter         the result, as `tinylora.save` writes it
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tinylora import __version__
from tinylora.adapters import files
from tinylora.integrations import processes
from tinylora.integrations.problems import digest, load_problems
from tinylora.tasks.gsm8k import Problem

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

RUN, LOG, ADAPTER = "run.json", "log.jsonl", "adapter"


@contextlib.contextmanager
def at_work(out: Path) -> Iterator[None]:
    """In here no other run works in the folder, which is made; ValueError where one does.

    A run that fails before its first step never was: whoever mends what was wrong may start it again.
    """
    with _locked(out):
        new = not (out / RUN).exists()
        try:
            yield
        except Exception:
            if new:
                _forget(out)
            raise


def enter(settings: dict[str, Any], out: Path, resume: bool) -> tuple[list[Problem], str]:
    """(the problems, their digest) of a run that starts in `out`, or with `resume` goes on there.

    ValueError: a folder in use, or without a run to resume; other problems, or another number of processes, than then.
    """
    if resume:
        stored = read_run(out)
        same_processes(stored, out)
    else:
        refuse_used(out)
    problems = load_problems(settings["data"], settings["split"])
    found = digest(problems)
    if resume and stored["data_digest"] != found:
        raise ValueError(f"{settings['data']} has other problems than when {out} was started, expected the same")
    return problems, found


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """A lock on the folder, by the first process. Death ends it, too."""
    if fcntl is None or processes.rank() > 0:
        yield
        return
    writable(out)
    made, folder = _lock(out)
    _held.add(folder)
    try:
        yield
    finally:
        if folder in _held:  # not so in a child
            with contextlib.suppress(OSError):  # where an error came before the first file
                for path in made:
                    path.rmdir()
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_UN)
            _held.discard(folder)
            os.close(folder)


def _lock(out: Path) -> tuple[list[Path], int]:
    """The folders that had to be made, the innermost first, and a descriptor that holds the lock."""
    while True:
        made = [path for path in (out, *out.parents) if not path.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            folder = os.open(out, os.O_RDONLY)
        except FileNotFoundError:
            continue  # the run before has just removed it, or what it lay in
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise ValueError(f"another run works in {out} now, expected its end, or another folder") from None
        except OSError:
            pass  # a file system without locks
        if os.fstat(folder).st_nlink:
            return made, folder
        os.close(folder)


_held: set[int] = set()


def _let_go() -> None:
    """A child that a data loader forks must not hold what its parent's death should end."""
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


def refuse_used(out: Path) -> None:
    """ValueError for a folder with a run, or with somebody's files that a run would remove or write over."""
    if (out / RUN).exists():
        raise ValueError(f"{out} holds a run already ({RUN}), expected another folder, or --resume to go on with it")
    for name in ("checkpoint-*", LOG, ADAPTER):
        for found in out.glob(name):
            raise ValueError(f"{out} holds {found.name} and no {RUN}, expected another folder")


def write_run(out: Path, command: str, settings: dict[str, Any], data_digest: str) -> None:
    """What a resumed run has to have in common with this one, and what it ran on. The first process writes it."""
    what = {"command": command, "settings": settings, "data_digest": data_digest, "processes": processes.count()}
    text = json.dumps(what | {"versions": versions()}, indent=1) + "\n"
    if processes.rank() == 0:
        files.write_whole(out / RUN, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _forget(out: Path) -> None:
    started = processes.rank() == 0 and (out / RUN).exists()
    if started and not read_log(out / LOG) and not any(out.glob("checkpoint-*")):
        for name in (RUN, LOG):
            (out / name).unlink(missing_ok=True)


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


def cut_log(path: Path, step: int) -> None:
    """Leave the lines up to this step: what a killed run did after its last checkpoint is done again."""
    kept = [json.dumps(entry) + "\n" for entry in read_log(path) if entry["step"] <= step]
    files.write_whole(path, lambda scratch: Path(scratch).write_text("".join(kept), encoding="utf-8"))


def append(path: Path, entry: dict[str, Any]) -> None:
    """One more line of a log, on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The run's checkpoints and their steps, the newest first."""
    found = [(p.name.removeprefix("checkpoint-"), p) for p in out.glob("checkpoint-*")]
    return sorted(((int(n), p) for n, p in found if n.isdecimal() and p.is_dir()), reverse=True)


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


def versions() -> dict[str, str]:
    """What ran: for run.json and the results of an evaluation."""
    found = {"tinylora": __version__}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
