"""`tinylora.Linear` by itself: a drop-in for torch.nn.Linear."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from problems import BoundByTorch, assert_as_good_as_torch
from torch import nn

import tinylora
from tinylora import Linear, LoraXSConfig, TinyLoraConfig
from tinylora.nn.kept import Kept
from tinylora.nn.model import attach

CONFIGS = [TinyLoraConfig(r=2, u=3), TinyLoraConfig(r=3, u=2, sigma="split"), LoraXSConfig(r=4, sigma="right")]


def layer_with_a_trained_adapter(config=CONFIGS[0], K=32, N=24, dtype=torch.float32, bias=True):
    base = nn.Linear(K, N, bias=bias).to(dtype)
    layer = Linear.from_linear(base, config)
    for p in tinylora.adapter_parameters(layer):
        nn.init.normal_(p)
    return base, layer


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula_from_the_paper(config, dtype):
    """W' = W + U Σ R Vᵀ with R = Σᵢ vᵢ Pᵢ, U Σ Vᵀ from LAPACK: the layer against a dense matrix in fp64."""
    base, layer = layer_with_a_trained_adapter(config, dtype=dtype)
    W = base.weight.double()
    U, S, Vh = (t[..., : config.r] if i < 2 else t[: config.r] for i, t in enumerate(torch.linalg.svd(W)))
    adapter = layer.adapters["default"]
    signs = (U * adapter.up.double()).sum(0).sign()  # the gauge: ours is fixed, LAPACK's is not
    U, Vh = U * signs, Vh * signs[:, None]
    left, right = {"left": (S, S**0), "right": (S**0, S), "split": (S**0.5, S**0.5)}[config.sigma]
    if isinstance(config, TinyLoraConfig):
        R = torch.einsum("u,uij->ij", adapter.v.double(), adapter.P.double())
    else:
        R = adapter.core.double()
    x = torch.randn(5, 32).to(dtype)
    exact = x.double() @ (W + (U * left) @ R @ (right[:, None] * Vh)).T + base.bias.double()
    plain = F.linear(x, base.weight, base.bias) + (x @ adapter.down.T @ R.T.to(dtype)) @ adapter.up.T
    assert_as_good_as_torch("y", layer(x), exact, plain)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32)], ids=str)
def test_the_output_may_be_changed_in_place(shape):
    """As any layer's: `nn.ReLU(inplace=True)` after it, a residual added to it."""
    x = torch.randn(shape, requires_grad=True)
    _, layer = layer_with_a_trained_adapter()
    v = tinylora.adapter_parameters(layer)[0]
    (want,) = torch.autograd.grad((layer(x) + 1).relu().sum(), v)
    (got,) = torch.autograd.grad(layer(x).add_(1).relu_().sum(), v)
    assert torch.equal(got, want)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_new_adapter_changes_nothing_and_shares_the_weight(config, bias):
    base = nn.Linear(32, 24, bias=bias).bfloat16()
    layer = Linear.from_linear(base, config)
    x = torch.randn(2, 3, 32).bfloat16()
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight and layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (32, 24) and isinstance(layer, nn.Linear)
    assert [p.requires_grad for p in base.parameters()] == [False] * (1 + bias)
    assert all(p.requires_grad for p in tinylora.adapter_parameters(layer))


