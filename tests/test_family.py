"""One battery of behaviours over every adapter, and each against PEFT's own layer where PEFT has it."""

import copy
import math

import pytest
import torch
from models import qwen2, tokens
from torch import nn

import tinylora
from tinylora import AdaLoraConfig, LoraConfig, LoraXSConfig, TiedLoraConfig, TinyLoraConfig, VeraConfig
from tinylora.adapters import Site, tied_lora
from tinylora.nn.model import named_numbers

ADAPTERS = {
    "tinylora": TinyLoraConfig(u=3, n_tie=5),
    "lora-xs": LoraXSConfig(r=3),
    "lora": LoraConfig(r=4, alpha=8),
    "lora, scale 1": LoraConfig(r=1, alpha=1),
    "rslora": LoraConfig(r=4, alpha=3, rslora=True),
    "adalora": AdaLoraConfig(r=3, target_r=2, total_steps=1000),
    "vera": VeraConfig(r=16),
    **{f"tied-lora {name}": TiedLoraConfig.preset(name, r=4) for name in tied_lora.PRESETS if name != "TL6"},
    "tied-lora, only u": TiedLoraConfig(r=4, trained=["u"]),
    "tied-lora, down alone, separate": TiedLoraConfig(r=4, trained=["down"], tied=["up"], fused=()),
}


@pytest.fixture(params=ADAPTERS.items(), ids=lambda item: item[0])
def config(request):
    return request.param[1]


def trained(model, config, name="default", seed=0):
    """The adapter on the model with numbers as training would leave them: away from their start."""
    tinylora.apply(model, config, name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in tinylora.adapter_parameters(model, name):
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))
    return model


