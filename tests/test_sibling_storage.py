"""Where a group's weights and numbers lie, and what it keeps of them, however the model was moved or changed."""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from models import qwen2, tokens
from problems import BoundByTorch
from sibling_models import CONFIGS, Pair, adapted, groups, train
from torch import nn

import tinylora
from tinylora import TinyLoraConfig
from tinylora.nn.kept import Kept
from tinylora.nn.siblings import Siblings
from tinylora.ops.siblings import joined

pytestmark = pytest.mark.usefixtures("side_by_side")


def test_every_v_lies_in_one_storage_after_it_was_moved():
    """By which a card's decode step finds them without a copy; where nothing moves, they stay for graphs."""
    config = TinyLoraConfig(r=2, u=2, groups=[2, 0, 1, 3, 4, 5, 6])  # in another order than their parameters'
    model = adapted(config=config, layers=1)
    v = [layer.adapters.default.v for layer in model.model.layers[0].self_attn.q_proj.siblings.layers]
    assert joined(v) is not None
    before = [t.data_ptr() for t in v]
    model.to("cpu")
    assert [t.data_ptr() for t in v] == before
    values = [t.detach().clone() for t in v]
    model.double().float()
    assert joined(v) is not None and all(torch.equal(a, b) for a, b in zip(v, values, strict=True))