def test_gradients_reach_the_adapter_and_x_alone():
    base, layer = layer_with_a_trained_adapter()
    x = torch.randn(5, 32, requires_grad=True)
    layer(x).square().sum().backward()
    (v,) = tinylora.adapter_parameters(layer)
    assert base.weight.grad is None and base.bias.grad is None
    dense = layer.adapters["default"].factors().delta() + base.weight
    torch.testing.assert_close(x.grad, 2 * layer(x) @ dense)
    for i in range(v.numel()):  # against a finite difference, in fp32
        values = []
        for step in (1e-2, -2e-2):
            with torch.no_grad():
                v[i] += step
                values.append(layer(x).double().square().sum())
        with torch.no_grad():
            v[i] += 1e-2
        torch.testing.assert_close(v.grad[i].double(), (values[0] - values[1]) / 2e-2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_copies_are_independent_and_whole(config):
    _, layer = layer_with_a_trained_adapter(config)
    x = torch.randn(5, 32)
    want = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), want)
        for p in tinylora.adapter_parameters(other):
            assert p.requires_grad
            nn.init.zeros_(p)
        assert torch.equal(other(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_state_dict_has_the_bases_names_and_what_trains_once(config):
    base, layer = layer_with_a_trained_adapter(config)
    trained = {"tinylora.default.v_0"} if isinstance(config, TinyLoraConfig) else {"adapters.default.core"}
    assert set(layer.state_dict()) == {"weight", "bias"} | trained
    other = Linear.from_linear(copy.deepcopy(base), config)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_what_trains_stays_fp32_under_casts(config, cast):
    _, layer = layer_with_a_trained_adapter(config)
    x = torch.randn(5, 32)
    layer(x).sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in tinylora.adapter_parameters(layer)]
    cast(layer)
    for p, (value, grad) in zip(tinylora.adapter_parameters(layer), before, strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p, value) and torch.equal(p.grad, grad)
    y = layer(x.to(layer.weight.dtype))
    assert y.dtype == layer.weight.dtype and y.isfinite().all()
    assert {t.dtype for n, t in layer.named_buffers() if n.endswith("P")} <= {torch.float32}
    layer.double()
    assert layer(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_merge_is_the_forward_and_unmerge_restores_every_bit(config, dtype):
    base, layer = layer_with_a_trained_adapter(config, dtype=dtype)
    x, before = torch.randn(5, 32).to(dtype), base.weight.detach().clone()
    want = layer(x)
    delta = layer.adapters["default"].factors().delta()
    tinylora.merge(layer)
    assert torch.equal(base.weight, (before.float() + delta).to(dtype)) and not torch.equal(base.weight, before)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), want, rtol=8 * eps, atol=8 * eps * want.abs().max().item())
    tinylora.merge(layer)  # a second time adds nothing
    assert torch.equal(base.weight, (before.float() + delta).to(dtype))
    tinylora.unmerge(layer)
    assert torch.equal(base.weight, before) and torch.equal(layer(x), want)
    for _ in range(50):  # TRL merges and unmerges at every step
        tinylora.unmerge(tinylora.merge(layer))
    assert torch.equal(base.weight, before)


def test_merging_into_fp64_keeps_its_digits():
    base = nn.Linear(32, 24, dtype=torch.float64)
    layer = Linear.from_linear(base, tinylora.LoraConfig(r=2))  # its factors are fp32
    before = base.weight.detach().clone()
    tinylora.merge(layer)  # up is zero: nothing is added
    assert torch.equal(base.weight, before)


def test_refusals():
    with pytest.raises(ValueError, match=r"linear is a Conv1d, expected a torch.nn.Linear"):
        Linear.from_linear(nn.Conv1d(3, 3, 1), TinyLoraConfig())
    with pytest.raises(ValueError, match="r is 9, expected 1 to 8"):
        Linear.from_linear(nn.Linear(8, 16), TinyLoraConfig(r=9))
    hooked = nn.Linear(8, 8)
    hooked.forward = lambda x: x
    with pytest.raises(ValueError, match="forward replaced"):
        Linear.from_linear(hooked, TinyLoraConfig())


