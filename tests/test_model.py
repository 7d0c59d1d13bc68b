"""Adapters on whole models: a Qwen2 from a config, and the pretrained MiniLM."""

import copy
import functools

import pytest
import torch
from models import minilm_folder, qwen2, tokens
from torch import nn
from torch.nn.utils import prune

import tinylora
from tinylora import LoraXSConfig, TinyLoraConfig
from tinylora.nn.model import adapted_layers

CONFIGS = [TinyLoraConfig(u=2, n_tie=5), TinyLoraConfig(n_tie=4, tying="structured"), LoraXSConfig(r=3)]


def trained(model, config, name="default", scale=0.1):
    tinylora.apply(model, config, name)
    for p in tinylora.adapter_parameters(model, name):
        nn.init.normal_(p, std=scale)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_starts_as_the_base_trains_what_it_says_and_nothing_else(config):
    model = qwen2()
    base, ids = copy.deepcopy(model), tokens()
    want = model(ids).logits
    assert tinylora.apply(model, config) is model
    assert torch.equal(model(ids).logits, want)
    parameters = tinylora.adapter_parameters(model)
    sites = model.tinylora["default"].sites
    assert len(sites) == 14 and sum(p.numel() for p in parameters) == config.count(sites)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.abs().max() > 0 for p in parameters)
    for n, p in base.named_parameters():
        assert torch.equal(p, model.get_parameter(n)), n
    with tinylora.disabled(model):
        assert torch.equal(model(ids).logits, want)
    assert not torch.equal(model(ids).logits, want)


def test_v_is_owned_once_by_the_root():
    model = tinylora.apply(qwen2(), TinyLoraConfig(u=1, n_tie=16))
    ours = [n for n in model.state_dict() if "tinylora" in n or "adapters" in n]
    assert ours == ["tinylora.default.v_0"]
    assert [n for n, _ in model.named_parameters(remove_duplicate=False) if "v_0" in n] == ours
    assert set(model.state_dict()) - set(ours) == set(qwen2().state_dict())
    v = tinylora.adapter_parameters(model)[0]
    assert v.dtype == torch.float32 and not v.any()
    model.to(torch.bfloat16)
    assert tinylora.adapter_parameters(model)[0].dtype == torch.float32


@pytest.mark.parametrize("change", ["in place", "data", "load_state_dict", "fused optimiser"])
def test_no_copy_of_v_goes_stale(change):
    """PEFT users cache B R; `_version` is not bumped by `.data` writes or fused optimisers."""
    model = trained(qwen2(), TinyLoraConfig(u=2, n_tie=5))
    ids = tokens()
    before = model(ids).logits
    parameters = tinylora.adapter_parameters(model)
    if change == "load_state_dict":
        zeros = {f"tinylora.default.v_{i}": torch.zeros_like(v) for i, v in enumerate(parameters)}
        model.load_state_dict(model.state_dict() | zeros)
    for v in parameters:
        if change == "in place":
            with torch.no_grad():
                v.zero_()
        elif change == "data":
            v.data = torch.zeros_like(v)
        elif change == "fused optimiser":
            v.grad = v.detach().clone()
            torch.optim.SGD([v], lr=1.0, fused=True).step()
    with tinylora.disabled(model):
        base = model(ids).logits
    assert torch.equal(model(ids).logits, base) and not torch.equal(before, base)


def test_gradient_against_a_dense_model_in_fp64():
    """The gradient of every tied v equals that of a model whose weights are W + U Σ (Σ v P) Vᵀ, dense."""
    model = trained(qwen2(), TinyLoraConfig(u=2, n_tie=5)).double()
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    parameters = tinylora.adapter_parameters(model)
    adapters = {n: m.adapters["default"] for n, m in model.named_modules() if isinstance(m, tinylora.Linear)}
    leaves = [v.detach().clone().requires_grad_() for v in parameters]
    dense = {}
    for name, a in adapters.items():
        core = torch.einsum("u,uij->ij", leaves[a.group], a.P)
        dense[f"{name}.weight"] = model.get_parameter(f"{name}.weight") + a.up @ core @ a.down
    with tinylora.disabled(model):
        torch.func.functional_call(model, dense, (ids,), {"labels": ids}).loss.backward()
    assert len(leaves) == 3
    for v, leaf in zip(parameters, leaves, strict=True):
        torch.testing.assert_close(v.grad, leaf.grad)


