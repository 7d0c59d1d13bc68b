"""Files that are whole or not there."""

import contextlib
import os
import tempfile
from collections.abc import Callable
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


def umask() -> int:
    """The process's file mode creation mask."""
    with contextlib.suppress(OSError, StopIteration):  # Linux says it; elsewhere it can only be read by setting it
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
