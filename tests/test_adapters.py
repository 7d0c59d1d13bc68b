"""Configs, ties, counts, P: what an adapter is before there is a model."""

import json
import subprocess
import sys

import pytest
import torch

from tinylora import LoraXSConfig, TinyLoraConfig
from tinylora.adapters import Factors, Site, config_from_dict, noise
from tinylora.adapters.tying import tie_groups

TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sites(layers):
    return [Site(f"model.layers.{i}.{t}", 8, 8) for i in range(layers) for t in TYPES]


@pytest.mark.parametrize(
    "layers, u, n_tie, tying, count",
    [
        # Qwen2.5-7B, 28 layers: arXiv 2602.04118, figure 1 and table 2
        *(
            (28, 1, n, "tiled", c)
            for n, c in ((256, 1), (128, 2), (64, 4), (32, 7), (16, 13), (8, 25), (4, 49), (1, 196))
        ),
        (28, 32, 1, "tiled", 6272),
        (28, 13, 1000, "tiled", 13),
        # Qwen2.5-3B, 36 layers: figure 4
        *((36, 1, n, "tiled", c) for n, c in ((32, 8), (16, 16), (8, 32), (4, 63), (1, 252))),
        *((36, 1, n, "structured", c) for n, c in ((32, 14), (16, 21), (8, 35), (4, 63), (2, 126), (1, 252))),
    ],
)
def test_counts_are_the_papers(layers, u, n_tie, tying, count):
    assert TinyLoraConfig(u=u, n_tie=n_tie, tying=tying).count(sites(layers)) == count


def test_ties_are_contiguous_with_one_short_group():
    groups = tie_groups(sites(28), 16, "tiled")
    assert groups == sorted(groups) and [groups.count(g) for g in range(13)] == [16] * 12 + [4]
    groups = tie_groups(sites(36), 16, "structured")
    by_type = {t: [g for g, s in zip(groups, sites(36), strict=True) if s.name.endswith(t)] for t in TYPES}
    for i, t in enumerate(TYPES):
        assert by_type[t] == [3 * i] * 16 + [3 * i + 1] * 16 + [3 * i + 2] * 4


def test_a_type_is_more_than_the_last_word():
    """BERT calls three layers of a block "dense": structured tying must not mix them."""
    names = ("attention.output.dense", "intermediate.dense", "output.dense")
    bert = [Site(f"encoder.layer.{i}.{n}", 8, 8) for i in range(6) for n in names]
    assert TinyLoraConfig(n_tie=6, tying="structured").count(bert) == 3


def test_lora_xs_counts():
    assert LoraXSConfig(r=64).count([Site(f"layers.{i}", 64, 96) for i in range(224)]) == 917_504


def test_p_is_normal_and_depends_on_seed_and_name_alone():
    p = noise.normal(0, "model.layers.0.q_proj", 500, 20, 20)
    assert abs(p.mean()) < 0.01 and abs(p.std() - 1) < 0.01 and abs((p**4).mean() - 3) < 0.05
    assert torch.equal(p, noise.normal(0, "model.layers.0.q_proj", 500, 20, 20))
    assert not torch.equal(p, noise.normal(1, "model.layers.0.q_proj", 500, 20, 20))
    assert not torch.equal(p, noise.normal(0, "model.layers.1.q_proj", 500, 20, 20))
    # pinned: a change here makes every saved adapter mean something else
    torch.testing.assert_close(
        noise.normal(42, "model.layers.0.self_attn.q_proj", 1, 2, 2),
        torch.tensor([[[-1.88101947, -0.43742743], [1.19131434, -0.02763764]]]),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda: TinyLoraConfig(r=0), "TinyLoraConfig: r is 0, expected an integer of 1 or more"),
        (lambda: TinyLoraConfig(u=-1), "u is -1"),
        (lambda: TinyLoraConfig(n_tie=0.5), "n_tie is 0.5"),
        (lambda: TinyLoraConfig(r=True), "r is True"),
        (lambda: TinyLoraConfig(tying="tied"), "tying is 'tied', expected one of tiled, structured"),
        (lambda: TinyLoraConfig(sigma="middle"), "sigma is 'middle', expected one of left, right, split"),
        (lambda: TinyLoraConfig(seed=-1), "seed is -1"),
        (lambda: LoraXSConfig(target_modules=[]), "LoraXSConfig: target_modules is"),
        (lambda: LoraXSConfig(target_modules=[1]), "target_modules is"),
        (lambda: config_from_dict({"kind": "dora"}), "adapter kind is 'dora', expected one of tinylora, lora-xs"),
        (lambda: config_from_dict({"kind": "tinylora", "rank": 3}), "TinyLoraConfig has no rank, expected some"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError) as error:
        config()
    assert message in str(error.value)


@pytest.mark.parametrize("config", [TinyLoraConfig(u=3, target_modules=["q_proj"]), LoraXSConfig(r=4, sigma="split")])
def test_configs_survive_json(config):
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_change_has_the_digits_of_its_widest_factor():
    thin = torch.randn(2, 3, dtype=torch.float64), torch.eye(2), torch.randn(4, 2)
    for factors in (Factors(*thin), Factors(thin[0].float(), thin[1].double(), thin[2])):
        assert factors.delta().dtype == torch.float64
        want = factors.up.double() @ factors.core.double() @ factors.down.double()
        torch.testing.assert_close(factors.delta(), want, rtol=1e-12, atol=1e-12)


def test_import_is_light():
    """`import tinylora` loads no triton, transformers or peft, and touches no GPU."""
    code = "import tinylora, sys; print([m for m in ('triton', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
