"""What must not stay, or grow, in a process that goes on."""

import gc
import json
import weakref

import pytest
import tiny_gsm8k
import torch
from models import qwen2, tokens
from torch import nn

import tinylora
from tinylora import cli
from tinylora.adapters import ada_lora
from tinylora.nn import model as models
from tinylora.nn.kept import Kept


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "config", [tinylora.TinyLoraConfig(n_tie=4), tinylora.LoraXSConfig(), tinylora.LoraConfig(r=2)]
)
@pytest.mark.parametrize("keeps", [False, True])
def test_a_dropped_model_is_gone_at_once(no_collector, monkeypatch, config, keeps):
    if keeps:  # as on a card
        monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
        for module in ("siblings", "linear"):
            monkeypatch.setattr(f"tinylora.nn.{module}.on_torch", lambda *operands: False)
    model = tinylora.apply(qwen2(), config)
    with torch.no_grad():
        model(tokens()), model(tokens())
    model(tokens()).logits.sum().backward()
    assert not keeps or any(layer._kept for layer in models.adapted_layers(model).values())
    weights = [weakref.ref(layer.weight) for layer in models.adapted_layers(model).values()]
    del model
    assert not [ref for ref in weights if ref() is not None]


def test_a_class_is_not_kept():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    tinylora.apply(model, tinylora.LoraXSConfig())
    gone = weakref.ref(Block)
    del Block, model
    gc.collect()
    assert gone() is None


def test_activate_walks_the_model_as_often_whatever_the_number_of_adapters(monkeypatch):
    model, calls, own = qwen2(layers=1), [], models.adapted_layers
    monkeypatch.setattr(models, "adapted_layers", lambda m: calls.append(m) or own(m))

    def walks():
        calls.clear()
        tinylora.activate(model, "a0")
        return len(calls)

    tinylora.apply(model, tinylora.TinyLoraConfig(n_tie=100), "a0")
    once = walks()
    for i in range(1, 12):
        tinylora.apply(model, tinylora.TinyLoraConfig(n_tie=100), f"a{i}")
    assert walks() == once
    assert [p.requires_grad for p in tinylora.adapter_parameters(model, "a0")] == [True]
    assert [p.requires_grad for p in tinylora.adapter_parameters(model, "a7")] == [False]


@pytest.mark.parametrize("tying", ["tiled", "structured"])
def test_groups_are_found_once(monkeypatch, tying):
    asked, own = [], tinylora.TinyLoraConfig.group_of
    monkeypatch.setattr(tinylora.TinyLoraConfig, "group_of", lambda self, sites: asked.append(1) or own(self, sites))
    config = tinylora.TinyLoraConfig(n_tie=2, tying=tying)
    few, many = qwen2(layers=1), qwen2(layers=3)
    tinylora.apply(few, config)
    once = len(asked)
    tinylora.apply(many, config)
    assert len(asked) == 2 * once
    shared = many.tinylora["default"]
    assert [shared.layers[s.name].group for s in shared.sites] == own(config, shared.sites)


def test_adalora_steps_while_another_thread_makes_one(monkeypatch):
    layer = tinylora.Linear.from_linear(nn.Linear(8, 8), tinylora.AdaLoraConfig(total_steps=10, r=2, target_r=1))
    shared = layer.tinylora["default"]

    def meanwhile(lam):
        shared.layers[f"another {len(shared.layers)}"] = shared.layers[""]
        return False

    monkeypatch.setattr(ada_lora, "stepped_elsewhere", meanwhile)
    layer(torch.ones(1, 8)).sum().backward()
    torch.optim.SGD(tinylora.adapter_parameters(layer), lr=0.1).step()


def evolve(tiny, out, steps, *more):
    flags = {"model": tiny / "model", "data": tiny / "data", "out": out, "steps": steps, "save-every": 1,
             "population": 2, "prompts": 2, "max-completion-length": 2, "n-tie": 100}  # fmt: skip
    return cli.main(["train", "es", *(str(x) for k, v in flags.items() for x in (f"--{k}", v)), *more])


def longer(out, steps):
    run = json.loads((out / "run.json").read_text())
    run["settings"]["steps"] = steps
    (out / "run.json").write_text(json.dumps(run))


def test_es_keeps_its_new_checkpoints_after_damaged_ones(tiny, tmp_path):
    out = tmp_path / "run"
    assert evolve(tiny, out, 6) == 0
    for n in (5, 6):
        (out / f"checkpoint-{n}" / "adapter.safetensors").write_bytes(b"damaged")
    longer(out, 3)
    assert evolve(tiny, out, 3, "--resume") == 0
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (2, 3, 5, 6)]


def test_es_does_not_start_again_on_another_base(tiny, tmp_path, capsys):
    out, base = tmp_path / "run", tmp_path / "base"
    (base / "data").parent.mkdir()
    tiny_gsm8k.write_problems(base / "data")
    tiny_gsm8k.write_model(base / "model", steps=2)
    assert evolve(base, out, 2) == 0
    log = (out / "log.jsonl").read_text()
    tiny_gsm8k.write_model(base / "model", steps=3)
    longer(out, 4)
    assert evolve(base, out, 4, "--resume") == 2
    assert "another base model" in capsys.readouterr().err
    assert (out / "log.jsonl").read_text() == log