def dense_copy(model, name="default"):
    """Weights W + U C D in the model's dtype, as a dict for functional_call."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, tinylora.Linear)}
    return {f"{n}.weight": m.weight + m.adapters[name].factors().delta() for n, m in layers.items()}


def test_starts_as_the_base_and_trains_what_it_says(config):
    model, ids = qwen2(), tokens()
    want = model(ids).logits
    tinylora.apply(model, config)
    assert torch.equal(model(ids).logits, want)
    parameters = tinylora.adapter_parameters(model)
    sites = model.tinylora["default"].sites
    assert sum(p.numel() for p in parameters) == config.count(sites)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    before = [p.detach().clone() for p in parameters]
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-4, losses
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    with tinylora.disabled(model):
        assert torch.equal(model(ids).logits, want)


def test_gradients_against_a_dense_model_in_fp64(config):
    model, ids = trained(qwen2(), config).double(), tokens()
    model(ids, labels=ids).loss.backward()
    parameters = tinylora.adapter_parameters(model)
    ours = [p.grad.clone() for p in parameters]
    model.zero_grad()
    dense = dense_copy(model)
    with tinylora.disabled(model):
        loss = torch.func.functional_call(model, dense, (ids,), {"labels": ids}).loss
    for a, b in zip(ours, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_the_forward(config, dtype):
    model, ids = trained(qwen2(dtype=dtype), config), tokens()
    assert all(p.dtype == torch.float32 for p in tinylora.adapter_parameters(model))
    want = model(ids).logits
    with tinylora.disabled(model):
        base = model(ids).logits
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tinylora.merge(model)
    error, effect = torch.dist(model(ids).logits, want), torch.dist(base, want)
    assert error < (1e-5 if dtype == torch.float32 else 0.5) * effect, (error, effect)
    tinylora.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.bfloat16()
    assert all(p.dtype == torch.float32 for p in tinylora.adapter_parameters(model))
    assert model(ids).logits.isfinite().all()


def test_save_and_load(config, tmp_path):
    model, ids = trained(qwen2(), config), tokens()
    tinylora.save(model, tmp_path)
    other = tinylora.load(qwen2(), tmp_path, "other")
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert other.tinylora["other"].config == config
    assert torch.equal(copy.deepcopy(other)(ids).logits, model(ids).logits)
    again = tinylora.apply(qwen2(), config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_two_adapters_of_different_kinds(config):
    model, ids = qwen2(), tokens()
    trained(model, config, "one")
    one = model(ids).logits
    trained(model, LoraConfig(r=2, target_modules=["o_proj"]), "two", seed=1)
    two = model(ids).logits
    tinylora.activate(model, "one")
    assert torch.equal(model(ids).logits, one) and not torch.equal(one, two)
    assert all(p.requires_grad for p in tinylora.adapter_parameters(model, "one"))
    assert not any(p.requires_grad for p in tinylora.adapter_parameters(model, "two"))


def test_dropout(config):
    """In training the mean over many masks is the forward without dropout; in evaluation there is none."""
    import dataclasses

    config = dataclasses.replace(config, dropout=0.5, target_modules=["q_proj"])
    layer = trained(qwen2(layers=1), config).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64)
    want = layer(x)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    layer.train()
    many = layer(x.expand(20000, 3, 64))
    assert torch.dist(many[0], many[1]) > 0.1 * torch.dist(want, base)
    assert torch.dist(many.mean(0), want) < 0.05 * torch.dist(want, base)
    layer.eval()
    assert torch.equal(layer(x), want)


def test_compiles_in_one_graph(config):
    torch._dynamo.reset()
    model, ids = trained(qwen2(layers=1), config), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_modules_to_save(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["lm_head"])
    model, ids = qwen2(), tokens()
    want = model(ids).logits
    tinylora.apply(model, config)
    assert torch.equal(model(ids).logits, want) and model.get_output_embeddings().weight.shape == (256, 64)
    parameters = tinylora.adapter_parameters(model)
    assert sum(p.numel() for p in parameters) == config.count(model.tinylora["default"].sites) + 256 * 64
    with torch.no_grad():
        model.lm_head.copies["default"].weight.mul_(2)
    changed = model(ids).logits
    torch.testing.assert_close(changed, 2 * want)
    with tinylora.disabled(model):
        assert torch.equal(model(ids).logits, want)
    tinylora.apply(model, LoraConfig(r=2), "without")
    assert torch.equal(model(ids).logits, want)
    tinylora.activate(model, "default")
    tinylora.save(model, tmp_path)
    assert torch.equal(tinylora.load(qwen2(), tmp_path)(ids).logits, changed)
    tinylora.merge(model)  # what save_pretrained writes then is a model by its own names
    torch.testing.assert_close(model(ids).logits, changed)
    assert torch.equal(model.state_dict()["lm_head.weight"], model.lm_head.copies["default"].weight)
    assert not [n for n in model.state_dict() if "copies" in n or "original" in n]
    model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, changed)
    model.load_state_dict(model.state_dict() | {"lm_head.weight": torch.zeros(256, 64)})
    assert not model(ids).logits.any()
    model.lm_head.copies["default"].weight.data.fill_(1)
    without = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(without)
    assert "lm_head.copies.default.weight" in tinylora.unmerge(model).state_dict()
    for names, message in (
        (["head"], "modules_to_save names 'head', expected a module of"),
        (["mlp"], "gets the adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            tinylora.apply(qwen2(), LoraConfig(modules_to_save=names))


def sites_of(layers, shapes, parent="self_attn"):
    return [Site(f"model.layers.{i}.{parent}.{n}", *s) for i in range(layers) for n, s in shapes.items()]


def test_counts_as_published():
    from bench import shapes
    from tinylora.integrations.transformers import meta_model
    from tinylora.nn.targets import find_targets
    from tinylora.nn.targets import sites_of as found_sites

    model = meta_model(shapes.MODELS / "Qwen2.5-7B.json")
    sites = found_sites(find_targets(model, None))
    assert LoraConfig(r=1).count(sites) == 2_523_136  # arXiv 2602.04118, figure 1
    assert LoraConfig(r=64).count(sites) == 64 * 2_523_136
    assert VeraConfig(r=256).count(sites) == sum(s.N + 256 for s in sites)
    assert AdaLoraConfig(r=12, total_steps=1).count(sites) == 12 * sum(s.N + s.K + 1 for s in sites)
    d, L, r = 4096, 32, 8
    llama = sites_of(L, dict.fromkeys(("q_proj", "k_proj", "v_proj"), (d, d)))  # LLaMA2-7B, arXiv 2311.09578
    fused = sites_of(L, {"qkv_proj": (3 * d, d)})
    counts = {name: TiedLoraConfig.preset(name, r=r).count(llama) for name in tied_lora.PRESETS}
    assert counts["LoRA"] == LoraConfig(r=r).count(fused) == 4_194_304
    assert counts["TL5"] == 131_072
    assert counts["TL6"] == counts["vBuA"] == 4 * d * r + L * (r + 3 * d) == 524_544
    assert round(counts["vBuA"] / counts["LoRA"], 3) == 0.125
    assert counts["VeRA"] == L * (r + 3 * d) == 393_472
    for name, count in counts.items():  # a model that has the three in one gives the same
        assert TiedLoraConfig.preset(name, r=r).count(fused) == count, name
    separate = TiedLoraConfig.preset("vBuA", r=r, fused=()).count(llama)
    assert separate == 6 * d * r + L * 3 * (r + d)


@pytest.mark.parametrize("tied", [(), ("down",), ("up",), ("down", "up")], ids="+".join)
@pytest.mark.parametrize("mask", range(1, 16))
def test_every_combination_of_tied_lora(tied, mask):
    trains = tuple(p for i, p in enumerate(tied_lora.PARTS) if mask >> i & 1)
    config = TiedLoraConfig(r=2, tied=tied, trained=trains)
    L, d = 3, 16
    sites = sites_of(L, dict.fromkeys(("q_proj", "k_proj", "v_proj"), (d, d)))
    count = {
        "down": (1 if "down" in tied else L) * 2 * d,
        "up": (3 if "up" in tied else 3 * L) * 2 * d,
        "u": 2 * L,
        "v": 3 * L * d,
    }
    assert config.count(sites) == sum(count[p] for p in trains)
    model, ids = qwen2(), tokens()
    want = model(ids).logits
    tinylora.apply(model, config)
    assert torch.equal(model(ids).logits, want)
    model(ids, labels=ids).loss.backward()
    assert any(
        p.grad is not None and p.grad.any() for p in tinylora.adapter_parameters(model)
    )  # it can leave its start


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoraConfig(alpha=0), "alpha is 0, expected a number above 0"),
        (lambda: LoraConfig(dropout=1.0), "dropout is 1.0, expected a number of 0 or more and below 1"),
        (lambda: LoraConfig(modules_to_save="lm_head"), "modules_to_save is 'lm_head', expected None, or names"),
        (lambda: TiedLoraConfig(trained=[]), "trained is [], expected some of down, up, u, v"),
        (lambda: TiedLoraConfig(tied=["u"]), "tied is ['u'], expected any of down, up"),
        (lambda: TiedLoraConfig.preset("TL1"), "preset is 'TL1', expected one of LoRA, TL5"),
        (lambda: AdaLoraConfig(total_steps=10, r=2, target_r=3), "target_r is 3, expected at most r, 2"),
        (lambda: AdaLoraConfig(total_steps=10, warmup_steps=5, final_steps=5), "total_steps is 10, expected more than"),
        (lambda: AdaLoraConfig(total_steps=10, beta1=1.0), "beta1 is 1.0, expected a number above 0 and below 1"),
        (lambda: VeraConfig(r=0), "r is 0"),
        (lambda: VeraConfig(d_initial=math.nan), "d_initial is nan, expected a number"),
        (lambda: LoraConfig(alpha=math.inf), "alpha is inf, expected a number above 0"),
        (lambda: LoraConfig(alpha=True), "alpha is True, expected a number above 0"),
        (lambda: LoraConfig(rslora="no"), "rslora is 'no', expected True or False"),
        (lambda: LoraConfig(target_modules={"q_proj": ""}, alpha="x"), "alpha is 'x'"),
        (lambda: LoraConfig(target_modules=5), "target_modules is 5, expected None, a regular expression"),
        (lambda: AdaLoraConfig(total_steps=10, alpha="8"), "alpha is '8', expected a number above 0"),
        (lambda: AdaLoraConfig(total_steps=10, beta1="x"), "beta1 is 'x', expected a number above 0"),
        (
            lambda: AdaLoraConfig(total_steps=10, orthogonality=-1),
            "orthogonality is -1, expected a number of 0 or more",
        ),
        (lambda: TinyLoraConfig(groups=5), "groups is 5, expected integers from 0 on"),
        (lambda: TiedLoraConfig(tied=5), "tied is 5, expected any of down, up"),
        (lambda: TiedLoraConfig(fused=3), "fused is 3, expected groups of names"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_numbers_and_names_of_other_kinds():
    """As numpy, a generator and the files of yesterday have them."""
    import numpy

    config = AdaLoraConfig(total_steps=10, alpha=numpy.float32(8), target_modules=numpy.array(["q_proj"]))
    assert type(config.alpha) is float and config.alpha == 8 and config.target_modules == ("q_proj",)
    config = LoraConfig(r=numpy.int64(4), dropout=numpy.float32(0.5), seed=numpy.int32(7))
    assert [type(v) for v in (config.r, config.dropout, config.seed)] == [int, float, int]
    assert LoraConfig(rslora=1).rslora is True and LoraConfig(rslora=None).rslora is False
    assert TinyLoraConfig(groups=iter([0, 1])).groups == (0, 1)
    assert TiedLoraConfig(fused=iter([["q_proj", "k_proj"]])).fused == (("q_proj", "k_proj"),)
    assert TiedLoraConfig(tied=(), fused=()).fused == ()


# --- against PEFT -------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_pairs():
    import peft

    return {
        "tinylora": (peft.TinyLoraConfig(r=2, u=3, target_modules=TARGETS), TinyLoraConfig(r=2, u=3, sigma="split")),
        "lora": (peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), LoraConfig(r=4, alpha=8)),
        "rslora": (
            peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS),
            LoraConfig(r=4, alpha=8, rslora=True),
        ),
        "vera": (peft.VeraConfig(r=16, target_modules=TARGETS), VeraConfig(r=16)),
        "adalora": (
            peft.AdaLoraConfig(
                init_r=3, target_r=2, lora_alpha=3, total_step=1000, orth_reg_weight=1e-30, target_modules=TARGETS
            ),
            AdaLoraConfig(r=3, target_r=2, alpha=3, total_steps=1000, warmup_steps=999, orthogonality=0.0),
        ),
    }


def pair(kind, dtype=torch.float32):
    """A PEFT model and ours with the same numbers, and the trained ones side by side."""
    import peft

    theirs_config, ours_config = peft_pairs()[kind]
    theirs = peft.get_peft_model(qwen2(dtype=dtype), theirs_config)
    ours = tinylora.apply(qwen2(dtype=dtype), ours_config)
    pairs = []
    with torch.no_grad():
        for name, layer in ((n, m) for n, m in ours.named_modules() if isinstance(m, tinylora.Linear)):
            a, p = layer.adapters["default"], theirs.base_model.model.get_submodule(name)
            if kind == "tinylora":
                for mine, his in ((a.down, p.tinylora_A), (a.up, p.tinylora_B), (a.P, p.tinylora_P)):
                    mine.copy_(his["default"])
            elif kind in ("lora", "rslora"):
                pairs += [(a.down, p.lora_A["default"].weight), (a.up, p.lora_B["default"].weight)]
            elif kind == "vera":
                a.shared.down.copy_(p.vera_A["default"])
                a.shared.up.copy_(p.vera_B["default"])
                pairs += [(a.b, p.vera_lambda_b["default"]), (a.d, p.vera_lambda_d["default"])]
            else:
                pairs += [(a.down, p.lora_A["default"]), (a.up, p.lora_B["default"]), (a.lam, p.lora_E["default"])]
    if kind == "tinylora":
        named = {id(p): p for _, p in theirs.named_parameters() if p.requires_grad}
        pairs = list(zip(tinylora.adapter_parameters(ours), named.values(), strict=True))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mine, his in pairs:
            value = 0.1 * torch.randn(his.shape, generator=g)
            his.copy_(value)
            mine.copy_(value.reshape(mine.shape))
    return theirs, ours, pairs


@pytest.mark.parametrize("kind", ["tinylora", "lora", "rslora", "vera", "adalora"])
def test_outputs_gradients_and_loss_curve_are_pefts(kind):
    theirs, ours, pairs = pair(kind)
    ids = tokens()
    a, b = ours(ids).logits, theirs(input_ids=ids).logits
    with tinylora.disabled(ours):
        effect = torch.dist(ours(ids).logits, a)
    assert effect > 1e-2 * a.norm()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ours(ids, labels=ids).loss.backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    for mine, his in pairs:
        torch.testing.assert_close(mine.grad.reshape(his.shape), his.grad, rtol=1e-3, atol=1e-6)
    losses = []
    for model, parameters in (
        (ours, tinylora.adapter_parameters(ours)),
        (theirs, [p for p in theirs.parameters() if p.requires_grad]),
    ):
        optimizer = torch.optim.Adam(parameters, lr=3e-3)
        curve = []
        for step in range(50):
            batch = tokens() if step % 2 else tokens().flip(0)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    assert max(abs(x - y) for x, y in zip(*losses, strict=True)) < 2e-3 * losses[0][0], losses


# --- AdaLoRA's budget ---------------------------------------------------------------------------------------------


def alive(model):
    layers = [m.adapters["default"] for m in model.modules() if isinstance(m, tinylora.Linear)]
    return sum(int((a.lam != 0).sum()) for a in layers), layers


def test_adalora_in_trainer_reaches_its_budget_without_a_line_from_the_user(tmp_path):
    import datasets
    from transformers import Trainer, TrainingArguments

    steps = 30
    config = AdaLoraConfig(r=6, target_r=2, total_steps=steps, warmup_steps=5, final_steps=8, interval=2)
    model = tinylora.apply(qwen2(), config)
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=64).tolist()]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=datasets.Dataset.from_list(rows)).train()
    count, layers = alive(model)
    assert count == 2 * len(layers) == 28
    assert int(model.tinylora["default"].steps) == steps
    kept = [int(a.kept.sum()) for a in layers]
    assert sum(kept) == 28 and len(set(kept)) > 1  # the budget went where it matters, not everywhere alike


def test_adalora_schedule_scores_and_penalty():
    config = AdaLoraConfig(r=4, target_r=1, total_steps=20, warmup_steps=4, final_steps=6, interval=1)
    assert [config.budget(t) for t in (0, 4, 14, 20)] == [4, 4, 1, 1]
    assert math.isclose(config.budget(9), 1 + 3 * 0.5**3)
    model, ids = tinylora.apply(qwen2(), config), tokens()
    parameters = tinylora.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=0.0)  # numbers stand still: scores can be computed by hand
    _, layers = alive(model)
    with torch.no_grad():
        for i, a in enumerate(layers):
            a.lam.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]) * (i + 1))
    ibar = [torch.zeros(4) for _ in layers]
    ubar = [torch.zeros(4) for _ in layers]
    for step in range(1, 15):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        plain = [a.up.grad.clone() for a in layers]
        importance = [(a.lam * a.lam.grad).abs() for a in layers]
        optimizer.step()
        for i, a in enumerate(layers):
            P = a.up.detach()
            penalty = torch.func.grad(lambda P: config.orthogonality * torch.dist(P.T @ P, torch.eye(4)) ** 2)(P)
            torch.testing.assert_close(a.up.grad, plain[i] + penalty)
            ibar[i] = 0.85 * ibar[i] + 0.15 * importance[i]
            ubar[i] = 0.85 * ubar[i] + 0.15 * (importance[i] - ibar[i]).abs()
            torch.testing.assert_close(a.smoothed_lam, ibar[i])
            torch.testing.assert_close(a.uncertain_lam, ubar[i])
        kept = torch.cat([a.kept for a in layers])
        assert kept.sum() == (56 if step <= 4 else round(config.budget(step) * 14)), step
        assert all((a.lam == 0)[a.kept == 0].all() for a in layers)

    def s(a, name):
        return getattr(a, f"smoothed_{name}") * getattr(a, f"uncertain_{name}")

    every = torch.cat([s(a, "lam") + s(a, "up").mean(0) + s(a, "down").mean(1) for a in layers])
    assert set(every.topk(14).indices.tolist()) == set(kept.nonzero().flatten().tolist())
    copied = copy.deepcopy(model)  # a copy is watched, too, and apart from the original
    parameters = tinylora.adapter_parameters(copied)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(parameters, lr=0.0).step()
    assert int(copied.tinylora["default"].steps) == 15 and int(model.tinylora["default"].steps) == 14


def test_adalora_s_importance_is_equation_8():
    """Of a triplet: its λ's, and the means of its column of P and its row of Q."""
    torch.manual_seed(0)
    layer = tinylora.Linear.from_linear(nn.Linear(3, 5), AdaLoraConfig(r=2, target_r=1, total_steps=10))
    adapter = layer.adapters["default"]
    smoothed, uncertain = ({n: torch.zeros_like(p) for n, p in adapter.named_parameters()} for _ in range(2))
    for _ in range(2):
        for n, p in adapter.named_parameters():
            p.data, p.grad = torch.randn_like(p), torch.randn_like(p)
            importance = (p * p.grad).abs().detach()
            smoothed[n] = 0.8 * smoothed[n] + 0.2 * importance
            uncertain[n] = 0.6 * uncertain[n] + 0.4 * (importance - smoothed[n]).abs()
        found = adapter.score(0.8, 0.6)
    s = {n: smoothed[n] * uncertain[n] for n in smoothed}
    expected = [s["lam"][i] + s["up"][:, i].sum() / 5 + s["down"][i].sum() / 3 for i in range(2)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("trained", "zero"), [(tied_lora.PARTS, "up"), (("u", "v"), "v"), (("down", "u"), "u"), (("down",), "down")]
)
def test_where_tied_lora_starts(trained, zero):
    own = tinylora.apply(qwen2(layers=1), TiedLoraConfig(r=2, trained=trained)).tinylora["default"]
    numbers = dict(own.named_parameters()) | dict(own.named_buffers())
    assert {n.split("_")[0] for n, t in numbers.items() if not t.any()} == {zero}