@pytest.mark.parametrize("moved", ["to", "deepcopy", "pickle", "state_dict", "assign", "save_pretrained", "replaced"])
def test_moved_copied_saved_and_loaded(moved, calls, tmp_path):
    model = adapted(layers=1)
    expected = model(tokens()).logits
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    if moved == "to":
        model = model.to(torch.float64).to(torch.float32)
    elif moved == "deepcopy":
        original, model = model, copy.deepcopy(model)
        train(original, seed=9)  # shares nothing with its copy
    elif moved == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif moved in ("state_dict", "assign"):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        model = adapted(layers=1, seed=1)
        missing = model.load_state_dict(torch.load(file), assign=moved == "assign")
        assert not missing.missing_keys and not missing.unexpected_keys
        # The factors come from the base that the model was adapted with
        reference = adapted(False, layers=1, seed=1)
        reference.load_state_dict(weights)
        expected = reference(tokens()).logits
    elif moved == "save_pretrained":
        from safetensors.torch import save_file
        from transformers import Qwen2ForCausalLM

        save_file(dict(model.state_dict()), tmp_path / "whole.safetensors")
        model.save_pretrained(tmp_path)
        again = Qwen2ForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(
            again.model.layers[0].self_attn.k_proj.weight, weights["model.layers.0.self_attn.k_proj.weight"]
        )
        return
    else:
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight = nn.Parameter(attention.k_proj.weight.detach() * 2, requires_grad=False)
        reference = adapted(False, layers=1)
        reference.model.layers[0].self_attn.k_proj.weight.mul_(2)
        expected = reference(tokens()).logits
    calls.update(group=0, alone=0)
    torch.testing.assert_close(model(tokens()).logits, expected)
    assert calls == {"group": 2, "alone": 2}
    if moved not in ("assign", "replaced"):
        attention = model.model.layers[0].self_attn
        assert joined([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None


def test_a_layer_copied_by_itself_is_alone():
    model = adapted(layers=1)
    layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    assert layer.siblings is None
    assert isinstance(model.model.layers[0].self_attn.q_proj.siblings, Siblings)


def test_merge_disable_and_switch():
    model, alone = adapted(), adapted(siblings=False)
    for m in (model, alone):
        train(tinylora.apply(m, TinyLoraConfig(r=3, u=2, seed=5), name="second", siblings=m is model), seed=8)
    weights = {n: t.clone() for n, t in model.state_dict().items()}

    def same():
        torch.testing.assert_close(model(tokens()).logits, alone(tokens()).logits, rtol=1e-4, atol=1e-5)

    same()
    for m in (model, alone):
        tinylora.activate(m, "default")
    same()
    with tinylora.disabled(model), tinylora.disabled(alone):
        same()
    for m in (model, alone):
        tinylora.merge(m)
    same()
    tinylora.unmerge(model)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_frozen_factors_that_somebody_changes_or_replaces():
    model, alone = adapted(layers=1), adapted(False, layers=1)
    for replaced in (False, True):
        for m in (model, alone):
            adapter = m.model.layers[0].mlp.up_proj.adapters["default"]
            for name, t in adapter.named_buffers():
                new = torch.randn(t.shape, generator=torch.Generator().manual_seed(int(replaced)))
                setattr(adapter, name, new) if replaced else t.copy_(new)
        torch.testing.assert_close(model(tokens()).logits, alone(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_a_sibling_that_loses_its_bias():
    model, ids = tinylora.apply(qwen2(), TinyLoraConfig(u=2)), tokens()
    apart = tinylora.apply(qwen2(), TinyLoraConfig(u=2), siblings=False)
    for m in (model, apart):
        m(ids)
        torch.nn.init.constant_(m.model.layers[0].self_attn.k_proj.bias, 1.0)
        m.model.layers[0].self_attn.q_proj.bias = None
    torch.testing.assert_close(model(ids).logits, apart(ids).logits)


def test_the_weights_are_moved_and_not_doubled():
    model = adapted(layers=1)
    layers = [m for m in model.modules() if isinstance(m, tinylora.Linear)]
    held = {m.weight.untyped_storage().data_ptr(): m.weight.untyped_storage().nbytes() for m in layers}
    assert sum(held.values()) == sum(m.weight.nbytes for m in layers)


def test_tied_parameters_are_not_moved_apart():
    model = Pair()
    model.alias = nn.Linear(16, 8)
    model.alias.weight = nn.Parameter(model.a.weight.detach())  # another Parameter on the same memory
    tinylora.apply(model, TinyLoraConfig(target_modules=["a", "b"]))
    assert not groups(model) and model.alias.weight.data_ptr() == model.a.weight.data_ptr()


def test_joined_is_a_view_of_what_lies_side_by_side_in_one_storage():
    storage = torch.randn(10, 4)
    parts = list(storage.split([6, 4]))
    whole = joined(parts)
    parts[0].data[2] = 7.0
    assert torch.equal(whole, storage) and whole.data_ptr() == storage.data_ptr()
    assert torch.equal(joined(storage[2:].split([4, 4])), storage[2:])
    assert joined([parts[0].clone(), parts[1]]) is None and joined([parts[0][:5], parts[1]]) is None
    assert joined([storage[:4].t(), storage[4:]]) is None and joined(parts[::-1]) is None
    # Two storages over neighbouring memory, as an allocator may hand them out, are not one.
    memory = bytearray(64)
    first, second = (torch.frombuffer(memory, dtype=torch.float32, offset=o, count=8).view(2, 4) for o in (0, 32))
    assert second.data_ptr() == first.data_ptr() + first.nbytes and joined([first, second]) is None


def test_a_base_weight_that_changes_is_seen_at_once():
    """In place, through .data, and by another tensor: what the group holds is never older than its layers."""
    model = adapted()
    attention = model.model.layers[0].self_attn
    weight = attention.k_proj.weight
    batch = tokens()

    def fresh():
        with torch.no_grad():
            return model(batch).logits

    def alone():
        for layer in (m for m in model.modules() if isinstance(m, tinylora.Linear)):
            layer.siblings, kept[layer] = None, layer.siblings
        try:
            return fresh()
        finally:
            for layer, siblings in kept.items():
                layer.siblings = siblings

    kept, before = {}, fresh()
    for change in (
        lambda: weight.data.mul_(1.5),
        lambda: weight.data.copy_(torch.randn_like(weight)),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: setattr(attention.q_proj.bias, "data", torch.randn_like(attention.q_proj.bias)),
    ):
        change()
        after = fresh()
        assert not torch.allclose(before, after, atol=1e-3)
        torch.testing.assert_close(after, alone(), rtol=1e-4, atol=1e-5)
        before = after


@pytest.mark.parametrize("graded", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("config", [CONFIGS["one v"], CONFIGS["a v each"]], ids=["one v", "a v each"])
def test_what_a_group_keeps_between_calls_is_used_only_while_it_stands(config, graded, monkeypatch):
    """By kernels: whatever somebody changes, or puts elsewhere, the next call sees it."""
    for module in ("siblings", "linear"):
        monkeypatch.setattr(f"tinylora.nn.{module}.on_torch", lambda *operands: False)
    pytest.importorskip("triton")
    bound: list[str] = []
    monkeypatch.setattr("tinylora.ops.bound.Bound", lambda *operands: BoundByTorch(bound, *operands))
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    quick: list[bool] = []

    def watched(self, x, compute=Siblings._compute_ready):
        ys = compute(self, x)
        quick.append(ys is not None)
        return ys

    monkeypatch.setattr(Siblings, "_compute_ready", watched)

    def q(model):
        return model.model.layers[0].self_attn.q_proj

    def adapter(model):
        return q(model).adapters["default"]

    def numbers(model):
        return next(iter(tinylora.adapter_parameters(model)))

    changes = {
        "nothing": lambda m: None,
        "v in place": lambda m: numbers(m).data.add_(0.5),
        "v elsewhere": lambda m: setattr(numbers(m), "data", numbers(m).data * 2),
        "weight in place": lambda m: q(m).weight.data.mul_(1.1),
        "weight elsewhere": lambda m: setattr(q(m).weight, "data", q(m).weight.data * 1.1),
        "weight another": lambda m: setattr(
            q(m), "weight", nn.Parameter(q(m).weight.detach() * 1.1, requires_grad=False)
        ),
        "bias": lambda m: q(m).bias.data.add_(0.5),
        "P in place": lambda m: adapter(m).P.mul_(2),
        "P another": lambda m: adapter(m)._buffers.update(P=adapter(m).P * 2),
        "merged": lambda m: q(m).merge(),
        "inactive": lambda m: setattr(q(m), "active", None),
        "batch_invariant": lambda m: setattr(q(m), "batch_invariant", True),
        "to and fro": lambda m: m.double().float(),
        "thawed": lambda m: q(m).weight.requires_grad_(),
    }
    inputs = tokens()

    def run(model):
        """Logits, and with gradients those of every v."""
        y = model(inputs).logits
        trains = list(tinylora.adapter_parameters(model)) if graded else []
        return y, *(torch.autograd.grad(y.square().mean(), trains, allow_unused=True) if trains else ())

    for name, change_it in changes.items():
        together, alone = (adapted(siblings, config) for siblings in (True, False))
        with torch.set_grad_enabled(graded):
            run(together)  # every group, and every layer by itself, finds what it keeps
            quick.clear(), bound.clear()
            run(together)
            assert quick == [True] * 4 and not bound
            run(together)
            assert sorted(set(bound)) == (["backward", "forward"] if graded else ["forward"])
            assert (
                bound.count("forward") == 8 and bound.count("backward") == 7 * graded
            )  # nobody wants dX of q, k, v first
            for model in (together, alone):
                change_it(model)
            quick.clear()
            ours, want, again = run(together), run(alone), run(together)
        if name in ("merged", "inactive", "batch_invariant") or (name == "thawed" and graded):
            assert quick[0] is False, f"{name}: a layer of the group does not compute in it"
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
        torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}, again: {text}")
    together = adapted(True, config)
    with torch.set_grad_enabled(graded):
        together(inputs)
        quick.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            together(inputs)
    assert not any(quick)


def test_a_copy_in_shared_memory_stays_there():
    """A forward must not move numbers that other processes see."""
    model = copy.deepcopy(adapted(config=TinyLoraConfig(u=2, n_tie=1)))
    want = model(tokens()).logits
    model = copy.deepcopy(model).share_memory()
    places = [p.data_ptr() for p in model.parameters()]
    torch.testing.assert_close(model(tokens()).logits, want)
    assert places == [p.data_ptr() for p in model.parameters()] and all(p.is_shared() for p in model.parameters())


def test_a_state_dict_is_made_on_the_card_that_the_model_is_on(monkeypatch):
    """Whichever is the current one: dlpack hands over nothing of another."""
    model, asked = adapted(True, CONFIGS["a v each"]), []

    def device(of):
        asked.append(of)
        return contextlib.nullcontext()

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True, raising=False)
        patched.setattr(torch.cuda, "device", device)
        state = model.state_dict()
    name, weight = "model.layers.0.self_attn.q_proj.weight", model.model.layers[0].self_attn.q_proj.weight
    assert asked and set(asked) == {weight.device} and torch.equal(state[name], weight)
