"""Sibling groups give what the layers give by themselves, whoever calls them and however the model was moved."""

import copy
import io
import pickle

import pytest
import torch
from models import minilm_folder, qwen2, tokens
from problems import BoundByTorch, Problem, assert_as_good_as_torch, exact, grads, torch_own
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import tinylora
from tinylora import LoraConfig, LoraXSConfig, TinyLoraConfig, VeraConfig
from tinylora.nn.kept import Kept
from tinylora.nn.siblings import Siblings
from tinylora.ops import linear
from tinylora.ops.siblings import adapted_linears, joined

CONFIGS = {
    "one v": TinyLoraConfig(r=2, u=3, n_tie=100),
    "a v each": TinyLoraConfig(r=2, u=2),
    "LoRA-XS": LoraXSConfig(r=4),
}


def train(model, seed=3):
    """Random numbers where training would have put some."""
    g = torch.Generator().manual_seed(seed)
    for p in tinylora.adapter_parameters(model):
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def adapted(siblings=True, config=CONFIGS["one v"], **changes):
    return train(tinylora.apply(qwen2(**changes), config, siblings=siblings))


@pytest.fixture(autouse=True)
def side_by_side(monkeypatch):
    """P lie here as they do on a card; as on a CPU in every other file."""
    monkeypatch.setattr("tinylora.nn.siblings.SIDE_BY_SIDE", ("cuda", "cpu"))


def groups(model) -> set[int]:
    return {id(m.siblings) for m in model.modules() if isinstance(m, tinylora.Linear) and m.siblings is not None}


@pytest.fixture
def calls(monkeypatch):
    """How often a group computed, and how often a layer did so alone."""
    counted = {"group": 0, "alone": 0}

    def counting(what, function):
        def call(*args, **kwargs):
            counted[what] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("tinylora.nn.siblings.adapted_linears", counting("group", adapted_linears))
    monkeypatch.setattr("tinylora.nn.linear.unchecked", counting("alone", linear.unchecked))
    return counted


def loss_and_grads(model, **inputs):
    model.zero_grad()
    x = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    loss = model(inputs_embeds=x, **inputs).loss
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in tinylora.adapter_parameters(model))]


# --- the operator ---------------------------------------------------------------------------------------------


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


# --- which layers --------------------------------------------------------------------------------------------


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
    assert groups(tinylora.apply(alone, TinyLoraConfig(seed=5), "third"))


def test_an_output_without_a_graph_may_be_changed_in_place():
    """v is frozen, and what somebody's hook adds trains: each output is one of its own, as any layer's."""
    model, bias = adapted(layers=1).requires_grad_(False), nn.Parameter(torch.ones(1))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, y: y.add_(bias))
    model(tokens()).logits.sum().backward()
    assert bias.grad is not None and bias.grad.abs() > 0


# --- the same results ----------------------------------------------------------------------------------------


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
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


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


# --- whoever calls, however it was moved ----------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)
        self.plan = "ab"

    def forward(self, x):
        return self.a(x) + self.b(x)


def change(x):
    x.add_(1)


def test_a_sibling_alone_twice_and_with_another_tensor(calls):
    class Odd(Pair):
        def forward(self, x):
            if self.plan == "ab":
                return self.a(x) + self.b(x)
            first = self.a(x)
            if self.plan == "alone":
                return first
            if self.plan == "twice":
                return first + self.a(x) + self.b(x)
            if self.plan == "another":
                return first + self.b(x + 1)
            change(x)  # the same tensor, other numbers
            return first + self.b(x)

    for plan in ("ab", "alone", "twice", "another", "in place"):
        results = []
        for siblings in (True, False):
            model = train(tinylora.apply(Odd(), TinyLoraConfig(target_modules=["a", "b"]), siblings=siblings))
            assert len(groups(model)) == siblings
            parameters = tinylora.adapter_parameters(model)
            model.plan = plan
            x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
            y = model(x.clone())
            y.sum().backward()
            # Of one that was not called: nothing, or in a group zeros
            results.append([y, *(p.grad.sum() if p.grad is not None else torch.tensor(0.0) for p in parameters)])
            for m in (model.a, model.b):  # outside the parent
                results[-1].append(m(x))
            if siblings:
                assert next(iter(m.siblings for m in (model.a, model.b))).shares is None
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_an_error_inside_the_parent_leaves_nothing_behind():
    class Fails(Pair):
        def forward(self, x):
            a = self.a(x)
            if self.plan == "fail":
                raise RuntimeError("in between")
            return a + self.b(x)

    model = train(tinylora.apply(Fails(), TinyLoraConfig(target_modules=["a", "b"])))
    model.plan = "fail"
    with pytest.raises(RuntimeError, match="in between"):
        model(torch.zeros(3, 16))
    assert model.a.siblings.shares is None and not model.a.siblings.running