def test_several_adapters():
    model, ids = qwen2(), tokens()
    want = model(ids).logits
    trained(model, TinyLoraConfig(u=2), "first")
    first = model(ids).logits
    trained(model, LoraXSConfig(r=3, target_modules=["q_proj", "mlp.up_proj"]), "second")
    second = model(ids).logits
    assert tinylora.adapter_names(model) == ["first", "second"]
    assert len(tinylora.adapter_parameters(model, "second")) == 4
    assert all(p.requires_grad for p in tinylora.adapter_parameters(model, "second"))
    assert not any(p.requires_grad for p in tinylora.adapter_parameters(model, "first"))
    tinylora.activate(model, "first")
    assert torch.equal(model(ids).logits, first) and not torch.equal(first, second)
    assert all(p.requires_grad for p in tinylora.adapter_parameters(model, "first"))
    tinylora.activate(model, None)
    assert torch.equal(model(ids).logits, want)
    tinylora.activate(model, "second")
    assert torch.equal(model(ids).logits, second)
    with pytest.raises(
        ValueError, match=r"name is 'third', but Qwen2ForCausalLM has the adapters \['first', 'second'\]"
    ):
        tinylora.activate(model, "third")
    with pytest.raises(ValueError, match="name is 'first', but the model has an adapter of that name"):
        tinylora.apply(model, TinyLoraConfig(), "first")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unmerge(dtype):
    model, ids = trained(qwen2(dtype=dtype), TinyLoraConfig(u=2)), tokens()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    want = model(ids).logits
    tinylora.merge(model)
    merged = model(ids).logits
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)
    for call in (lambda: tinylora.activate(model, None), lambda: tinylora.apply(model, TinyLoraConfig(), "more")):
        with pytest.raises(ValueError, match=r"q_proj has adapter 'default' merged: tinylora.unmerge\(model\) first"):
            call()
    copied = copy.deepcopy(model)
    for m in (model, copied):
        tinylora.unmerge(m)
        assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())
        assert torch.equal(m(ids).logits, want)


def test_merging_a_tied_weight_is_refused():
    model = trained(qwen2(tie_word_embeddings=True), TinyLoraConfig(target_modules=["lm_head"]))
    # loaded so, they are two parameters on one storage
    apart = trained(qwen2(tie_word_embeddings=True), TinyLoraConfig(target_modules=["lm_head"]))
    apart.load_state_dict(model.state_dict(), assign=True)
    assert apart.lm_head.weight is not apart.model.embed_tokens.weight
    for m in (model, apart):
        with pytest.raises(ValueError, match=r"embed_tokens.weight and lm_head.weight are one tensor"):
            tinylora.merge(m)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, ids = trained(qwen2(), TinyLoraConfig(u=2, n_tie=5)).train(), tokens()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()  # what transformers and PEFT ask of every frozen model
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([v.grad.clone() for v in tinylora.adapter_parameters(model)]))
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_uses_the_adapter_in_place(cache):
    """With an adapter in place and with the same adapter merged in fp32: the same tokens."""
    model, ids = trained(qwen2(), TinyLoraConfig(u=2), scale=0.3), tokens()
    generate = functools.partial(
        model.generate, ids, max_new_tokens=12, do_sample=False, pad_token_id=0, cache_implementation=cache
    )
    ours = generate()
    with tinylora.disabled(model):
        base = generate()
    tinylora.merge(model)
    assert torch.equal(ours, generate()) and not torch.equal(ours, base)


