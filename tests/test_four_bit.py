"""Bases of four bits a number (QLoRA), with bitsandbytes itself: the operator, models, PEFT's layers, training."""

import copy
import io

import peft
import pytest
import torch
from models import qwen2, tokens
from problems import NAMES, Problem, assert_as_good_as_torch, exact, grads, packed, torch_own
from tiny_gsm8k import write_model, write_problems

import tinylora
from tinylora import cli
from tinylora.integrations.peft import counts, reset_counts
from tinylora.integrations.transformers import load_model
from tinylora.nn.four_bit import FourBitLinear
from tinylora.ops import adapted_linear, eager
from tinylora.ops.four_bit import FourBit

bnb = pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")

f32, bf16 = torch.float32, torch.bfloat16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "TinyLoRA": tinylora.TinyLoraConfig(r=2, u=3, n_tie=2),
    "LoRA-XS": tinylora.LoraXSConfig(r=2),
    "LoRA": tinylora.LoraConfig(r=4),
    "AdaLoRA": tinylora.AdaLoraConfig(r=4, target_r=2, total_steps=50),
    "VeRA": tinylora.VeraConfig(r=4),
    "Tied-LoRA": tinylora.TiedLoraConfig(r=2),
}


def held(problem, weight, dense, ids, operands, basis):
    """The operator on a packed weight against fp64 on what it means, by the one rule."""
    x, _, down, core, up, bias = operands
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to(problem.dtype)
    on_dense = (x, dense.to(problem.dtype), down, core, up, bias)
    want, own = exact(on_dense, ids, basis, dy), torch_own(on_dense, ids, basis, dy)
    ours = grads(lambda x, _, *rest, **more: adapted_linear(x, weight, *rest, **more), on_dense, ids, basis, dy)
    assert ours.pop("weight") is None
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])
        assert value.dtype == (operands[0] if name == "y" else operands[NAMES.index(name)]).dtype, name


PROBLEMS = [
    Problem(0, 48, 128, 2),
    Problem(1, 48, 128, 2),
    Problem(70, 48, 128, 2, bf16, core="mixed"),
    Problem(70, 48, 128, 16, bf16, factors=f32, core="diagonal"),
    Problem(9, 48, 128, 3, core="none", bias=False),
    Problem(9, 48, 128, 3, bf16, core="mixed-rows"),
    Problem(9, 48, 72, 3, core="rows"),  # blocks of absmax that go over the ends of rows
]


@pytest.mark.parametrize("kind, nested, block", [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 64)])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_numbers(problem, kind, nested, block):
    operands, ids, basis = problem.operands()
    weight, dense = packed(operands[1].float(), nested, kind, block)
    assert torch.equal(weight.dense(bf16), dense.to(bf16))
    held(problem, weight, dense, ids, operands, basis)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.M], ids=lambda p: p.id)
def test_numbers_of_few_rows_as_on_a_gpu(problem, nested, monkeypatch):
    """bitsandbytes' product and the correction added to it; the pass that adds it by a kernel is in test_kernels.py."""
    monkeypatch.setattr(FourBit, "multiplies", lambda self, x: True)
    operands, ids, basis = problem.operands()
    weight, dense = packed(operands[1].float(), nested)
    held(problem, weight, dense, ids, operands, basis)


def test_few_rows_are_multiplied_without_the_weight(monkeypatch):
    (x, weight, down, core, up, bias), _, _ = Problem(5, 48, 128, 2).operands()
    four, dense = packed(weight)
    monkeypatch.setattr(FourBit, "multiplies", lambda self, x: True)
    with monkeypatch.context() as only_product:
        only_product.setattr(FourBit, "dense", None)
        y = adapted_linear(x, four, down, core, up, bias)
    torch.testing.assert_close(y, adapted_linear(x, dense, down, core, up, bias))
    with monkeypatch.context() as only_dense:
        only_dense.setattr(FourBit, "product", None)
        rows = adapted_linear(x, four, down, core, up, bias, batch_invariant=True)
        assert torch.equal(rows[:1], adapted_linear(x[:1], four, down, core, up, bias, batch_invariant=True))


