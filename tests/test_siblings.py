"""Sibling groups give what the layers give by themselves: the operator, and whole models."""

import pytest
import torch
from models import minilm_folder, qwen2, tokens
from problems import Problem, assert_as_good_as_torch, exact, grads, torch_own
from sibling_models import CONFIGS, adapted, groups, loss_and_grads, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tinylora
from tinylora import LoraConfig, TinyLoraConfig, VeraConfig
from tinylora.ops.siblings import adapted_linears, joined

pytestmark = pytest.mark.usefixtures("side_by_side")


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(7, 24, 16, 3),
        Problem(65, 40, 32, 2, torch.bfloat16, core="mixed"),
        Problem(130, 40, 72, 6, torch.float16, factors=torch.float32, core="mixed-rows", bias=False),
        Problem(5, 33, 17, 2, core="rows"),
        Problem(65, 40, 32, 6, torch.bfloat16, core="mixed", u=12, groups=3),
        Problem(20, 40, 32, 6, core="mixed-rows", u=6, groups=2),
        Problem(1, 24, 16, 2, core="none"),
        Problem(0, 24, 16, 2),
    ],
    ids=lambda p: p.id,
)
def test_is_adapted_linear_on_weights_in_parts(problem, side_by_side):
    (x, weight, down, core, up, bias), ids, basis = problem.operands()
    sizes = [problem.N // 2, 1, problem.N - problem.N // 2 - 1]
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(5))

    def ours(x, weight, down, core, up, bias, ids, basis):
        weights, biases = ([] if t is None else t.detach().split(sizes) for t in (weight, bias))
        if not side_by_side:
            weights, biases = [w.clone() for w in weights], [b.clone() for b in biases]
        assert (joined(weights) is not None) == side_by_side
        return torch.cat(adapted_linears(x, weights, down.detach(), core, up.detach(), biases, ids, basis), -1)

    given = (x, weight, down, core, up, bias), ids, basis, dy
    got, true, torchs = grads(ours, *given), exact(*given), torch_own(*given)
    for name in ("y", "x", "core") if core is not None else ("y", "x"):
        assert_as_good_as_torch(name, got[name], true[name], torchs[name])


def test_large_fp32_products_come_one_by_one(monkeypatch):
    (x, weight, down, core, up, bias), ids, basis = Problem(9, 48, 32, 2, core="mixed-rows").operands()
    weights, biases = weight.split([16, 32]), bias.split([16, 32])
    whole = adapted_linears(x, weights, down, core, up, biases, ids, basis)
    monkeypatch.setattr("tinylora.ops.siblings.WIDE_ON_CPU", 100)
    for with_bias in (True, False):
        expected = [y if with_bias else y - b for y, b in zip(whole, biases, strict=True)]
        got = adapted_linears(x, weights, down, core, up, biases if with_bias else [], ids, basis)
        torch.testing.assert_close(list(got), expected)


def test_a_base_that_trains_gets_its_gradient(calls):
    model = adapted(layers=1)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    model(tokens(), labels=tokens()).loss.backward()
    assert calls == {"group": 1, "alone": 4} and model.model.layers[0].mlp.up_proj.weight.grad.norm() > 0


def test_outputs_may_be_changed_in_place_and_one_may_stay_unused():
    (x, weight, down, core, up, _), ids, basis = Problem(6, 24, 16, 2).operands()
    x.requires_grad_()
    weights = weight.split([8, 16])
    q, k = adapted_linears(x, weights, down, core, up, [], ids, basis)
    before = k.detach().clone()
    q.mul_(3).sum().backward()
    assert torch.equal(k, before)
    expected = 3 * (weight + up @ core @ down)[:8].sum(0)
    torch.testing.assert_close(x.grad, expected.expand(6, -1))