def both_ways(make, run):
    """What `run` gives of a model whose siblings compute together, and of one whose do not."""
    return [
        run(train(tinylora.apply(make(), TinyLoraConfig(target_modules=["a", "b"]), siblings=s))) for s in (True, False)
    ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("around", ["reentrant", "no_reentrant", "no_grad"])
def test_one_sibling_in_another_graph(around, compiled):
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if around == "no_grad":
                with torch.no_grad():
                    return self.layer(x)
            return checkpoint(self.layer, x, use_reentrant=around == "reentrant")

    def run(model):
        model.a = Wrapper(model.a)
        torch._dynamo.reset()
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (torch.compile(model, backend="aot_eager") if compiled else model)(x).square().sum().backward()
        trains = tinylora.adapter_parameters(model)
        return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in trains)]

    together, alone = both_ways(Pair, run)
    torch.testing.assert_close(together, alone)
    assert together[-1].norm() > 0


def test_what_a_layers_own_hook_does_to_its_weight_is_seen_in_the_same_call(calls):
    """Pruning and weight_norm compute it there, ZeRO-3 gathers it."""

    def double(layer, inputs):
        layer.weight.data.mul_(2)

    def run(model):
        model(torch.zeros(1, 16))
        model.b.register_forward_pre_hook(double)
        return model(torch.ones(3, 16))

    torch.testing.assert_close(*both_ways(Pair, run))
    assert calls["group"] == 1


def test_an_x_that_the_parent_changes_in_place_is_another():
    """Where no version tells: in inference mode, and in compiled graphs. The parent's source does."""

    class Item(Pair):
        def forward(self, x):
            first = self.a(x)
            x[:, 0] = 0
            return first + self.b(x)

    class Out(Pair):
        def forward(self, x):
            first = self.a(x)
            torch.neg(x, out=x)
            return first + self.b(x)

    class Part(Pair):
        def forward(self, x):
            first = self.a(x)
            x.data[0] = 1
            return first + self.b(x)

    class View(Pair):
        def forward(self, x):
            flat = x.view(-1)
            first = self.a(x)
            flat.mul_(2)
            return first + self.b(x)

    class ViewOf(Pair):
        def forward(self, x):
            y = x[:]
            first = self.a(y)
            x += 1
            return first + self.b(y)

    for kind in (Item, Out, Part, View, ViewOf):
        with torch.inference_mode():
            torch.testing.assert_close(*both_ways(kind, lambda model: model(torch.ones(3, 16))))


def test_a_compiled_sibling_s_output_may_be_changed_in_place():
    class InPlace(Pair):
        def forward(self, x):
            return self.a(x).mul_(2) * self.b(x).add_(1)

    def run(model):
        torch._dynamo.reset()
        x = torch.ones(3, 16, requires_grad=True)
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        return x.grad

    torch.testing.assert_close(*both_ways(InPlace, run))


def test_a_thawed_factor_and_a_wider_bias_compute_alone(calls):
    model = train(tinylora.apply(Pair(), TinyLoraConfig(target_modules=["a", "b"])))
    model.a.adapters.default.down.requires_grad_()
    model(torch.ones(3, 16)).sum().backward()
    assert calls["group"] == 0 and model.a.adapters.default.down.grad.norm() > 0
    model = train(tinylora.apply(Pair().bfloat16(), TinyLoraConfig(target_modules=["a", "b"])))
    for layer in (model.a, model.b):
        layer.bias.data = layer.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(3, 16)).dtype == torch.bfloat16


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
    monkeypatch.setattr("tinylora.nn.siblings.on_torch", lambda *operands: False)
    pytest.importorskip("triton")
    bound: list[str] = []
    monkeypatch.setattr("tinylora.ops.fused.Bound", lambda *operands: BoundByTorch(bound, *operands))
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
