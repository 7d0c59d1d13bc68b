"""Files and folders that are whole or not there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def write_whole(path: Path, write: Callable[[str], object]) -> Path:
    """Let `write` fill a file beside `path`, and move it there whole. Returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as scratch:
        pass
    try:
        write(scratch.name)
        with open(scratch.name, "r+b") as written:
            os.fsync(written.fileno())
        os.chmod(scratch.name, 0o666 & ~umask())  # a temporary file is private, an adapter is not
        os.replace(scratch.name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch.name)
    return path


@contextlib.contextmanager
def whole_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well, and is removed otherwise."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{out.name}.", suffix=".tmp"))
    try:
        os.chmod(scratch, 0o777 & ~umask())
        yield scratch
        refuse_existing(out)
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_existing(out: str | os.PathLike) -> None:
    if os.path.lexists(out):
        raise ValueError(f"{out} exists, expected a new folder to write to")


def umask() -> int:
    """The process's file mode creation mask."""
    with contextlib.suppress(OSError, StopIteration):  # Linux says it; elsewhere it can only be read by setting it
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
