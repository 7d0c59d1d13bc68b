"""Modules that are trained whole beside an adapter (`modules_to_save`), one copy per adapter."""

import copy

from torch import Tensor, nn


def _plain_names(module, state: dict, prefix: str, metadata: dict) -> None:
    """Of a merged model the module itself, by the names that it had: what save_pretrained writes is a model."""
    if module.merged:
        own = f"{prefix}original." if module.active is None else f"{prefix}copies.{module.active}."
        plain = {prefix + n.removeprefix(own): t for n, t in state.items() if n.startswith(own)}
        for n in [n for n in state if n.startswith((f"{prefix}original.", f"{prefix}copies."))]:
            del state[n]
        state.update(plain)


def _own_names(module, state: dict, prefix: str, *_) -> None:
    """`_plain_names` undone, before a load into a merged model: what it left out is what the module has."""
    names = [n for n in module.running.state_dict() if prefix + n in state] if module.merged else []
    if names:
        own = "original" if module.active is None else f"copies.{module.active}"
        for n in names:
            state[f"{prefix}{own}.{n}"] = state.pop(prefix + n)
        for part in ("original", *(f"copies.{name}" for name in module.copies)):
            if part != own:
                for n, t in module.get_submodule(part).state_dict(prefix=f"{prefix}{part}.", keep_vars=True).items():
                    state.setdefault(n, t)


def whole_module(module: nn.Module) -> nn.Module:
    """The module, or the one that a SavedModule stands for."""
    return module.original if isinstance(module, SavedModule) else module


def lasting(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module, or of the one that a SavedModule stands for, by name."""
    original = whole_module(module)
    return dict(original.named_parameters()) | original.state_dict(keep_vars=True)


class SavedModule(nn.Module):
    """A module and its copies by adapter name; the active adapter's copy runs, without one the original.

    What is asked of it and it has not (`weight`, `in_features`) is asked of the one that runs.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None
        self.merged = False
        self._register_state_dict_hook(_plain_names)
        self.register_load_state_dict_pre_hook(_own_names)

    def add(self, name: str) -> None:
        fresh = copy.deepcopy(self.original)
        if any(t.is_meta for t in fresh.parameters()):  # a skeleton's: the numbers come from a file
            fresh = fresh.to_empty(device="cpu")
        self.copies[name] = fresh

    def remove(self, name: str) -> None:
        """Without the adapter's copy, if there is one."""
        if name in self.copies:
            del self.copies[name]
        if self.active == name:
            self.active = None

    @property
    def running(self) -> nn.Module:
        return self.original if self.active is None else self.copies[self.active]

    def forward(self, *args, **kwargs):
        return self.running(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # what Python asks of a class (copies, pickles) is asked of this one
                raise
            return getattr(self.running, name)
