"""`batch_invariant=True`: a row of Y and of dX has the same bits alone, in any place, and in any company."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from models import qwen2, tokens
from problems import NAMES, Problem, assert_as_good_as_torch, exact, grads, torch_own

import tinylora
from tinylora.kernels import tiles
from tinylora.ops import adapted_linear, dispatch
from tinylora.ops.linear import _op, _op_backward

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_rows_are_independent(problem, alone, parts, invariant=True, turned=True):
    """Y and dX of all rows at once, against every row in `alone` by itself and all of them in parts of several sizes.

    turned: in reverse order and every other row, too. At last as a view with a row stride of its own.
    """
    (x, weight, down, core, up, bias), ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to(problem.dtype)

    def run(rows, place=lambda t: t):
        leaf = place(x[rows]).detach().requires_grad_()
        own = None if ids is None else ids[rows]
        y = adapted_linear(leaf, weight, down, core, up, bias, own, basis=basis, batch_invariant=invariant)
        return y.detach(), torch.autograd.grad(y, leaf, place(dy[rows]))[0]

    def wide(t):
        return torch.cat([t, torch.full_like(t[:, :3], float("nan"))], 1)[:, : t.shape[1]]

    everything = torch.arange(problem.M)
    whole = run(everything)
    groups = [everything[m : m + 1] for m in alone]
    groups += [g for size in parts for g in everything.split(size)]
    groups += [everything.flip(0), everything[1::2]] if turned else []
    for rows in groups:
        for name, got, want in zip(("Y", "dX"), run(rows), whole, strict=True):
            assert torch.equal(got, want[rows]), f"{name}: {len(rows)} rows from {rows[0]} on differ"
    for name, got, want in zip(("Y", "dX"), run(everything, wide), whole, strict=True):
        assert torch.equal(got, want), f"{name}: rows with a stride of their own differ"


# On a CPU: sizes that 16 divides and does not, ranks below and above 16.
CPU = [
    Problem(100, 96, 256, 2),
    Problem(200, 77, 100, 3, core="mixed"),
    Problem(100, 96, 256, 20, bf16, core="diagonal", factors=f32),
    Problem(100, 9, 64, 8),  # rows of W start well, and those of U do not
    Problem(70, 33, 64, 8, f64),
    Problem(100, 5, 7, 2),  # MKL rounds by place where rows start anywhere
    Problem(70, 3, 915, 2, f64),
    Problem(100, 1000, 33, 2, f64, core="mixed-rows"),
    Problem(150, 896, 896, 2, bf16, core="mixed"),
    Problem(100, 128, 896, 2, bf16, core="mixed-rows"),
    Problem(100, 896, 384, 20, bf16, core="rows", factors=f32),
    Problem(100, 77, 105, 8, bf16, core="none"),
    Problem(65, 96, 256, 8, f16),
    Problem(65, 130, 64, 64, f32, core="rows", bias=False),
    Problem(65, 1, 1, 1),
]


@pytest.mark.parametrize(
    "problem, count",
    [pytest.param(p, 1, id=p.id) for p in CPU]
    + [pytest.param(p, 2, id=f"{p.id}-2-threads") for p in CPU if p.dtype in (f32, bf16)][::3],
)
def test_on_a_cpu(problem, count):
    with threads(count):
        assert_rows_are_independent(problem, (0, 1, 7, problem.M // 2, problem.M - 1), (3, 32, 50))


def test_without_the_flag_a_cpu_s_rows_depend_on_each_other():
    """What the flag is for; if a library ever stops, this test says so."""
    with pytest.raises(AssertionError, match="differ"):
        assert_rows_are_independent(Problem(300, 896, 896, 2, f32), range(9), (3, 32, 50), invariant=False)


@pytest.mark.parametrize("problem", [p.with_(M=70) for p in CPU if p.dtype != f64], ids=lambda p: p.id)
def test_numbers_on_a_cpu(problem, poison_empty):
    operands, ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N).to(problem.dtype)

    def operator(*args, **kwargs):
        return adapted_linear(*args, **kwargs, batch_invariant=True)

    ours = grads(operator, operands, ids, basis, dy)
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])
        assert value.dtype == (operands[0] if name == "y" else operands[NAMES.index(name)]).dtype, name


@pytest.mark.parametrize("problem", [Problem(0, 20, 32, 2), Problem(0, 20, 32, 2, bf16, core="rows")])
def test_no_rows(problem):
    operands, ids, _ = problem.operands()
    x = operands[0].requires_grad_()
    y = adapted_linear(*operands, ids, batch_invariant=True)
    assert y.shape == (0, 20) and torch.autograd.grad(y.sum(), x)[0].shape == (0, 32)


def test_one_core_and_a_core_per_row_give_the_same_bits():
    """A policy that trains one adapter agrees with a rollout that held it in a stack of many."""
    for dtype in (f32, bf16):
        (x, weight, down, v, up, bias), ids, basis = Problem(70, 96, 256, 3, dtype, core="mixed-rows").operands()
        together = adapted_linear(x, weight, down, v, up, bias, ids, basis=basis, batch_invariant=True)
        for a in range(len(v)):
            alone = adapted_linear(x, weight, down, v[a], up, bias, basis=basis, batch_invariant=True)
            assert torch.equal(together[ids == a], alone[ids == a]) and (ids == a).any()


def ordered_dot(self, a, b, acc, *options):
    """acc + a b, one k after the other: numpy's own matmul rounds a row by its place in the tile."""
    from interpreter_bf16 import TensorHandle, _wide

    a, b = (_wide(t).data.astype("float32") for t in (a, b))
    total = acc.data.copy()
    for k in range(a.shape[1]):
        total += a[:, k : k + 1] * b[k : k + 1]
    return TensorHandle(total, acc.dtype.scalar)


