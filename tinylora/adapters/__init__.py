from typing import Any

from tinylora.adapters.base import Adapter, AdapterConfig, Factors, Shared, Site
from tinylora.adapters.lora_xs import LoraXSConfig, TinyLoraConfig

CONFIGS: dict[str, type[AdapterConfig]] = {c.kind: c for c in (TinyLoraConfig, LoraXSConfig)}


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """The config that `AdapterConfig.to_dict` wrote. ValueError names an unknown kind or field."""
    values = dict(values)
    kind = values.pop("kind", None)
    if kind not in CONFIGS:
        raise ValueError(f"adapter kind is {kind!r}, expected one of {', '.join(CONFIGS)}")
    try:
        return CONFIGS[kind](**values)
    except TypeError as error:
        raise ValueError(f"{CONFIGS[kind].__name__}: {error}") from None


__all__ = [
    "CONFIGS",
    "Adapter",
    "AdapterConfig",
    "Factors",
    "LoraXSConfig",
    "Shared",
    "Site",
    "TinyLoraConfig",
    "config_from_dict",
]