def test_whole_model_compiles_in_one_graph():
    torch._dynamo.reset()
    model, ids = trained(qwen2(), TinyLoraConfig(u=2, n_tie=5)), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for m in (model, compiled):
        model.zero_grad()
        m(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(torch.cat([v.grad.clone() for v in tinylora.adapter_parameters(model)]))
    torch.testing.assert_close(*grads)


def test_apply_that_fails_leaves_the_model_as_it_was():
    model, ids = qwen2(), tokens()
    want, modules = model(ids).logits, [type(m) for m in model.modules()]
    cases = [
        (
            TinyLoraConfig(target_modules=["q_proj", "c_attn"]),
            "default",
            "target_modules names 'c_attn', exp",
        ),
        (TinyLoraConfig(target_modules="nothing"), "default", "target_modules 'nothing': nothing to adapt"),
        (TinyLoraConfig(), "a.b", "name is 'a.b', expected one without dots"),
        ({"r": 2}, "default", "config is a dict, expected one of TinyLoraConfig(..), "),
        (LoraXSConfig, "default", "config is the class tinylora.adapters.lora_xs.LoraXSConfig, expected one of "),
        (LoraXSConfig(r=40), "default", "r is 40, expected 1 to 32: model.layers.0.self_attn.k_proj is (32, 64)"),
    ]
    for config, name, message in cases:
        with pytest.raises(ValueError) as error:
            tinylora.apply(model, config, name)
        assert message in str(error.value)
    with pytest.raises(ValueError, match=r"no adapter: tinylora.apply first"):
        tinylora.adapter_parameters(model)
    with pytest.raises(ValueError, match="has no active adapter to merge"):
        tinylora.merge(model)
    assert [type(m) for m in model.modules()] == modules and torch.equal(model(ids).logits, want)
    assert all(p.requires_grad for p in model.parameters())
    with torch.device("meta"), pytest.raises(ValueError, match="is on the meta device and has no data"):
        tinylora.apply(qwen2(), TinyLoraConfig())
    with pytest.raises(ValueError, match=r"no torch.nn.Linear at all, only Conv1d"):
        tinylora.apply(nn.Sequential(nn.Conv1d(3, 3, 1)), TinyLoraConfig())

    class QLinear(nn.Linear):  # quanto's, beside a head that is none
        pass

    quantised = nn.Sequential(nn.ModuleList([QLinear(8, 8)]), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"the linear layers in its blocks are QLinear"):
        tinylora.apply(quantised, TinyLoraConfig())


@pytest.mark.parametrize("config", [TinyLoraConfig(u=5), tinylora.LoraConfig(r=3)], ids=lambda c: c.kind)
def test_transforms_of_torch_func_and_a_trace(config):
    """Who differentiates or records call by call meets torch's own calls: exact gradients, per sample and twice, and a
    trace whose results depend on its input."""
    from torch.func import functional_call, grad, jvp, vmap

    model, ids = tinylora.apply(qwen2(), config), tokens()
    model.set_attn_implementation("eager")  # torch's own has no forward mode
    with torch.no_grad():
        for p in tinylora.adapter_parameters(model):
            p.add_(0.05 * torch.randn_like(p))
    numbers = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(numbers, ids):
        return functional_call(model, numbers, (ids,), {"labels": ids, "use_cache": False}).loss

    model(ids, labels=ids).loss.backward()
    want = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    found = grad(loss)(numbers, ids)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-7)
    copied = copy.deepcopy(model)
    first = grad(lambda n, ids: functional_call(copied, n, (ids,), {"labels": ids, "use_cache": False}).loss)
    torch.testing.assert_close(first(numbers, ids), want, rtol=1e-4, atol=1e-7)
    samples = vmap(grad(lambda numbers, row: loss(numbers, row[None])), in_dims=(None, 0))(numbers, ids)
    torch.testing.assert_close({n: g.mean(0) for n, g in samples.items()}, want, rtol=1e-4, atol=1e-7)
    model.double()  # norms and softmax stay fp32
    name, along = next(iter(numbers)), {n: torch.randn_like(t).double() for n, t in numbers.items()}
    _, twice = jvp(lambda t: grad(loss)(t, ids), ({n: t.double() for n, t in numbers.items()},), (along,))
    ahead, behind = ({n: t + s * along[n] for n, t in numbers.items()} for s in (1e-3, -1e-3))
    slope = (grad(loss)(ahead, ids)[name] - grad(loss)(behind, ids)[name]) / 2e-3
    torch.testing.assert_close(twice[name], slope, rtol=1e-2, atol=1e-2 * slope.abs().max().item())

    model.float().requires_grad_(False)
    torch._dynamo.reset()

    def tangent(x):
        return jvp(model.model.layers[0].mlp, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x), tangent(x))
    assert tangent(x).abs().max() > 1e-3
    mlp, x, other = model.model.layers[0].mlp, *torch.randn(2, 2, 3, 64)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            traced, y = torch.jit.trace(mlp, (x,), check_trace=False)(other), mlp(other)
        assert traced.dtype == y.dtype
        torch.testing.assert_close(traced, y, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-6)