def test_the_gradient_of_a_gradient_is_refused_and_autocast_changes_nothing_in_a_backward():
    (x, weight, down, core, up, _), ids, basis = Problem(6, 24, 16, 2).operands()
    weights = weight.split([8, 16])
    x.requires_grad_()

    def loss():
        return torch.cat(adapted_linears(x, weights, down, core, up, [], ids, basis), -1).square().sum()

    (want,) = torch.autograd.grad(loss(), x)
    with pytest.raises(RuntimeError, match="the gradient of a gradient"):
        torch.autograd.grad(loss(), x, create_graph=True)
    y = loss()
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(y, x)
    assert torch.equal(inside, want)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_that_trains_through_the_kernels(config):
    """Triton's interpreter: losses and gradients of groups at the first step and the next, when they keep operands."""
    lanes = pytest.importorskip("lanes")  # without Triton there are no kernels
    inputs = tokens()[:1, :4]

    def step(model):
        loss = model(inputs, labels=inputs).loss
        grads = torch.autograd.grad(loss, list(tinylora.adapter_parameters(model)))
        return loss.detach(), *grads

    together, alone = (adapted(siblings, config, layers=1, hidden=32) for siblings in (True, False))
    for _ in range(2):
        want = step(alone)
        with lanes.interpreter():
            found = step(together)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        for model in (together, alone):
            for p, grad in zip(tinylora.adapter_parameters(model), want[1:], strict=True):
                p.data.sub_(grad)
    attention = together.model.layers[0].self_attn
    assert (attention.q_proj.siblings.ready is not None) == isinstance(config, TinyLoraConfig)


def test_opcheck_and_gradcheck():
    (x, weight, down, core, up, bias), ids, basis = Problem(6, 24, 16, 2, torch.float64, core="mixed").operands()
    x.requires_grad_(), core.requires_grad_()
    weights, biases = list(weight.split([8, 16])), list(bias.split([8, 16]))
    arguments = (x, weights, down, core, up, biases, None, basis)
    torch.library.opcheck(torch.ops.tinylora.adapted_linears, arguments)
    torch.autograd.gradcheck(lambda x, v: adapted_linears(x, weights, down, v, up, biases, None, basis), (x, core))


def test_found_in_real_models():
    from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

    bert = tinylora.apply(AutoModel.from_pretrained(minilm_folder()), TinyLoraConfig())
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    llama = tinylora.apply(LlamaForCausalLM(LlamaConfig(**small)), TinyLoraConfig())
    assert len(groups(bert)) == 6  # query, key, value of six layers
    assert len(groups(llama)) == len(groups(adapted(layers=1))) == 2


def test_targets_that_leave_a_sibling_out_and_adapters_without_groups(calls):
    model = adapted(config=TinyLoraConfig(target_modules=["q_proj", "v_proj", "up_proj"]), layers=1)
    model(tokens())
    assert calls == {"group": 1, "alone": 1}
    for config in (LoraConfig(r=2), VeraConfig(r=4)):
        assert not groups(tinylora.apply(qwen2(layers=1), config))
    calls.update(group=0, alone=0)
    adapted(config=TinyLoraConfig(r=60), layers=1, num_key_value_heads=4)(
        tokens()
    )  # q, k, v pass the kernels' largest rank
    assert calls == {"group": 1, "alone": 5}
    assert not groups(adapted(siblings=False))


def test_siblings_false_holds_for_adapters_from_files(tmp_path):
    alone = adapted(siblings=False)
    tinylora.save(alone, tmp_path)
    assert not groups(tinylora.load(alone, tmp_path, "second"))
    assert groups(tinylora.load(qwen2(), tmp_path))
    for name in ("default", "second"):
        tinylora.remove(alone, name)
    assert not groups(tinylora.load(alone, tmp_path))
    assert groups(tinylora.apply(alone, TinyLoraConfig(seed=5), "third"))


