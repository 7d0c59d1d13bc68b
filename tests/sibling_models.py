"""Small Qwen2 models with siblings, or without, whose numbers are away from their start."""

import torch
from models import qwen2
from torch import nn

import tinylora
from tinylora import LoraXSConfig, TinyLoraConfig

CONFIGS = {
    "one v": TinyLoraConfig(r=2, u=3, n_tie=100),
    "a v each": TinyLoraConfig(r=2, u=2),
    "LoRA-XS": LoraXSConfig(r=4),
}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.plan = "ab"

    def forward(self, x):
        return self.a(x) + self.b(x)


def train(model, seed=3):
    """Random numbers where training would have put some."""
    g = torch.Generator().manual_seed(seed)
    for p in tinylora.adapter_parameters(model):
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def adapted(siblings=True, config=CONFIGS["one v"], **changes):
    return train(tinylora.apply(qwen2(**changes), config, siblings=siblings))


def groups(model) -> set[int]:
    return {id(m.siblings) for m in model.modules() if isinstance(m, tinylora.Linear) and m.siblings is not None}


def loss_and_grads(model, **inputs):
    model.zero_grad()
    x = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    loss = model(inputs_embeds=x, **inputs).loss
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in tinylora.adapter_parameters(model))]