def test_adapters_and_whole_modules_on_one_place_are_refused():
    """On a part of the model and on all of it, saved whole by one and adapted by another: one would run in silence."""
    model = qwen2(tie_word_embeddings=False)
    tinylora.apply(model.model, LoraXSConfig())
    with pytest.raises(ValueError, match="q_proj has an adapter 'default' that this Qwen2ForCausalLM does not own"):
        tinylora.apply(model, LoraXSConfig())
    head = LoraXSConfig(target_modules=["lm_head"])
    model = tinylora.apply(qwen2(tie_word_embeddings=False), head, "a")
    with pytest.raises(ValueError, match="modules_to_save names lm_head, where an adapter is"):
        tinylora.apply(model, TinyLoraConfig(modules_to_save=["lm_head"]), "b")
    model = tinylora.apply(
        qwen2(tie_word_embeddings=False), TinyLoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "b"
    )
    with pytest.raises(ValueError, match=r"lm_head.original is in another adapter's modules_to_save"):
        tinylora.apply(model, LoraXSConfig(target_modules=["lm_head.original"]), "a")
    with pytest.raises(ValueError, match="modules_to_save names model, around or within a module that another"):
        saved = LoraXSConfig(target_modules=["lm_head"], modules_to_save=["model.norm"])
        part = tinylora.apply(qwen2(tie_word_embeddings=False), saved, "inner")
        tinylora.apply(part, LoraXSConfig(target_modules=["lm_head"], modules_to_save=["model"]), "outer")
    for name in ("train", "keys", "type", "training"):
        with pytest.raises(ValueError, match=f"name is '{name}', expected none that torch's modules have"):
            tinylora.apply(model, LoraXSConfig(target_modules=["q_proj"]), name)
    assert tinylora.adapter_names(model) == ["b"]


def test_within_disabled_nothing_is_put_on_or_activated(tmp_path):
    model = tinylora.apply(trained(qwen2(), LoraXSConfig(), "a"), LoraXSConfig(), "b")
    tinylora.save(model, tmp_path, "b")
    with tinylora.disabled(model):
        for change in (
            lambda: tinylora.activate(model, "a"),
            lambda: tinylora.apply(model, LoraXSConfig(), "c"),
            lambda: tinylora.load(model, tmp_path, "b"),
        ):
            with pytest.raises(ValueError, match="within disabled, expected its end first"):
                change()
        with tinylora.disabled(model):
            pass
        copied = copy.deepcopy(model)
    for m in (model, copied):  # a copy made within is not within
        tinylora.activate(m, "a")