def test_the_weight_is_not_kept_for_the_backward():
    (x, weight, down, core, up, _), _, _ = Problem(6, 96, 128, 2).operands()
    four, _ = packed(weight)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        adapted_linear(x.requires_grad_(), four, down, core.requires_grad_(), up)
    assert kept and max(kept) < 96 * 128 / 2


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x, w, d, u: (x[:, :100], w, d, u), r"x has shape \(5, 100\), expected \(..., 128\)"),
        (lambda x, w, d, u: (x, w, d[:, :100], u), r"down has shape \(2, 100\), expected \(r, 128\)"),
        (lambda x, w, d, u: (x.long(), w, d, u), "dtype torch.int64"),
        (lambda x, w, d, u: (x, w, d, u[:40]), r"up has shape \(40, 2\), expected \(48, 2\)"),
    ],
)
def test_what_does_not_fit_is_said(wrong, message):
    (x, weight, down, _, up, _), _, _ = Problem(5, 48, 128, 2).operands()
    x, four, down, up = wrong(x, packed(weight)[0], down, up)
    with pytest.raises(ValueError, match=message):
        adapted_linear(x, four, down, None, up)


# --- whole models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, which transformers quantises as it loads it."""
    path = tmp_path_factory.mktemp("base")
    qwen2(intermediate_size=128).save_pretrained(path)
    return path


def quantised(folder, dtype=f32, compute=None):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute or dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)
    return model.train()


def dense_twin(folder, model, dtype=f32):
    """The same model with the numbers that the four bits mean."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                twin.get_parameter(f"{name}.weight").copy_(FourBit.of(module.weight).dense(dtype))
    return twin


def shake(model, seed=3):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model if isinstance(model, list) else tinylora.adapter_parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))


def step(model):
    model.zero_grad()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_is_its_dense_twin(kind, folder, tmp_path):
    """In numbers, gradients, files both ways, copies, in eval() and under the base's own names."""
    model = quantised(folder)
    names = list(model.state_dict())
    base = model(tokens()).logits.detach()
    twin = dense_twin(folder, model)
    tinylora.apply(model, CONFIGS[kind])
    assert torch.equal(model(tokens()).logits, base)
    assert sum(isinstance(m, FourBitLinear) for m in model.modules()) == 14
    assert [n for n in model.state_dict() if "tinylora" not in n and "adapters" not in n] == names
    tinylora.apply(twin, CONFIGS[kind])
    shake(model)
    tinylora.save(model, tmp_path)
    tinylora.load(twin, tmp_path)  # so they have one fingerprint
    ours, theirs = step(model), step(twin)
    assert (ours - base).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for p, q in zip(tinylora.adapter_parameters(model), tinylora.adapter_parameters(twin), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    anew = tinylora.load(quantised(folder), tmp_path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), anew, torch.load(file, weights_only=False)):
        assert torch.equal(step(other), ours)
        shake(other)  # a copy's adapter is its own
    assert torch.equal(model.eval()(tokens()).logits, ours)
    with tinylora.disabled(model):
        assert torch.equal(model(tokens()).logits, base)
    assert torch.equal(model.train()(tokens()).logits, ours)


def test_a_saved_base_is_bitsandbytes_own(folder, tmp_path):
    model = quantised(folder)
    base = model(tokens()).logits
    tinylora.apply(model, CONFIGS["LoRA"])
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert torch.equal(again(tokens()).logits, base)


def test_bf16_and_autocast(folder):
    model = quantised(folder, bf16)
    twin = dense_twin(folder, model, bf16)
    for m in (model, twin):
        tinylora.apply(m, CONFIGS["LoRA"])
        shake(m)
    ours, theirs = step(model), step(twin)
    assert ours.dtype == bf16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    assert layer(x).dtype == f32, "x's own, as bitsandbytes gives it"
    with torch.autocast("cpu", dtype=bf16):
        assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_rows_of_different_adapters(folder):
    model = quantised(folder)
    tinylora.apply(model, CONFIGS["TinyLoRA"])
    shake(model)
    v = [p.detach().clone() for p in tinylora.adapter_parameters(model)]
    alone = model(tokens()).logits.detach()
    base = quantised(folder)(tokens()).logits
    names = [n for n, _ in tinylora.nn.model.named_numbers(model).items()]
    tinylora.stack(model, [dict(zip(names, v, strict=True))])
    with torch.no_grad(), tinylora.adapter_ids(model, torch.tensor([0, -1])):
        both = model(tokens()).logits
    torch.testing.assert_close(both[0], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], base[1], rtol=1e-5, atol=1e-5)


def test_compiled(folder):
    model = quantised(folder)
    tinylora.apply(model, CONFIGS["VeRA"])
    shake(model)
    want = step(model)
    grads = [p.grad.clone() for p in tinylora.adapter_parameters(model)]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens(), labels=tokens())
    out.loss.backward()
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-5)
    for p, g in zip(tinylora.adapter_parameters(model), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-6)


