"""The measures of what a training changed."""

import copy

import pytest
import torch
from models import qwen2, tokens
from torch import nn

import tinylora
from tinylora import analysis


def test_effective_rank():
    assert analysis.effective_rank(torch.zeros(5, 4)) == 0
    assert analysis.effective_rank(torch.eye(10)) == 9  # nine of ten equal values hold 90 %
    assert analysis.effective_rank(torch.eye(10), 1.0) == 10
    assert analysis.effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == 1  # 9 of 10, just
    assert analysis.effective_rank(torch.diag(torch.tensor([2.9, 1.0, 0.0]))) == 2
    assert analysis.effective_rank(torch.randn(40, 3) @ torch.randn(3, 30), 0.999) == 3
    for delta, energy, message in ((torch.ones(3), 0.9, "expected a matrix"), (torch.eye(2), 0.0, "energy is 0.0")):
        with pytest.raises(ValueError, match=message):
            analysis.effective_rank(delta, energy)


def test_changes_of_adapters_merged_or_not_and_of_full_training():
    base = qwen2()
    adapted = tinylora.apply(copy.deepcopy(base), tinylora.LoraConfig(r=3, alpha=3, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for p in tinylora.adapter_parameters(adapted):
            p.normal_()
    found = {c.name: c for c in analysis.changes(base, adapted)}
    assert len(found) == 15
    for name, change in found.items():
        if name == "lm_head":
            want = adapted.lm_head.copies["default"].weight - base.lm_head.weight
        else:
            a = adapted.get_submodule(name).adapters["default"]
            want = a.up @ a.down
            assert change.effective_rank <= 3
        weight = base.get_submodule(name).weight
        assert change.distance == pytest.approx((want.norm() / weight.norm()).item(), rel=1e-3)
        assert tuple(weight.shape) == (change.N, change.K)
    merged = analysis.changes(base, tinylora.merge(copy.deepcopy(adapted)))
    assert [(c.name, c.effective_rank) for c in merged] == [(c.name, c.effective_rank) for c in found.values()]
    with tinylora.disabled(adapted):
        assert all(c.distance == 0 == c.effective_rank for c in analysis.changes(base, adapted))
    with pytest.raises(ValueError, match=r"differ in their linear layers, expected the same names: model.layers.2"):
        analysis.changes(base, qwen2(layers=3))


def test_changes_of_a_head_of_several_layers():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    base = RobertaForSequenceClassification(
        RobertaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    adapted = tinylora.apply(copy.deepcopy(base), tinylora.LoraConfig(r=2, modules_to_save=["classifier"]))
    with torch.no_grad():
        for p in tinylora.adapter_parameters(adapted):
            p.add_(torch.randn_like(p))
    found = {c.name: c for c in analysis.changes(base, adapted)}
    own, before = adapted.classifier.copies["default"].dense.weight, base.classifier.dense.weight
    assert found["classifier.dense"].distance == pytest.approx(((own - before).norm() / before.norm()).item())


def test_names_that_look_like_ours():
    """A layer is called what it is called, whatever `modules_to_save` calls its parts."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.original_proj, self.copies = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4)])
            self.again = nn.ModuleList([self.original_proj])

    assert list(analysis.effective_weights(Model())) == ["original_proj", "copies.0"]


def test_the_median_of_an_even_number():
    moved = [analysis.Change(str(i), 4, 4, 1.0, rank) for i, rank in enumerate((3, 0, 1))]
    assert analysis.Comparison("", moved, 0, 0, 0, 0).median_rank == 2
    assert analysis.Comparison("", moved[1:2], 0, 0, 0, 0).median_rank == 0


def test_compare_and_plot(tmp_path):
    base, ids = qwen2(), tokens(batch=4)
    trained = copy.deepcopy(base).train()
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
    batch, other = {"input_ids": ids, "labels": ids}, {"input_ids": 255 - ids, "labels": 255 - ids}
    found = analysis.compare("full", base, trained, [batch], [other, other])
    assert trained.training and found.learned > 0.1
    assert found.learned_after == pytest.approx(trained.eval()(**batch).loss.item(), rel=1e-5)
    assert found.forgotten == pytest.approx((trained(**other).loss - base(**other).loss).item(), rel=1e-3)
    assert found.median_rank > 3 and 0 < found.distance < 1
    analysis.plot([found], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="expected at least one batch"):
        analysis.held_out_loss(base, [])
