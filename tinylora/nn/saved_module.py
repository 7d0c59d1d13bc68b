"""Modules that are trained whole beside an adapter (`modules_to_save`), one copy per adapter."""

import copy

from torch import nn


class SavedModule(nn.Module):
    """A module and its copies by adapter name; the active adapter's copy runs, without one the original.

    What is asked of it and it has not (`weight`, `in_features`) is asked of the one that runs.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def add(self, name: str) -> None:
        self.copies[name] = copy.deepcopy(self.original)

    @property
    def running(self) -> nn.Module:
        return self.original if self.active is None else self.copies[self.active]

    def forward(self, *args, **kwargs):
        return self.running(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.running, name)