@pytest.fixture
def interpreted(monkeypatch):
    lanes = pytest.importorskip("lanes", reason="needs Triton")
    from triton.runtime.interpreter import InterpreterBuilder

    from tinylora.ops import eager, invariant

    def unreachable(*args, **kwargs):
        raise AssertionError("the torch path ran where the kernels should")

    for module in (eager, invariant):
        monkeypatch.setattr(module, "forward", unreachable)
        monkeypatch.setattr(module, "backward", unreachable)
    with lanes.interpreter():
        monkeypatch.setattr(InterpreterBuilder, "create_dot", ordered_dot)
        yield
        monkeypatch.undo()


KERNELS = [
    Problem(130, 72, 104, 2, bf16, core="mixed-rows"),  # bulk copies; more rows than `choose` gives to decode
    Problem(40, 40, 72, 13, f16, core="none"),
    Problem(40, 77, 105, 3, f32, core="rows"),  # pointers
]


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("problem", KERNELS, ids=lambda p: p.id)
def test_in_the_kernels(problem, interpreted):
    assert_rows_are_independent(problem, (0, 37, problem.M - 1), (35,), turned=False)


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_in_the_kernels_three_dimensions_that_do_not_fold(interpreted):
    """A transposed batch, tokens cut off, one sequence seen as many: the rows are copied, and the copy is read."""
    (x, weight, down, core, up, bias), _, _ = Problem(6, 20, 32, 2, f32, core="dense").operands()
    x, dy = x.view(2, 3, 32), torch.randn(3, 2, 20).transpose(0, 1)
    for seen in (x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat(1, 2, 1)[:, 1:4], x[:1].expand(2, 3, 32)):
        found = []
        for invariant in (True, False):
            leaf = seen.detach().requires_grad_()
            y = adapted_linear(leaf, weight, down, core, up, bias, batch_invariant=invariant)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_on_a_cpu_wherever_rows_and_factors_lie():
    """BLAS rounds by addresses: x that begins in the middle of its storage, U whose columns lie 31 numbers apart."""
    x = torch.randn(1 + 64 * 48, dtype=f64)[1:].view(64, 48).requires_grad_()
    layer = tinylora.Linear.from_linear(torch.nn.Linear(48, 31, dtype=f64), tinylora.LoraXSConfig(r=16))
    torch.nn.init.normal_(next(iter(tinylora.adapter_parameters(layer))))
    layer.batch_invariant = True
    dy = torch.randn(64, 31, dtype=f64)
    y = layer(x)
    dx = torch.autograd.grad(y, x, dy)[0]
    for m in range(64):
        one = x[m : m + 1].detach().requires_grad_()
        own = layer(one)
        assert torch.equal(own[0], y[m]) and torch.equal(torch.autograd.grad(own, one, dy[m : m + 1])[0][0], dx[m])


def test_in_the_kernels_a_split_of_k_that_follows_m_is_seen(interpreted, monkeypatch):
    """The test above can fail: here K is cut into as many slices as there are row blocks, as `thin_tile` may do."""
    from dataclasses import replace

    from tinylora.ops import fused

    linear = fused.linear

    def by_rows(x, *operands, **options):
        monkeypatch.setattr(tiles, "pinned", lambda *sizes: cut(pinned(*sizes), 1 + x.shape[0] // 60))
        return linear(x, *operands, **options)

    def cut(choice, slices):
        return replace(choice, thin=replace(choice.thin, split=slices))

    pinned = tiles.pinned
    monkeypatch.setattr(fused, "linear", by_rows)
    with pytest.raises(AssertionError, match="differ"):
        assert_rows_are_independent(Problem(130, 40, 104, 2), (0,), (50,))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), None], ids=str)
