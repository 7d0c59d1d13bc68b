"""Recipes: a training run as a small JSON file, every value with where it is from.

    {"about": "...", "model": {"value": "Qwen/...", "source": "paper", "note": "section 5.1"}, "grpo": {...}, ...}

source: "paper" for what the paper states, "ours" for what it leaves open and we chose; the note says where, or why.
The sections "grpo" and "sft" hold arguments of TRL's GRPOConfig and SFTConfig by their own names, "es" those of
`tinylora.integrations.evolving`, "adapter" those of our configs. `SCHEMA` is all that a recipe has.
"""

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

DEFAULT = "gsm8k-13"
SOURCES = ("paper", "ours")
SCHEMA: dict[str, Any] = {
    "model": str, "data": str, "split": str, "dtype": str, "instruction": str, "reward": str, "seed": int,
    "batch_size": int, "micro_batch_size": int, "save_every": int,
    "adapter": dict, "grpo": dict, "sft": dict, "es": dict,
    "eval": {"split": str, "max_completion_length": int, "batch_size": int},
}  # fmt: skip


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(p.name.removesuffix(".json") for p in resources.files(__name__).iterdir() if p.name.endswith(".json"))


def read(recipe: str | os.PathLike) -> dict[str, Any]:
    """A recipe as its file has it, by the name of one that comes with the package, or by the path of one's own.

    ValueError: no such recipe, not JSON, a key that is missing or that no recipe has, a value of another type or
    without a source.
    """
    path = Path(recipe)
    if str(recipe) in names():
        text = resources.files(__name__).joinpath(f"{recipe}.json").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"recipe is {str(recipe)!r}, expected one of {', '.join(names())}, or a JSON file of your own")
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"recipe {recipe} is not JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.pop("about", None), str):
        raise ValueError(f'recipe {recipe} has no "about", expected an object with a text that says what it is')
    _check(found, SCHEMA, str(recipe))
    return found


def load(recipe: str | os.PathLike) -> dict[str, Any]:
    """A recipe's values alone, in its sections: what `read` has, without sources and notes. ValueError as `read`."""

    def values(entries):
        return {k: e["value"] if "value" in e else values(e) for k, e in entries.items()}

    return values(read(recipe))


def rows(recipe: str | os.PathLike) -> list[tuple[str, str, str, str]]:
    """(name, value, source, note) of every value, names as "grpo.learning_rate": a table. ValueError as `read`."""

    def walk(entries, prefix):
        for key, entry in entries.items():
            if "value" in entry:
                yield prefix + key, json.dumps(entry["value"]), entry["source"], entry["note"]
            else:
                yield from walk(entry, f"{prefix}{key}.")

    return list(walk(read(recipe), ""))


def _check(entries: dict, schema: dict, where: str) -> None:
    odd = sorted(entries.keys() ^ schema.keys())
    if odd:
        what = "missing" if odd[0] in schema else "unknown"
        raise ValueError(f"recipe {where}: {odd[0]!r} is {what}, expected {', '.join(schema)}")
    for key, kind in schema.items():
        entry, name = entries[key], f"{where}: {key}"
        if isinstance(kind, dict):
            _check_section(entry, name)
            _check(entry, kind, name)
        elif kind is dict:
            _check_section(entry, name)
            for inner, value in entry.items():
                _check_leaf(value, object, f"{name}.{inner}")
        else:
            _check_leaf(entry, kind, name)


def _check_section(entry, name: str) -> None:
    if not isinstance(entry, dict) or "value" in entry:
        raise ValueError(f"recipe {name} is {entry!r}, expected a section: an object of values")


def _check_leaf(entry, kind: type, name: str) -> None:
    fits = isinstance(entry, dict) and entry.keys() == {"value", "source", "note"} and entry["source"] in SOURCES
    if not fits or not isinstance(entry["note"], str):
        raise ValueError(
            f'recipe {name} is {entry!r}, expected {{"value": ..., "source": "paper" or "ours", "note": "..."}}'
        )
    if not isinstance(entry["value"], kind) or (kind is int and isinstance(entry["value"], bool)):
        raise ValueError(f"recipe {name} has the value {entry['value']!r}, expected {kind.__name__}")