def test_disabled_contexts_that_end_in_another_order():
    model = trained(qwen2(), TinyLoraConfig(u=2))
    want = model(tokens()).logits

    def reference():
        with tinylora.disabled(model):
            yield model(tokens()).logits

    one, other = reference(), reference()
    base = next(one)
    assert torch.equal(next(other), base)
    one.close()
    assert torch.equal(model(tokens()).logits, base)
    other.close()
    assert torch.equal(model(tokens()).logits, want) and not torch.equal(base, want)


def test_an_fp64_layer_mixes_in_fp64():
    layer = tinylora.Linear.from_linear(torch.nn.Linear(16, 8, dtype=torch.float64), TinyLoraConfig(u=3))
    nn.init.normal_(next(iter(tinylora.adapter_parameters(layer))))
    x = torch.randn(4, 16, dtype=torch.float64)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


def test_a_module_inside_one_that_is_saved_whole_trains_with_it(tmp_path):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.head = nn.Linear(64, 64), nn.Linear(64, 3)
            self.tied = nn.Linear(64, 3)
            self.tied.weight = self.head.weight

        def forward(self, x):
            return self.head(self.dense(x)) + self.tied(x)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = qwen2(layers=1).model
            torch.manual_seed(4)
            self.head = Head()

        def forward(self, ids):
            return self.head(self.model(ids).last_hidden_state[:, -1])

    model = tinylora.apply(Classifier(), LoraXSConfig(modules_to_save=["head"]))
    optimizer = torch.optim.SGD(tinylora.adapter_parameters(model), lr=0.1)
    before = model(tokens())
    before.square().sum().backward()
    optimizer.step()
    copies = model.head.copies["default"]
    assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in copies.parameters())
    tinylora.save(model, tmp_path)
    want = model(tokens())
    assert not torch.equal(want, before)
    torch.testing.assert_close(tinylora.load(Classifier(), tmp_path)(tokens()), want)


def test_a_root_that_runs_its_children_one_after_another():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(3, 16)
    want = model(x)
    tinylora.apply(model, LoraXSConfig(target_modules=["0", "2"]))
    assert torch.equal(model(x), want) and torch.equal(model(input=x), want)


@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrization"])
def test_merging_into_a_weight_that_is_computed_is_refused(how):
    model = trained(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)), LoraXSConfig(target_modules=["0"]))
    if how == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    elif how == "weight_norm":
        torch.nn.utils.weight_norm(model[0])
    else:
        torch.nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="the weight is computed from others"):
        tinylora.merge(model)


def test_compiled_blocks_have_the_names_of_others(tmp_path):
    model = tinylora.apply(qwen2(), tinylora.LoraConfig(r=2))
    for p in tinylora.adapter_parameters(model):
        nn.init.normal_(p)
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    want = model(tokens()).logits
    tinylora.save(model, tmp_path)
    torch.testing.assert_close(tinylora.load(qwen2(), tmp_path)(tokens()).logits, want)
    for p in tinylora.adapter_parameters(model):
        nn.init.zeros_(p)
    torch.testing.assert_close(tinylora.load(model, tmp_path)(tokens()).logits, want)
    with pytest.raises(ValueError, match="the model is compiled"):
        tinylora.apply(model, tinylora.LoraConfig(r=2), "other")