@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("dtype", [bf16, f32], ids=str)
def test_the_pinned_choice_has_no_part_that_m_may_change(capability, descriptors, dtype):
    """No decode, whose tile grows with M, and no library matmul, whose algorithm does."""
    for N, K, r in ((3584, 3584, 2), (512, 3584, 64), (3584, 18944, 128), (77, 105, 3)):
        choice = tiles.pinned(N, K, r, dtype, capability, descriptors)
        assert isinstance(choice.main, tiles.Gemm) and choice.thin is not None and choice.expand is None
        assert not (choice.main.descriptors and dtype == f32 and capability)


def test_where_it_cannot_be_had_is_an_error(monkeypatch):
    """On a GPU the library's matmul is all there is for fp64: no silent fallback."""

    class OnGpu:
        is_cpu, device = False, "cuda:0"

    monkeypatch.setattr("tinylora.ops.linear.route_of", lambda *_: (dispatch.TORCH, "an operand is torch.float64"))
    from tinylora.ops.linear import computing

    with pytest.raises(ValueError, match=r"batch_invariant is True on cuda:0, but no kernel takes.*torch.float64"):
        computing(OnGpu(), None, None, None, None, True)


@pytest.mark.parametrize("core", ["mixed-rows"])
def test_gradcheck_opcheck_and_compile(core):
    operands, ids, basis = Problem(4, 5, 6, 2, f64, core=core).operands()
    leaves = [None if t is None else t.requires_grad_() for t in operands]

    def operator(*t):
        return adapted_linear(*t, ids, basis=basis, batch_invariant=True)

    assert torch.autograd.gradcheck(operator, leaves)
    torch.library.opcheck(_op, (*leaves, ids, basis, True))
    x, weight, down, c, up, _ = (t.detach() for t in operands)
    saved = (torch.randn(4, 5, dtype=f64), x, x @ down.T, weight, down, c, up, ids, basis)
    torch.library.opcheck(_op_backward, (*saved, [True] * 6, True))

    torch._dynamo.reset()
    operands, ids, basis = Problem(70, 96, 256, 2, bf16, core=core).operands()
    leaf = operands[0].requires_grad_()
    results = []
    for function in (operator, torch.compile(operator, fullgraph=True, backend="aot_eager")):
        y = function(*operands)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast():
    operands, _, _ = Problem(70, 96, 256, 2).operands()
    with torch.autocast("cpu", dtype=bf16):
        y = adapted_linear(*operands, batch_invariant=True)
        assert torch.equal(y[40:41], adapted_linear(operands[0][40:41], *operands[1:], batch_invariant=True))
    assert y.dtype == bf16


def test_the_layer_and_the_model():
    """Adapted, merged and switched off: the layer's rows are independent in every state."""
    torch.manual_seed(0)
    layer = tinylora.Linear.from_linear(torch.nn.Linear(256, 96, dtype=bf16), tinylora.TinyLoraConfig(u=3))
    assert layer.batch_invariant is False
    layer.batch_invariant = True
    x = torch.randn(70, 256).to(bf16)
    with torch.no_grad():
        tinylora.adapter_parameters(layer)[0].fill_(0.3)
        for change in (tinylora.adapter_parameters, tinylora.merge, tinylora.unmerge):
            change(layer)
            assert torch.equal(layer(x)[33], layer(x[33:34])[0])
            with contextlib.nullcontext() if layer.merged else tinylora.disabled(layer):
                base = layer(x)
            assert torch.equal(base[33], layer(x[33:34])[0]) == (layer.merged is not None)
            torch.testing.assert_close(base, F.linear(x, layer.weight, layer.bias), rtol=2e-2, atol=2e-2)

    model = tinylora.apply(qwen2(), tinylora.TinyLoraConfig(), batch_invariant=True)
    layers = [m for m in model.modules() if isinstance(m, tinylora.Linear)]
    assert layers and all(m.batch_invariant for m in layers)
    assert not any("batch_invariant" in name for name in model.state_dict())
    tinylora.apply(model, tinylora.LoraConfig(r=2), "second")
    assert all(m.batch_invariant for m in layers)
    plain = tinylora.apply(qwen2(), tinylora.TinyLoraConfig())
    assert not any(m.batch_invariant for m in plain.modules() if isinstance(m, tinylora.Linear))
    torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_dropout_is_refused():
    layer = tinylora.Linear.from_linear(torch.nn.Linear(16, 16), tinylora.LoraConfig(r=2, dropout=0.1))
    layer.batch_invariant = True
    with pytest.raises(ValueError, match=r"dropout is 0.1"):
        layer.train()(torch.randn(2, 16))
    layer.eval()(torch.randn(2, 16))