def test_dropout_and_checkpointing(folder):
    model = quantised(folder)
    tinylora.apply(model, tinylora.LoraConfig(r=4, dropout=0.5))
    shake(model)
    torch.manual_seed(0)
    first = step(model)
    assert not torch.equal(step(model), first)
    torch.manual_seed(0)
    grads = [p.grad.clone() for p in tinylora.adapter_parameters(model) if step(model) is not None][:1]
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    torch.testing.assert_close(step(model), first)
    assert grads[0].abs().sum() > 0 and all(p.grad is not None for p in tinylora.adapter_parameters(model))


def test_what_cannot_be_done_is_said(folder, tmp_path):
    model = quantised(folder)
    tinylora.apply(model, CONFIGS["LoRA"])
    before = model(tokens()).logits
    with pytest.raises(ValueError, match="four bits a number, which cannot hold what an adapter adds"):
        tinylora.merge(model)
    assert torch.equal(model(tokens()).logits, before)
    mixed = torch.nn.Sequential(torch.nn.Linear(8, 8), bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu"))
    tinylora.apply(mixed, tinylora.LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="four bits a number"):
        tinylora.merge(mixed)
    assert mixed[0].merged is None
    with pytest.raises(ValueError, match="trained on another base model"):
        tinylora.save(model, tmp_path)
        tinylora.load(qwen2(), tmp_path)
    alone = torch.nn.ModuleList([bnb.nn.Linear4bit(64, 32, quant_type="nf4")])
    config = tinylora.LoraConfig(r=4, target_modules=["0"])
    with pytest.raises(ValueError, match="not quantised yet: move the model to its device first"):
        tinylora.apply(alone, config)
    (layer,) = alone.to("cpu").eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # on CPUs with bf16 alone
        with pytest.raises(ValueError, match="has run in eval\\(\\) on a CPU"):
            tinylora.apply(alone, config)
    eight = torch.nn.ModuleList([bnb.nn.Linear8bitLt(64, 32)])
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear at all, only Linear8bitLt"):
        tinylora.apply(eight, CONFIGS["LoRA"])


def test_trained_on_four_bits_and_merged_into_sixteen(folder, tmp_path):
    """By way of a plain LoRA, which says nothing of a base."""
    model = quantised(folder)
    tinylora.apply(model, CONFIGS["TinyLoRA"])
    shake(model)
    tinylora.save(model, tmp_path / "lora", format="lora")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
    before = {n: layer.weight.clone() for n, layer in whole.named_modules() if isinstance(layer, torch.nn.Linear)}
    tinylora.merge(tinylora.load(whole, tmp_path / "lora"))
    for name, layer in tinylora.nn.model.adapted_layers(model).items():
        delta = layer.adapters["default"].factors().delta()
        torch.testing.assert_close(whole.get_submodule(name).weight, before[name] + delta)


def test_one_layer_by_itself():
    linear = bnb.nn.Linear4bit(64, 32, bias=True, compute_dtype=f32, quant_type="nf4").to("cpu")
    layer = tinylora.Linear.from_linear(linear, CONFIGS["LoRA"])
    assert isinstance(layer, FourBitLinear) and isinstance(layer, bnb.nn.Linear4bit)
    shake(layer)
    x = torch.randn(3, 64)
    want = x @ (FourBit.of(linear.weight).dense(f32) + layer.adapters["default"].factors().delta()).T + linear.bias
    torch.testing.assert_close(layer(x), want)


# --- PEFT's -------------------------------------------------------------------------------------------------

PEFTS = {
    "LoRA": ("LoRA, 4 bits", lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)),
    "VeRA": ("VeRA", lambda: peft.VeraConfig(r=4, target_modules=TARGETS)),
    "AdaLoRA": (
        "AdaLoRA, 4 bits",
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=50, target_modules=TARGETS),
    ),
}


@pytest.fixture
def patched():
    yield
    tinylora.unpatch_peft()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("kind", PEFTS)
