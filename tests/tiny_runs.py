"""Training runs on the tiny model: by the command line, and trainers as it builds them."""

import hashlib
from pathlib import Path

import torch

import tinylora
from tinylora import cli, recipes
from tinylora.integrations import run_folder, training
from tinylora.integrations.problems import load_problems
from tinylora.integrations.transformers import load_model


def flags(tiny, out, steps, **more):
    values = {"model": tiny / "model", "data": tiny / "data", "out": out, "steps": steps, "batch_size": 16, "lr": 0.02,
              "save_every": 2, "n_tie": 4} | more  # fmt: skip
    given = {key: value for key, value in values.items() if value is not None}
    return [str(x) for key, value in given.items() for x in (f"--{key.replace('_', '-')}", value)]


def train(tiny, out, steps, command="grpo", resume=False, **more):
    more = {"max_completion_length": 10} | more if command == "grpo" else more
    arguments = [] if not resume else ["--resume"]
    return cli.main(["train", command, *flags(tiny, out, steps, **more), *arguments])


def settings(tiny, command="grpo", **more):
    found = recipes.load("gsm8k-13") | {"model": str(tiny / "model"), "data": str(tiny / "data"), "steps": 3}
    found |= {"batch_size": 16, "save_every": 2, "dtype": "float32"} | more
    found["grpo"] |= {"max_completion_length": 10, "learning_rate": 0.02}
    found["sft"] |= {"learning_rate": 0.02}
    return found


def curve(out):
    """A run's log without what depends on the clock."""
    return [{k: v for k, v in e.items() if "time" not in k and "per_second" not in k} for e in log(out)]


def log(out):
    return run_folder.read_log(Path(out) / "log.jsonl")


def bytes_of(model):
    """A hash of everything but the adapters' numbers."""
    sha = hashlib.sha256()
    for name, t in model.state_dict().items():
        if not name.startswith("tinylora.") and ".adapters." not in name:
            sha.update(name.encode() + t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def load_numbers(folder):
    return tinylora.nn.checkpoint.read(folder / "adapter.safetensors")[1]


def made(tiny, out, model=None, command="grpo", **more):
    """A trainer over a fresh model with an adapter, through the same function as the command line."""
    values = settings(tiny, command, **more)
    loaded, tokenizer = load_model(tiny / "model", values["dtype"])
    model = model or tinylora.apply(loaded, tinylora.TinyLoraConfig(u=1, n_tie=4))
    return training.make_trainer(command, model, tokenizer, load_problems(tiny / "data", "train"), values, out)
