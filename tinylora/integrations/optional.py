"""Libraries that only a part of this one needs: the extras of pyproject.toml."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def installed(package: str) -> bool:
    """Whether it could be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that somebody made by hand, without a spec
        return False


def needed(package: str, extra: str, what: str) -> ModuleType:
    """The module. ImportError names the extra that brings it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'{what} needs {package}: pip install -e ".[{extra}]" in tinylora\'s checkout') from error