def test_pefts_layers(kind, dtype, autocast, folder, patched):
    """One layer against fp64, by the one rule, with PEFT's own error as the measure."""
    counted, config = PEFTS[kind]
    base = quantised(folder, bf16 if autocast else dtype)
    twin = dense_twin(folder, base, dtype).double()
    exact = peft.get_peft_model(twin, config(), autocast_adapter_dtype=False).double().train()
    model = peft.get_peft_model(base, config()).train()
    shake([p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                exact.get_parameter(name).copy_(p)
    place = "base_model.model.model.layers.1.mlp.gate_proj"
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(3, 7, 64, generator=g).to(dtype), torch.randn(3, 7, 128, generator=g).to(dtype)

    def run(model, x):
        layer, x = model.get_submodule(place), x.clone().requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", bf16, enabled=autocast and x.dtype != torch.float64):
            y = layer(x)
        y.backward(dy.to(y.dtype))
        shared = "vera_A", "vera_B", "ranknum"
        own = {
            n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None and not n.startswith(shared)
        }
        return {"y": y.detach(), "x": x.grad} | own

    theirs, exactly = run(model, x), run(exact, x.double())
    reset_counts()
    tinylora.patch_peft()
    ours = run(model, x)
    assert counts()[counted] == {"fast": 1}
    assert ours.keys() == theirs.keys() and len(ours) > 3
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert_as_good_as_torch(name, value, exactly[name], theirs[name])


def test_what_pefts_layers_leave_to_peft(folder, patched):
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(quantised(folder, bf16)), PEFTS["LoRA"][1]())
    shake([p for p in model.parameters() if p.requires_grad])
    tinylora.patch_peft()

    def reasons(x, layer=model.base_model.model.model.layers[0].mlp.up_proj):
        theirs = type(layer).forward.__wrapped__(layer, x)
        reset_counts()
        torch.testing.assert_close(layer(x), theirs, rtol=0.02, atol=0.02)
        return [n for n, count in counts()["LoRA, 4 bits"].items() if count]

    x = torch.randn(3, 64)
    model.train()
    assert reasons(x.bfloat16()) == ["fast"]
    assert reasons(x) == ["4 bits computed in less than x's dtype: PEFT adds the correction in that"]
    model.disable_adapter_layers()
    assert reasons(x.bfloat16()) == ["adapters disabled"]
    model.enable_adapter_layers()
    with torch.no_grad():
        model.eval()
        assert reasons(x.bfloat16()) == ["4 bits on a CPU in eval(): bitsandbytes packs them for it"]


def test_dual_numbers_meet_the_base_as_well(folder):
    model = tinylora.apply(quantised(folder), CONFIGS["TinyLoRA"])
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    with torch.no_grad():
        layer.adapters["default"].v.add_(1)
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, layer(torch.ones_like(x)) - layer(torch.zeros_like(x)), rtol=1e-4, atol=1e-5)


def test_the_first_call_that_settles_the_dtype_is_pefts(folder, patched):
    """bitsandbytes decides by the first x where nobody did, and keeps to it."""
    model = peft.get_peft_model(quantised(folder, bf16), PEFTS["LoRA"][1]()).train()
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.base_layer.compute_dtype, layer.base_layer.compute_type_is_set = None, False
    tinylora.patch_peft()
    reset_counts()
    for _ in range(2):
        layer(torch.randn(3, 64))
    found = counts()["LoRA, 4 bits"]
    assert layer.base_layer.compute_dtype == f32 and found.pop("fast") == 1
    assert found == {"4 bits whose first call decides in what dtype they are computed": 1}


def test_a_peft_model_trains_as_without_the_patch(folder, patched):
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(quantised(folder)), PEFTS["LoRA"][1]()).train()
    shake([p for p in model.parameters() if p.requires_grad])
    theirs = step(model)
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    tinylora.patch_peft()
    torch.testing.assert_close(step(model), theirs, rtol=1e-4, atol=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == want.keys() and len(want) == 28
    for name, grad in found.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-6)


# --- training -----------------------------------------------------------------------------------------------


def test_train_and_eval_on_four_bits(tmp_path, capsys):
    """`tinylora train sft` and `grpo`, resumed, and `eval`, with `--dtype nf4`."""
    write_model(tmp_path / "model")
    write_problems(tmp_path / "data")
    where = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--dtype", "nf4"]
    for command in ("sft", "grpo"):
        out = tmp_path / command
        arguments = ["train", command, "--out", str(out), *where, "--lr", "0.02", "--n-tie", "4"]
        more = {"sft": ["--batch-size", "4"], "grpo": ["--batch-size", "16", "--max-completion-length", "10"]}
        arguments += more[command]
        assert cli.main([*arguments, "--save-every", "1", "--steps", "2"]) == 0, capsys.readouterr().err
        model, _ = load_model(tmp_path / "model", "nf4")
        tinylora.load(model, out / "adapter")
        assert all(p.abs().sum() > 0 for p in tinylora.adapter_parameters(model))
    scores = ["eval", *where, "--split", "train", "--limit", "2", "--adapter", str(out / "adapter")]
    scores += ["--max-completion-length", "10", "--out", str(tmp_path / "scores.json")]
    assert cli.main(scores) == 0, capsys.readouterr().err