def test_an_output_without_a_graph_may_be_changed_in_place():
    """v is frozen, and what somebody's hook adds trains: each output is one of its own, as any layer's."""
    model, bias = adapted(layers=1).requires_grad_(False), nn.Parameter(torch.ones(1))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, y: y.add_(bias))
    model(tokens()).logits.sum().backward()
    assert bias.grad is not None and bias.grad.abs() > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_gives_what_it_gives_without_groups(config, dtype, calls):
    ours, alone = (adapted(s, config, dtype=dtype) for s in (True, False))
    ids = tokens()
    got = loss_and_grads(ours, input_ids=ids, labels=ids)
    assert calls["group"] == 4 and calls["alone"] == 4  # o_proj and down_proj have no siblings
    expected = loss_and_grads(alone, input_ids=ids, labels=ids)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_p_side_by_side_and_with_zeros_between(monkeypatch):
    inputs, found = {"input_ids": tokens(), "labels": tokens()}, {}
    for devices, shape in ((("cuda", "cpu"), (3, 2, 2, 2)), (("cuda",), (6, 6, 6))):
        monkeypatch.setattr("tinylora.nn.siblings.SIDE_BY_SIDE", devices)
        model = adapted(config=CONFIGS["a v each"])
        q = model.model.layers[0].self_attn.q_proj
        wide, P = q.siblings.wide["default"], q.adapters["default"].factors().basis
        assert wide.basis.shape == shape and P.untyped_storage().data_ptr() == wide.basis.untyped_storage().data_ptr()
        found[devices] = loss_and_grads(model, **inputs)
    torch.testing.assert_close(*found.values(), rtol=1e-4, atol=1e-6)


def test_zero_numbers_give_the_base_bit_for_bit():
    model = qwen2()
    expected = model(tokens()).logits
    tinylora.apply(model, TinyLoraConfig(u=3, n_tie=5))
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    model, alone = adapted(), adapted(siblings=False)
    ids = tokens()
    expected = loss_and_grads(alone, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    calls.update(group=0, alone=0)
    got = loss_and_grads(model, input_ids=ids, labels=ids)
    assert calls["group"] == 8
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_on_a_bf16_base(calls):
    model, alone = (adapted(s, dtype=torch.bfloat16) for s in (True, False))
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (m(tokens()).logits for m in (model, alone))
    assert calls["group"] == 4
    torch.testing.assert_close(got, expected, rtol=0, atol=2**-8)  # the adapter's part is 0.06


def test_generate_with_a_different_adapter_per_prompt():
    outputs = []
    for siblings in (True, False):
        model = adapted(siblings)
        tinylora.stack(model, [{"v_0": torch.randn(3, generator=torch.Generator().manual_seed(i))} for i in range(3)])
        with tinylora.adapter_ids(model, [2, -1, 0, 1]):
            outputs.append(model.generate(tokens(4), max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert torch.equal(*outputs)


def test_compiled_and_exported_with_one_operator_per_group():
    model = adapted(layers=1)
    expected = model(tokens()).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(tokens()).logits, expected)
        train(model, seed=4)  # in place: the graph reads the new numbers
        torch.testing.assert_close(compiled(tokens()).logits, model(tokens()).logits)
    names = [str(n.target) for n in graphs[0].graph.nodes if "tinylora" in str(n.target)]
    assert [
        sum(f"{n}.default" in t or t.endswith(n) for t in names) for n in ("adapted_linears", "adapted_linear")
    ] == [2, 2]
    torch._dynamo.reset()
    model.config.use_cache = False
    step = torch.compile(lambda ids: loss_and_grads(model, input_ids=ids, labels=ids)[0], backend="aot_eager")
    torch.testing.assert_close(step(tokens()), loss_and_grads(model, input_ids=tokens(), labels=tokens())[0])


@pytest.mark.parametrize("config", [CONFIGS["one v"], CONFIGS["LoRA-XS"]], ids=["one v", "LoRA-XS"])
def test_equal_blocks_are_compiled_once_and_checkpoints_lie_in_one_graph(config):
    """What torchtitan and accelerate compile is a block, not a model, and dynamo stops at eight versions of one."""
    model = adapted(layers=3, config=config)
    model.config.use_cache = False
    want = loss_and_grads(model, input_ids=tokens(), labels=tokens())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(loss_and_grads(model, input_ids=tokens(), labels=tokens()), want)
    assert counter.frame_count == 1

    model = adapted(layers=2, config=config)
    model.config.use_cache = False
    want = loss_and_grads(model, input_ids=tokens(), labels=tokens())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch._dynamo.reset()
    model.model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(loss_and_grads(model, input_ids=tokens(), labels=tokens()), want)