def test_hooks_on_the_linear_come_along():
    base = nn.Linear(8, 8)
    seen = []
    base.register_forward_hook(lambda *_: seen.append(1))
    Linear.from_linear(base, TinyLoraConfig())(torch.randn(2, 8))
    assert seen == [1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    _, layer = layer_with_a_trained_adapter()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(5, 32)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        tinylora.adapter_parameters(layer)[0].mul_(2)  # an optimiser's step: no stale core
    torch.testing.assert_close(compiled(x), layer(x))


def with_p_doubled(adapter):
    adapter = copy.deepcopy(adapter)
    adapter.P.mul_(2)
    return adapter


CHANGES = {
    "nothing": lambda m: None,
    "v in place": lambda m: m.adapters["default"].v.data.add_(0.5),
    "v elsewhere": lambda m: setattr(m.adapters["default"].v, "data", m.adapters["default"].v.data * 2),
    "weight in place": lambda m: m.weight.data.mul_(1.1),
    "weight elsewhere": lambda m: setattr(m.weight, "data", m.weight.data * 1.1),
    "weight another": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 1.1, requires_grad=False)),
    "bias elsewhere": lambda m: setattr(m.bias, "data", m.bias.data + 0.5),
    "bias gone": lambda m: m._parameters.update(bias=None),
    "down in place": lambda m: m.adapters["default"].down.mul_(2),
    "down another": lambda m: m.adapters["default"]._buffers.update(down=m.adapters["default"].down * 2),
    "up elsewhere": lambda m: setattr(m.adapters["default"].up, "data", m.adapters["default"].up.data * 2),
    "P another": lambda m: m.adapters["default"]._buffers.update(P=m.adapters["default"].P * 2),
    "adapter anew": lambda m: m.adapters.update({"default": with_p_doubled(m.adapters["default"])}),
    "merged": lambda m: m.merge(),
    "inactive": lambda m: setattr(m, "active", None),
    "batch_invariant": lambda m: setattr(m, "batch_invariant", True),
    "another adapter": lambda m: attach(m, {"": m}, TinyLoraConfig(r=3, u=2, seed=1), "other"),
    "in fp64": lambda m: m.double(),
    "rows": lambda m: tinylora.stack(m, [{"v_0": torch.ones(3)}, {"v_0": -torch.ones(3)}]),
}


