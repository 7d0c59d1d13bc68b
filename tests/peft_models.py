"""Models that PEFT has adapted, and whether its layers ran ours or its own forward."""

import peft
import pytest
import torch
from models import qwen2

from tinylora.integrations.peft import counts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


CONFIGS = {
    "TinyLoRA": lambda **c: peft.TinyLoraConfig(**{"r": 2, "u": 5, "weight_tying": 0.7, "target_modules": TARGETS} | c),
    "LoRA": lambda **c: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | c),
    "VeRA": lambda **c: peft.VeraConfig(**{"r": 4, "target_modules": TARGETS} | c),
    "AdaLoRA": lambda **c: peft.AdaLoraConfig(
        **{"init_r": 4, "target_r": 2, "total_step": 50, "target_modules": TARGETS} | c
    ),
}


kinds = pytest.mark.parametrize("kind", CONFIGS)


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def adapted(kind, dtype=torch.float32, layers=2, **changes):
    """A model with PEFT's adapter away from its start."""
    model = peft.get_peft_model(qwen2(layers=layers, dtype=dtype), CONFIGS[kind](**changes))
    shake(model)
    return model.eval()


@torch.no_grad()
def shake(model, seed=3):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))


def layer_of(model, name="q_proj"):
    return model.base_model.model.model.layers[0].self_attn.get_submodule(name)


def only_fast(kind, at_least=1):
    found = counts()[kind]
    assert set(found) == {"fast"} and found["fast"] >= at_least, found


def only_fallback(kind, reason):
    found = counts()[kind]
    assert found["fast"] == 0 and len(found) == 2 and any(reason in r for r in found), found