@pytest.fixture(scope="module")
def minilm():
    from transformers import AutoModel, AutoTokenizer

    folder = minilm_folder()
    return AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def embed(model, tokenizer, sentences):
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_pretrained_minilm_end_to_end(minilm, tmp_path):
    """A trained model, adapted with 12 numbers to a new notion of likeness, saved, and loaded beside its base."""
    model, tokenizer = copy.deepcopy(minilm[0]), minilm[1]
    anchors = ["the invoice is overdue", "our server is down", "I lost my password", "where is my parcel"]
    others = ["please pay the bill", "the website cannot be reached", "I cannot log in", "the delivery has not come"]
    with torch.no_grad():
        before = embed(model, tokenizer, anchors)
    tinylora.apply(model, TinyLoraConfig(u=1, n_tie=3))  # 36 modules in 12 groups
    assert sum(p.numel() for p in tinylora.adapter_parameters(model)) == 12
    with torch.no_grad():
        assert torch.equal(embed(model, tokenizer, anchors), before)
    optimizer = torch.optim.Adam(tinylora.adapter_parameters(model), lr=2e-2)
    losses = []
    for _ in range(12):
        scores = 10 * embed(model, tokenizer, anchors) @ embed(model, tokenizer, others).T
        loss = nn.functional.cross_entropy(scores, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    with torch.no_grad():
        after = embed(model, tokenizer, anchors)
    tinylora.save(model, tmp_path)
    again = tinylora.load(copy.deepcopy(minilm[0]), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(embed(again, tokenizer, anchors), after, rtol=0, atol=1e-5)
        tinylora.merge(again)
        torch.testing.assert_close(embed(again, tokenizer, anchors), after, rtol=0, atol=1e-4)


def test_what_trains_is_fp32_whatever_torchs_default():
    try:
        torch.set_default_dtype(torch.bfloat16)
        model = tinylora.apply(qwen2(), TinyLoraConfig(u=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in tinylora.adapter_parameters(model)} == {torch.float32}


def test_a_layer_under_two_parents_is_adapted_at_both():
    class Parent(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    shared = nn.Linear(8, 8)
    model = nn.ModuleList([Parent(shared), Parent(shared)])
    holder = nn.Module()
    holder.blocks = model
    trained(holder, TinyLoraConfig(u=2), scale=1.0)
    assert model[0].layer is model[1].layer and isinstance(model[1].layer, tinylora.Linear)


def test_models_that_are_wrapped_already_are_refused():
    with pytest.raises(ValueError, match=r"put the adapter on, then torch\.compile it"):
        tinylora.apply(torch.compile(qwen2()), TinyLoraConfig())
    model = tinylora.apply(qwen2(), TinyLoraConfig())
    with pytest.raises(ValueError, match="expected DistributedDataParallel"):
        model.model.layers[0].self_attn.q_proj._replicate_for_data_parallel()


def test_a_copy_that_ran_in_inference_mode_trains():
    model, ids = copy.deepcopy(tinylora.apply(qwen2(), TinyLoraConfig())), tokens()
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in tinylora.adapter_parameters(model))


def test_layers_take_nested_tensors_as_torchs_do():
    for layout in (torch.jagged, torch.strided):
        for config in (TinyLoraConfig(u=3), tinylora.LoraXSConfig(r=4), tinylora.LoraConfig(r=2)):
            layer = tinylora.Linear.from_linear(torch.nn.Linear(16, 8), config)
            with torch.no_grad():
                for p in tinylora.adapter_parameters(layer):
                    p.copy_(0.3 * torch.randn_like(p))
            parts = [torch.randn(n, 16) for n in (3, 5)]
            found = layer(torch.nested.nested_tensor(parts, layout=layout))
            torch.testing.assert_close(list(found.unbind()), [layer(part) for part in parts])


@pytest.mark.parametrize("config", [tinylora.TinyLoraConfig(n_tie=5), tinylora.LoraConfig(modules_to_save=["lm_head"])])
def test_an_adapter_is_removed(config, tmp_path):
    model = tinylora.apply(tinylora.apply(qwen2(), config, "a"), config, "b")
    plain = qwen2()
    with torch.no_grad():
        for name in ("a", "b"):
            for i, p in enumerate(tinylora.adapter_parameters(model, name)):
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(i + 10 * (name == "b")))
    tinylora.activate(model, "a")
    a = model(tokens()).logits
    tinylora.save(model, tmp_path / "a", "a")
    with pytest.raises(ValueError, match="auto_model"):  # what SentenceTransformer.save_pretrained does
        model.tinylora.save(str(tmp_path))
    tinylora.activate(model, "b")
    assert tinylora.remove(model, "b") is model and tinylora.adapter_names(model) == ["a"]
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)
    assert not [n for n in model.state_dict() if ".b." in n or n.endswith(".b")]
    assert not any("b" in layer.adapters for layer in adapted_layers(model).values())
    tinylora.activate(model, "a")
    torch.testing.assert_close(model(tokens()).logits, a, rtol=0, atol=0)
    tinylora.apply(model, config, "b")
    with pytest.raises(ValueError, match="name is 'c'"):
        tinylora.remove(model, "c")
    with tinylora.disabled(model), pytest.raises(ValueError, match="disabled"):
        tinylora.remove(model, "b")
    tinylora.merge(model)
    with pytest.raises(ValueError, match="merged"):
        tinylora.remove(model, "b")
    for name in ("a", "b"):
        tinylora.remove(tinylora.unmerge(model), name)
    assert tinylora.adapter_names(model) == []
    assert [n for n, _ in model.named_children()] == [n for n, _ in plain.named_children()]
    tinylora.load(model, tmp_path / "a")
    torch.testing.assert_close(model(tokens()).logits, a, rtol=0, atol=0)


def test_torchs_counter_sees_the_operators():
    """Products alone: those of the frozen layers and of the correction, forward and backward; siblings' as one."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(model):
        with FlopCounterMode(display=False) as counter:
            model(tokens(), labels=tokens()).loss.backward()
        return counter.get_total_flops()

    def dense(model):
        model.requires_grad_(False).get_input_embeddings().requires_grad_()  # dX is asked of every layer
        return count(model)

    M, r = tokens().numel(), 4
    layers = {n: m for n, m in qwen2().named_modules() if n.endswith("_proj")}.values()
    thin = sum(r * (m.in_features + m.out_features) for m in layers)
    model = tinylora.apply(qwen2(), tinylora.LoraConfig(r=r))
    model.get_input_embeddings().requires_grad_()
    # The correction forward, and backward that of dX, dD and dU
    assert count(model) == dense(qwen2()) + 2 * M * (thin + 2 * thin)
    # A core at rank r: forward z Cᵀ, backward tᵀ z and, for dX, t C; v and its P are such a core
    cores = []
    for config in (tinylora.LoraXSConfig(r=r), tinylora.TinyLoraConfig(r=r, u=3)):
        model = tinylora.apply(qwen2(), config, siblings=False)
        model.get_input_embeddings().requires_grad_()
        cores.append(count(model))
    assert cores == [dense(qwen2()) + 2 * M * (2 * thin + 3 * len(layers) * r * r)] * 2


def test_a_layer_that_something_replaced_is_missed():
    model = tinylora.apply(qwen2(), tinylora.LoraConfig(target_modules=["q_proj", "lm_head"]))
    model.resize_token_embeddings(300)
    with pytest.raises(ValueError, match="lm_head has lost adapter 'default': something replaced it"):
        tinylora.adapter_parameters(model)
    tinylora.activate(tinylora.apply(model, TinyLoraConfig(), "other"), None)  # what needs none of its numbers goes on
    stage = tinylora.apply(qwen2(), TinyLoraConfig())
    del stage.model.layers[1]  # of a pipeline
    stage.model.layers[0].mlp = nn.Identity()
    assert tinylora.adapter_parameters(stage)


def test_a_parametrized_v():
    class Half(torch.nn.Module):
        def forward(self, v):
            return v / 2

    model = trained(qwen2(), TinyLoraConfig(u=2, n_tie=99))
    want = model(tokens()).logits
    with torch.no_grad():
        model.tinylora["default"].v_0.mul_(2)
    torch.nn.utils.parametrize.register_parametrization(model.tinylora["default"], "v_0", Half())
    torch.testing.assert_close(model(tokens()).logits, want)