def test_adalora_under_two_optimizers():
    """Whichever steps first: orthogonality is of the factors' gradients, wherever λ's are stepped."""
    config = AdaLoraConfig(r=4, target_r=1, total_steps=20, warmup_steps=4, final_steps=6)
    model, ids = tinylora.apply(qwen2(), config), tokens()
    numbers = named_numbers(model)
    lams = [p for n, p in numbers.items() if n.endswith("lam")]
    factors = [p for n, p in numbers.items() if n.endswith(("up", "down"))]
    model(ids, labels=ids).loss.backward()
    plain = [p.grad.clone() for p in factors]
    torch.optim.SGD(factors, lr=0.0).step()
    moved = [p.grad.clone() for p in factors]
    assert all((a - b).abs().max() > 0 for a, b in zip(moved, plain, strict=True))
    torch.optim.SGD(lams, lr=0.0).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(factors, moved, strict=True))
    assert int(model.tinylora["default"].steps) == 1


def test_adalora_under_an_optimizer_for_each_layer():
    """Every λ would be ranked within its own layer; a new optimizer that goes on where another ended is right."""
    model, ids = tinylora.apply(qwen2(), AdaLoraConfig(total_steps=20)), tokens()
    lams = [p for n, p in named_numbers(model).items() if n.endswith("lam")]
    model(ids, labels=ids).loss.backward()
    for part in (lams[:-1], lams, lams[:-1]):
        for _ in range(2):
            torch.optim.SGD(part, lr=0.0).step()
    each = [torch.optim.SGD([p], lr=0.0) for p in copy.deepcopy(model).parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="optimizers take turns in stepping AdaLoRA's λ"):
        for optimizer in each * 2:
            optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """As ZeroRedundancyOptimizer and Lookahead: a step of its own, within which another optimizer steps."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.fails = inner, False

    def step(self, closure=None):
        if self.fails:
            raise MemoryError
        return self.inner.step(closure)


@pytest.mark.parametrize("how", ["closure", "closure=", "within another's", "of others", "after a step that failed"])
def test_adalora_counts_a_step_once_and_penalises_what_steps(how):
    def run(how):
        model, ids = (
            tinylora.apply(qwen2(), AdaLoraConfig(total_steps=12, r=4, target_r=1, orthogonality=0.5)),
            tokens(),
        )
        optimizer = torch.optim.SGD(tinylora.adapter_parameters(model), lr=0.1)
        wrapped, outer = Wrapper(optimizer), Wrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
        outer.inner = optimizer

        def closure():
            optimizer.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            return loss

        for _ in range(4):
            if how == "closure":
                optimizer.step(closure)
                continue
            if how == "closure=":
                wrapped.step(closure=closure)
                continue
            closure()
            if how == "after a step that failed":
                kept, wrapped.fails = [p.grad.clone() for p in tinylora.adapter_parameters(model)], True
                with pytest.raises(MemoryError):
                    wrapped.step()
                wrapped.fails = False
                for p, grad in zip(tinylora.adapter_parameters(model), kept, strict=True):
                    p.grad = grad
            (optimizer if how == "plain" else outer if how == "of others" else wrapped).step()
        assert int(model.tinylora["default"].steps) == 4
        return torch.cat([p.detach().flatten() for p in tinylora.adapter_parameters(model)])

    assert torch.equal(run(how), run("plain"))


@pytest.mark.parametrize("overflow", [False, True])
def test_adalora_under_a_grad_scaler(overflow):
    """A fused optimizer undoes the loss's scale, and skips a step of inf, itself: the hooks must know both."""

    def run(enabled, fused):
        torch.manual_seed(0)
        model = nn.Module()
        model.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        tinylora.apply(model, AdaLoraConfig(total_steps=20, r=4, target_r=1, orthogonality=0.5))
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        parameters = tinylora.adapter_parameters(model)
        optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=fused)
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
        for step in range(20):
            loss = model.blocks[1](torch.tanh(model.blocks[0](x))).square().sum()
            scaler.scale(loss * 1e38 if overflow and step == 0 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for p in parameters]), model.tinylora["default"].steps.item()

    want, steps = run(overflow, False)
    got, took = run(True, True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert took == steps == (19 if overflow else 20)