@pytest.mark.parametrize("graded", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_keeps_between_calls_is_used_only_while_it_stands(change, graded, monkeypatch):
    """By bound launches: whatever somebody changes, or puts elsewhere, the next call sees it."""
    from tinylora.ops import adapted_linear

    pytest.importorskip("triton")
    calls: list[str] = []
    monkeypatch.setattr("tinylora.ops.bound.Bound", lambda *operands: BoundByTorch(calls, *operands))
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    monkeypatch.setattr("tinylora.nn.linear.on_torch", lambda *operands: False)
    torch.manual_seed(0)
    _, layer = layer_with_a_trained_adapter()
    x = torch.randn(2, 5, 32, requires_grad=graded)

    def long_way(x):
        if layer.active is None or layer.merged:
            return F.linear(x, layer.weight, layer.bias)
        f = layer.adapters[layer.active].factors()
        return adapted_linear(x, layer.weight, f.down, f.core, f.up, layer.bias, basis=f.basis)

    def held():
        """The layer against the long way, gradients and all."""
        found = []
        for function in (layer, long_way):
            y = function(x)
            trains = [t for t in (x, *layer.adapters["default"].parameters(), *shared.parameters()) if t.requires_grad]
            found.append((y, *(torch.autograd.grad(y.square().sum(), trains, allow_unused=True) if graded else ())))
        torch.testing.assert_close(*found)

    shared = layer.adapters["default"].shared
    with torch.set_grad_enabled(graded):
        for count in (0, 0, 1, 2):
            held()
            assert calls == ["forward", "backward"][: 1 + graded] * count
        CHANGES[change](layer)
        x = x.detach().to(layer.weight.dtype).requires_grad_(graded)
        calls.clear()
        for _ in range(4):
            held()
        if change == "rows":
            with tinylora.adapter_ids(layer, [1, -1]):
                rows = layer(x)
            f = layer.adapters["default"].factors()
            ids = torch.tensor([1] * 5 + [-1] * 5)
            stacked = torch.stack([torch.ones(3), -torch.ones(3)])
            torch.testing.assert_close(
                rows, adapted_linear(x, layer.weight, f.down, stacked, f.up, layer.bias, ids, basis=f.basis)
            )
        assert bool(calls) == (change not in ("merged", "inactive", "batch_invariant"))


def test_a_weight_moved_between_forward_and_backward_is_not_read_where_it_lay(monkeypatch):
    pytest.importorskip("triton")
    calls: list[str] = []
    monkeypatch.setattr("tinylora.ops.bound.Bound", lambda *operands: BoundByTorch(calls, *operands))
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    monkeypatch.setattr("tinylora.nn.linear.on_torch", lambda *operands: False)
    _, layer = layer_with_a_trained_adapter()
    x = torch.randn(5, 32, requires_grad=True)
    trains = [x, layer.adapters["default"].v]
    for _ in range(3):
        torch.autograd.grad(layer(x).sum(), trains)
    y = layer(x)
    assert calls == ["forward", "backward", "forward"]
    layer.weight.data = layer.weight.data.clone()
    torch.autograd.grad(y.sum(), trains)
    assert calls == ["forward", "backward", "forward"]


def test_who_moves_the_weights_at_every_call_is_not_followed_for_ever(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    monkeypatch.setattr("tinylora.nn.linear.on_torch", lambda *operands: False)
    monkeypatch.setattr("tinylora.nn.linear.MOVES", 3)
    _, layer = layer_with_a_trained_adapter()
    for _ in range(5):
        layer.weight.data = layer.weight.data.clone()
        layer(torch.randn(5, 32))
    assert layer._kept == {"default": None}


def test_a_layer_that_no_kernel_takes_keeps_nothing(monkeypatch):
    """On a card older than 8.0 the second call failed, and without Triton that of every card."""
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    _, layer = layer_with_a_trained_adapter()
    for _ in range(3):
        layer(torch.randn(5, 32))
    assert not layer._kept


def test_what_a_layer_keeps_is_left_alone_where_somebody_looks_on(monkeypatch):
    pytest.importorskip("triton")
    calls: list[str] = []
    monkeypatch.setattr("tinylora.ops.bound.Bound", lambda *operands: BoundByTorch(calls, *operands))
    monkeypatch.setattr(Kept, "pays", staticmethod(lambda x: True))
    monkeypatch.setattr("tinylora.nn.linear.on_torch", lambda *operands: False)
    _, layer = layer_with_a_trained_adapter()
    x = torch.randn(5, 32)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(layer(x), want) and not calls
        assert torch.equal(layer(x), want) and len(calls) == 1
        other = torch.randn(5, 64)[:, ::2]  # strides that were not bound
        torch.testing.assert_close(layer(other), layer(other.contiguous()))
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], want)
        with pytest.raises(ValueError, match="x has shape"):
            layer(x[:, :-1])
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert not again._kept and torch.equal(again(x), want)
    assert layer(x).requires_grad and not calls
    layer.to(torch.float64)
    assert not layer._kept


def test_a_hook_from_before_can_be_removed_after():
    """Its handle looks for it where it was put."""
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 8)]))
    model.forward = lambda x: model[0][0](x)
    layer = model[0][0]
    seen = []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_load_state_dict_pre_hook(lambda module, *_: seen.append(type(module).__name__)),
    ]
    del layer
    tinylora.apply(model, TinyLoraConfig())
    model(torch.randn(2, 8)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert seen == ["pre", "forward", "backward", "Linear"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 8)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert len(seen) == 4
    alone, copied = nn.Linear(8, 8), []
    alone.register_forward_hook(lambda *_: copied.append(1))
    layer = tinylora.Linear.from_linear(alone, TinyLoraConfig())
    layer.register_forward_hook(lambda *_: copied.append(2))
    alone(torch.randn(2, 8))
    assert copied == [1]
