"""tinylora: low-rank adapters at the price of the frozen layer alone.

model = tinylora.apply(model, tinylora.TinyLoraConfig(u=1, n_tie=16))
optimizer = torch.optim.Adam(tinylora.adapter_parameters(model), lr=1e-3)
...
tinylora.save(model, "adapter")
"""

__version__ = "0.1.0"

from tinylora import analysis, ops
from tinylora.adapters import (
    AdaLoraConfig,
    LoraConfig,
    LoraXSConfig,
    TiedLoraConfig,
    TinyLoraConfig,
    VeraConfig,
)
from tinylora.integrations.continuous_batching import adapter_ids
from tinylora.integrations.peft import patch_peft, unpatch_peft
from tinylora.integrations.peft_files import load, save
from tinylora.nn.linear import Linear
from tinylora.nn.model import activate, adapter_names, adapter_parameters, apply, disabled, merge, remove, unmerge
from tinylora.nn.rows import stack

__all__ = [
    "AdaLoraConfig",
    "Linear",
    "LoraConfig",
    "LoraXSConfig",
    "TiedLoraConfig",
    "TinyLoraConfig",
    "VeraConfig",
    "activate",
    "adapter_ids",
    "adapter_names",
    "adapter_parameters",
    "analysis",
    "apply",
    "disabled",
    "load",
    "merge",
    "ops",
    "patch_peft",
    "remove",
    "save",
    "stack",
    "unmerge",
    "unpatch_peft",
]