def test_a_wrong_dtype_is_said(tmp_path):
    with pytest.raises(ValueError, match="dtype is 'int4', expected bfloat16, float16, float32 or nf4"):
        load_model(tmp_path, "int4")


def test_eager_adds_to_what_was_multiplied():
    """`add_low_rank` is all that few rows run after bitsandbytes' product."""
    (x, weight, down, core, up, bias), _, _ = Problem(9, 48, 128, 3).operands()
    y = torch.nn.functional.linear(x, weight, bias)
    z = eager.add_low_rank(y, x, down, core, up, None, None)
    want, own_z = eager.forward(x, weight, down, core, up, bias, None, None)
    assert torch.equal(y, want) and torch.equal(z, own_z)


def test_eval_changes_no_layer_of_an_adapted_model(folder):
    """bitsandbytes changes 4-bit layers in eval() on some CPUs; those beside ours would then pass no gradient on."""
    model = quantised(folder)
    tinylora.apply(model, tinylora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    shake(model)
    first = step(model)
    grads = [p.grad.clone() for p in tinylora.adapter_parameters(model)]
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, first)
    assert torch.equal(step(model.train()), first)
    for p, g in zip(tinylora.adapter_parameters(model), grads, strict=True):
        assert torch.equal(p.grad, g) and g.abs().sum() > 0


def test_one_base_in_whatever_dtype_it_is_computed(folder, tmp_path):
    model = tinylora.apply(quantised(folder, compute=torch.float16), CONFIGS["TinyLoRA"])
    shake(model)
    tinylora.save(model, tmp_path)
    for dtype in (f32, bf16):
        other = tinylora.load(quantised(folder, compute=dtype), tmp_path)
        for ours, theirs in zip(*(tinylora.nn.model.adapted_layers(m).values() for m in (model, other)), strict=True):
            for a, b in zip(*(layer.adapters["default"].factors() for layer in (ours, theirs)), strict=True):
                torch.testing.assert_close(a.float(), b.float(), rtol=0.01, atol=0.01)


def test_batch_invariant_with_the_adapter_off(folder):
    model = quantised(folder)
    tinylora.apply(model, CONFIGS["TinyLoRA"], batch_invariant=True)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(40, 128)
    with tinylora.disabled(model):
        assert torch.equal(layer(x)[:1], layer(x[:1])) and torch.equal(layer(x)[7:20], layer(x[7:20]))
        torch.testing.assert_close(layer(x), x @ FourBit.of(layer.weight).dense(f32).T)


def test_what_is_lost_or_cannot_train_is_said(folder, tmp_path):
    model = quantised(folder)
    for name in ("down_proj", "mlp"):
        with pytest.raises(ValueError, match="is quantised: it cannot train whole"):
            tinylora.apply(model, tinylora.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[name]))
    assert tinylora.adapter_names(model) == []
    tinylora.apply(model, CONFIGS["LoRA"])
    model.dequantize()
    with pytest.raises(ValueError, match=r"q_proj has lost adapter 'default': something replaced it"):
        tinylora.save(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_what_trains_stays_fp32_in_trl(tmp_path):
    """TRL casts what trains of a quantised model to bf16, in which a step of 1e-4 is none."""
    import datasets
    import trl

    from tinylora.integrations.trl import adapter_trainer

    write_model(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model", "nf4")
    tinylora.apply(model, tinylora.TinyLoraConfig(u=1, n_tie=14))
    (v,) = tinylora.adapter_parameters(model)
    torch.nn.init.constant_(v, 0.123456)
    args = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), learning_rate=2e-4, max_steps=2, report_to=[], use_cpu=True, bf16=False,
        lr_scheduler_type="constant", per_device_train_batch_size=2,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["How many?"] * 4, "completion": ["\\n#### 7"] * 4})
    trainer = adapter_trainer(trl.SFTTrainer)(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    assert v.dtype == f32 and v.item() == pytest.approx(0.123456, rel=1e-6)
    trainer.train()
    assert v.dtype == f32 and 1e-5 < abs(v.item() - 0.123456) < 1e-3
    assert not model._hf_peft_config_loaded
    preferences = datasets.Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    with pytest.raises(ValueError, match="DPOTrainer would load its reference by name, not quantised"):
        adapter_trainer(trl.DPOTrainer)(model=model, train_dataset=preferences, processing_class=tokenizer)
