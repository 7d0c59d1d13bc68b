"""Shapes of linear layers, derived from the models' own config.json files in bench/models and from nowhere else."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MODELS = Path(__file__).parent / "models"
# The projections of one block by what they read: those of one group read the same activations.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Layer:
    """One distinct linear layer of a model, weight [N, K], and every projection in a block that has this shape."""

    model: str
    projections: tuple[str, ...]
    N: int
    K: int
    bias: bool
    modules: int  # how often it occurs in the whole model

    @property
    def name(self) -> str:
        return "+".join(self.projections)


@cache
def models() -> tuple[str, ...]:
    """Names of all models, Qwen2.5 first (they carry the bars), smaller before larger."""
    names = (path.stem for path in MODELS.glob("*.json"))
    return tuple(sorted(names, key=lambda name: (not name.startswith("Qwen2.5"), block_numbers(name))))


def decoders() -> tuple[str, ...]:
    """The models whose blocks have the projections of SIBLINGS."""
    return tuple(name for name in models() if config(name)["model_type"] != "bert")


@cache
def config(model: str) -> dict:
    """The config.json of a model."""
    path = MODELS / f"{model}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in MODELS.glob("*.json")))
        raise ValueError(f"model {model!r} is not in bench/models, expected one of {known}")
    return json.loads(path.read_text())


def projections(model: str) -> dict[str, tuple[int, int, bool]]:
    """{projection: (N, K, bias)} of one transformer block."""
    c = config(model)
    H, I = c["hidden_size"], c["intermediate_size"]
    if c["model_type"] == "bert":
        square = dict.fromkeys(("query", "key", "value", "attention.output"), (H, H, True))
        return square | {"intermediate": (I, H, True), "output": (H, I, True)}
    if c["model_type"] not in ("qwen2", "llama"):
        raise ValueError(f"model_type {c['model_type']!r} is unknown, expected qwen2, llama or bert")
    head = c.get("head_dim") or H // c["num_attention_heads"]
    Q, KV = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    bias = c["model_type"] == "qwen2"  # Qwen2 has a bias on q, k and v, and its config.json does not say so
    return {
        "q_proj": (Q, H, bias),
        "k_proj": (KV, H, bias),
        "v_proj": (KV, H, bias),
        "o_proj": (H, Q, False),
        "gate_proj": (I, H, False),
        "up_proj": (I, H, False),
        "down_proj": (H, I, False),
    }


@cache
def layers(model: str) -> tuple[Layer, ...]:
    """The distinct linear layers inside a model's transformer blocks."""
    c = config(model)
    alike: dict[tuple[int, int, bool], list[str]] = {}
    for name, shape in projections(model).items():
        alike.setdefault(shape, []).append(name)
    depth = c["num_hidden_layers"]
    return tuple(Layer(model, tuple(names), *shape, len(names) * depth) for shape, names in alike.items())


def modules(model: str) -> int:
    """How many linear layers the transformer blocks of a model hold: what an adapter is put on."""
    return sum(layer.modules for layer in layers(model))


def block_numbers(model: str) -> int:
    """Numbers in the linear layers of one transformer block: the size that models are ordered by."""
    return sum(N * K for N, K, _ in projections(model).values())
