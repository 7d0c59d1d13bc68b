"""GSM8K's problems from a local folder or the Hub."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tinylora.integrations.optional import needed
from tinylora.tasks import gsm8k
from tinylora.tasks.gsm8k import Problem

# Where the files lie in a folder: as on GitHub (openai/grade-school-math), and as on the Hub (openai/gsm8k).
_JSONL = ("{split}.jsonl", "data/{split}.jsonl", "grade_school_math/data/{split}.jsonl")
_PARQUET = ("{split}-*.parquet", "main/{split}-*.parquet")


def load_problems(source: str | os.PathLike, split: str) -> list[Problem]:
    """The problems of a split ("train", "test"), in the data set's order.

    source: a .jsonl file; a folder with <split>.jsonl, as on GitHub, or with <split>-*.parquet, as on the Hub; or a
    name on the Hub (openai/gsm8k), whose configuration "main" is read. ValueError: no such source, no file of that
    split in it, a record that is no problem. ImportError: parquet and the Hub need the library datasets.
    """
    path = Path(source)
    if path.is_file():
        return gsm8k.read_jsonl(path)
    if path.is_dir():
        for pattern in _JSONL:
            if (path / pattern.format(split=split)).is_file():
                return gsm8k.read_jsonl(path / pattern.format(split=split))
        for pattern in _PARQUET:
            files = sorted(path.glob(pattern.format(split=split)))
            if files:
                records = needed("datasets", "rl", "this data").load_dataset(
                    "parquet", data_files=[str(f) for f in files], split="train"
                )
                return [gsm8k.problem(r, f"{path}, record {i}") for i, r in enumerate(records)]
        held = sorted(p.name for p in path.iterdir())
        raise ValueError(
            f"{path} has no problems of the split {split!r}: expected {split}.jsonl (as on GitHub) or "
            f"{split}-*.parquet (as on the Hub), found {', '.join(held[:8]) or 'nothing'}"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise ValueError(f"{source} does not exist, expected a folder, a .jsonl file or a name on the Hub")
    datasets = needed("datasets", "rl", "this data")
    try:
        records = datasets.load_dataset(str(source), "main", split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data is {str(source)!r}, no local folder, and the Hub does not give it: {_first_line(error)}"
        ) from None
    return [gsm8k.problem(r, f"{source}, record {i}") for i, r in enumerate(records)]


def digest(problems: Sequence[Problem]) -> str:
    """SHA-256 of the problems in their order: whether two runs saw the same data."""
    return hashlib.sha256(json.dumps([list(p) for p in problems]).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
