import dataclasses
from typing import Any

from tinylora.adapters.ada_lora import AdaLoraConfig
from tinylora.adapters.base import (
    STACKED,
    Adapter,
    AdapterConfig,
    Factors,
    PackedRows,
    Rows,
    Shared,
    Site,
    own_storages,
)
from tinylora.adapters.lora import LoraConfig
from tinylora.adapters.lora_xs import LoraXSConfig, TinyLoraConfig
from tinylora.adapters.tied_lora import TiedLoraConfig
from tinylora.adapters.vera import VeraConfig

CONFIGS: dict[str, type[AdapterConfig]] = {
    c.kind: c for c in (TinyLoraConfig, LoraXSConfig, LoraConfig, AdaLoraConfig, VeraConfig, TiedLoraConfig)
}


def refuse_no_config(config: Any) -> None:
    """ValueError unless it is a config of one of these adapters."""
    if not isinstance(config, AdapterConfig):
        kind = config if isinstance(config, type) else type(config)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        what = f"the class {name}" if config is kind else f"a {name}"
        names = ", ".join(f"{c.__name__}(..)" for c in CONFIGS.values())
        raise ValueError(f"config is {what}, expected one of {names}")


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """The config that `AdapterConfig.to_dict` wrote. ValueError names an unknown kind or field."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in CONFIGS:
        raise ValueError(f"adapter kind is {kind!r}, expected one of {', '.join(CONFIGS)}")
    known = [field.name for field in dataclasses.fields(CONFIGS[kind])]
    unknown = sorted(values.keys() - set(known))
    if unknown:
        raise ValueError(f"{CONFIGS[kind].__name__} has no {unknown[0]}, expected some of {', '.join(known)}")
    try:
        return CONFIGS[kind](**values)
    except TypeError as error:
        raise ValueError(f"{CONFIGS[kind].__name__}: {error}") from None


__all__ = [
    "CONFIGS",
    "STACKED",
    "AdaLoraConfig",
    "Adapter",
    "AdapterConfig",
    "Factors",
    "LoraConfig",
    "LoraXSConfig",
    "PackedRows",
    "Rows",
    "Shared",
    "Site",
    "TiedLoraConfig",
    "TinyLoraConfig",
    "VeraConfig",
    "config_from_dict",
    "own_storages",
]
