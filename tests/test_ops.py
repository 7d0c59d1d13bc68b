"""The operator as users meet it: numbers, gradients, errors, tracing, memory."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from problems import NAMES, Problem, assert_as_good_as_torch, exact, grads, torch_own
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora.ops import adapted_linear, eager, reference
from tinylora.ops.linear import _op, _op_backward

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

PROBLEMS = [
    Problem(5, 7, 9, 2, f64),
    Problem(0, 7, 9, 2),  # no rows at all
    Problem(1, 1, 1, 1),
    Problem(65, 130, 100, 13),
    Problem(64, 32, 300, 2, core="none"),
    Problem(64, 32, 300, 2, bias=False),
    Problem(37, 48, 64, 3, core="diagonal"),
    Problem(33, 96, 256, 13, bf16, core="diagonal", factors=f32),
    Problem(37, 48, 64, 3, core="rows"),
    Problem(0, 48, 64, 3, core="rows"),
    Problem(37, 48, 64, 3, core="mixed"),
    Problem(37, 48, 64, 3, core="mixed-rows"),
    Problem(600, 40, 1000, 2, bf16),  # several row blocks in `thin`
    Problem(130, 96, 256, 2, bf16, factors=f32),
    Problem(130, 96, 256, 64, bf16, core="rows", adapters=40),  # several row blocks in `apply_core`
    Problem(33, 96, 256, 8, bf16, core="none", bias=False),
    Problem(33, 96, 256, 8, f16),
    Problem(33, 96, 256, 2, bf16, core="mixed-rows"),
    Problem(33, 96, 256, 2, f32, factors=bf16),
]


@pytest.fixture(params=[False, True], ids=["eager", "custom-op"])
def operator(request, monkeypatch):
    """Both doors to the operator: past the dispatcher, and through the custom op."""
    if request.param:
        monkeypatch.setattr("tinylora.ops.linear.seen_from_outside", lambda *_: True)
    return adapted_linear


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_numbers(problem, operator, poison_empty):
    operands, ids, basis = problem.operands()
    dy = torch.randn(problem.M, problem.N).to(problem.dtype)
    ours = grads(operator, operands, ids, basis, dy)
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    assert ours.keys() == want.keys()
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])
        operand = operands[0] if name == "y" else operands[NAMES.index(name)]
        assert value.dtype == operand.dtype, name


@pytest.mark.parametrize("core", ["dense", "diagonal", "rows"])
@pytest.mark.parametrize("factors", [bf16, f32], ids=str)
def test_numbers_as_a_card_multiplies_them(core, factors, monkeypatch):
    """Where no kernel takes the rank: bf16 products summed in fp32, the wide factor in two parts."""
    mm, wide = torch.mm, []

    def of_a_card(a, b, out_dtype=None):
        if out_dtype is None:
            return mm(a, b)
        assert a.dtype == b.dtype == bf16 and out_dtype == f32
        wide.append(a.shape)
        return mm(a.float(), b.float())

    problem = Problem(130, 96, 256, 20, bf16, core=core, factors=factors)
    operands, ids, basis = problem.operands()
    dy = torch.randn(130, 96).to(bf16)
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    monkeypatch.setattr(eager, "on_tensor_cores", lambda x, dtype: x.dtype is bf16 and dtype is f32)
    monkeypatch.setattr(torch, "mm", of_a_card)
    ours = grads(adapted_linear, operands, ids, basis, dy)
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])
    assert len(wide) == 4  # z, t, dD, dU
    x, down = operands[0], operands[2].float()
    exactly = x.double() @ down.double().t()
    assert (eager.thin(x, down) - exactly).abs().max() < 2**-14 * exactly.abs().max()
    z = exactly.float()
    exactly = z.double().t() @ x.double()
    assert (eager.thin_transposed(z, x) - exactly).abs().max() < 2**-14 * exactly.abs().max()


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("M, K, r", [(1, 96, 2), (3, 96, 8), (70, 96, 4), (4096, 96, 1), (4096, 300, 8), (70, 96, 9)])
def test_thin_products_on_either_kind_of_processor(M, K, r, dtype, monkeypatch):
    """With AMX and without: whichever this one has, both are tested."""
    x, down, z = torch.randn(M, K, dtype=dtype), torch.randn(r, K), torch.randn(M, r)
    for amx, rows in ((True, 1024), (False, 32)):
        monkeypatch.setattr(eager, "AMX", amx)
        monkeypatch.setattr(eager, "ROWS", rows)
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found, summed = eager.thin(x, down), eager.thin_transposed(z, x)
            finally:
                torch.set_num_threads(before)
            torch.testing.assert_close(found.double(), x.double() @ down.double().t(), atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(summed.double(), z.double().t() @ x.double(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
@pytest.mark.parametrize("core", ["dense", "diagonal", "rows", "mixed"])
@pytest.mark.parametrize("shape", [(33,), (3, 11), (2, 3, 5)], ids=str)
def test_a_zero_core_gives_the_base_layer_bit_for_bit(dtype, core, shape):
    (x, weight, down, c, up, bias), _, basis = Problem(33, 96, 256, 2, dtype, core=core).operands()
    x = torch.randn(*shape, 256).to(dtype)
    ids = torch.zeros(shape, dtype=torch.int64) if core == "rows" else None
    for b in (bias, None):
        y = adapted_linear(x, weight, down, torch.zeros_like(c), up, b, ids, basis=basis)
        assert torch.equal(y, F.linear(x, weight, b))


def test_rows_without_an_adapter_are_the_base_layer_bit_for_bit():
    (x, weight, down, core, up, bias), ids, _ = Problem(33, 96, 256, 2, bf16, core="rows").operands()
    core[0, 0, 0] = float("nan")  # what another row's adapter holds must not reach a row without one
    y = adapted_linear(x, weight, down, core, up, bias, ids)
    assert torch.equal(y[ids == -1], F.linear(x, weight, bias)[ids == -1]) and (ids == -1).any()


def test_leading_dimensions_and_strides():
    """[..., K] of any rank, views with holes, transposed operands, an expanded gradient: one answer."""
    operands, ids, basis = Problem(24, 20, 32, 3, f64).operands()
    x, weight, down, core, up, bias = operands
    want = adapted_linear(*operands)
    holed = torch.full((24, 64), float("nan"), dtype=f64)
    holed[:, ::2] = x
    for same_x in (holed[:, ::2], x.T.contiguous().T, torch.stack([x, holed[:, 1::2]], 1)[:, 0]):
        assert not same_x.is_contiguous()
        torch.testing.assert_close(adapted_linear(same_x, *operands[1:]), want)
    transposed = (weight, down, core, up)
    y = adapted_linear(x, *(t.T.contiguous().T for t in transposed), bias)
    torch.testing.assert_close(y, want)
    assert adapted_linear(x[0], *operands[1:]).shape == (20,)
    mixed, _, P = Problem(24, 20, 32, 3, f32, core="mixed").operands()
    views = adapted_linear(*mixed, basis=P.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    torch.testing.assert_close(views, adapted_linear(*mixed, basis=P))
    for lead in ((2, 3, 4), (24, 1), (1, 24)):
        leaf = x.clone().requires_grad_()
        y = adapted_linear(leaf.view(*lead, 32), *operands[1:])
        torch.testing.assert_close(y, want.view(*lead, 20))
        y.sum().backward()  # dY is a broadcast scalar here
        torch.testing.assert_close(leaf.grad, (weight + up @ core @ down).sum(0).expand(24, 32))


@pytest.mark.parametrize("asked", [*((n,) for n in NAMES), ("down", "up"), ("x", "core"), ()], ids="+".join)
def test_only_gradients_that_were_asked_for(asked, operator, monkeypatch):
    operands, ids, basis = Problem(9, 10, 12, 2, f64).operands()
    computed = []

    def spy(*args):
        result = eager_backward(*args)
        computed.extend(n for n, g in zip(NAMES, result, strict=True) if g is not None)
        return result

    from tinylora.ops import eager

    eager_backward = eager.backward
    monkeypatch.setattr(eager, "backward", spy)
    leaves = [t.clone().requires_grad_(n in asked) for n, t in zip(NAMES, operands, strict=True)]
    y = operator(*leaves, ids)
    assert y.requires_grad == bool(asked)
    if asked:
        y.sum().backward()
    assert {n for n, t in zip(NAMES, leaves, strict=True) if t.grad is not None} == set(asked) == set(computed)


@pytest.mark.parametrize(
    "asked, per_row",
    [(("core",), "r"), (("x", "core"), "r"), (("x",), ""), (("down",), "K"), (("weight",), "K"), (("up",), "r")],
    ids=str,
)
def test_saved_memory(asked, per_row, operator):
    """When only the core trains the backward keeps [M, r] numbers of the input, not [M, K]."""
    M, N, K, r = 512, 64, 256, 2
    operands, *_ = Problem(M, N, K, r, bf16).operands()
    leaves = [t.clone().requires_grad_(n in asked) for n, t in zip(NAMES, operands, strict=True)]
    own = {t.data_ptr() for t in leaves[1:]}
    saved = {}

    def pack(t):
        if t.data_ptr() not in own:
            saved[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        operator(*leaves)
    assert sum(saved.values()) == {"r": M * r * 4, "K": M * K * 2, "": 0}[per_row]


@pytest.mark.parametrize("core", ["dense", "diagonal", "none", "rows", "mixed", "mixed-rows"])
def test_gradcheck_and_opcheck(core, operator):
    operands, ids, basis = Problem(4, 5, 6, 2, f64, core=core).operands()
    leaves = [None if t is None else t.requires_grad_() for t in operands]
    assert torch.autograd.gradcheck(lambda *t: operator(*t, ids, basis=basis), leaves)
    torch.library.opcheck(_op, (*leaves, ids, basis))
    x, weight, down, c, up, _ = (None if t is None else t.detach() for t in operands)
    need = [True, True, True, c is not None, True, True]
    saved = (torch.randn(4, 5, dtype=f64), x, x @ down.T, weight, down, c, up, ids, basis)
    torch.library.opcheck(_op_backward, (*saved, need))


class Module(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        (_, *operands), self.ids, self.basis = problem.operands()
        names = ("weight", "down", "core", "up", "bias")
        for name, operand in zip(names, operands, strict=True):  # torch 2.11 does not trace a ParameterList unpacked
            self.register_parameter(name, None if operand is None else torch.nn.Parameter(operand))

    def forward(self, x):
        ids = None if self.ids is None else (x[..., 0] * 9).long() % 4 - 1
        y = adapted_linear(F.silu(x), self.weight, self.down, self.core, self.up, self.bias, ids, basis=self.basis)
        return F.gelu(y)


@pytest.mark.parametrize("core", ["dense", "diagonal", "mixed-rows"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_with_dynamic_shapes(core, backend):
    torch._dynamo.reset()
    module = Module(Problem(16, 20, 32, 2, f32, core=core))
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((4, 7, 32), (3, 11, 32), (6, 13, 32)):  # no size of an operand: dynamo would take them for one
            results = []
            for f in (module, compiled):
                module.zero_grad()
                x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
                y = f(x)
                y.square().sum().backward()
                results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("core", ["dense", "diagonal", "mixed", "rows"])
def test_gradients_of_the_core_alone_in_a_graph(core):
    """The first layer of a model, whose x asks for no gradient: a graph knows beforehand how a gradient lies."""
    (x, weight, down, core, up, bias), ids, basis = Problem(16, 20, 32, 3, core=core).operands()
    core.requires_grad_()

    def function(core):
        return adapted_linear(x, weight, down, 2 * core, up, bias, ids, basis=basis).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(core), core)[0] for f in (compiled, function)))


def test_export():
    module = Module(Problem(16, 20, 32, 2))
    x = torch.randn(2, 7, 32)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}})
    assert "tinylora.adapted_linear" in str(program.graph)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_autocast_casts_what_linear_would_cast_and_leaves_the_core(dtype):
    operands, ids, basis = Problem(16, 20, 32, 2).operands()
    leaves = [t.clone().requires_grad_() for t in operands]
    with torch.autocast("cpu", dtype=dtype):
        y = adapted_linear(*leaves)
        assert y.dtype == F.linear(*(leaves[i] for i in (0, 1, 5))).dtype == dtype
        y.float().square().sum().backward()  # the backward, too, under autocast
    assert all(t.grad.dtype == f32 for t in leaves)
    cast = [t.to(dtype) if n in ("x", "weight", "bias") else t for n, t in zip(NAMES, operands, strict=True)]
    torch.testing.assert_close(y, adapted_linear(*cast), rtol=0, atol=0)
    # dy comes in autocast's dtype, the sums behind the core's gradient do not: only their order may be another
    again = [t.clone().requires_grad_() for t in cast]
    adapted_linear(*again).float().square().sum().backward()
    torch.testing.assert_close(leaves[3].grad, again[3].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if "rows" not in p.core], ids=lambda p: p.id)
def test_operands_that_fit_skip_the_long_check(problem, monkeypatch):
    monkeypatch.setattr("tinylora.ops.checks.explain", lambda *_: pytest.fail("the long check ran"))
    operands, ids, basis = problem.operands()
    adapted_linear(*operands, ids, basis=basis)


def broken(**changes):
    operands, ids, basis = Problem(6, 8, 16, 2).operands()
    arguments = dict(zip(NAMES, operands, strict=True)) | {"adapter_ids": ids, "basis": basis}
    return arguments | changes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": torch.randn(6, 15)}, r"x has shape (6, 15), expected (..., 16): weight is (8, 16) (N, K)"),
        ({"x": torch.tensor(1.0)}, r"x has shape (), expected (..., 16)"),
        ({"weight": torch.randn(8)}, r"weight has shape (8,), expected two dimensions (N, K)"),
        ({"down": torch.randn(2, 15)}, r"down has shape (2, 15), expected (r, 16)"),
        ({"down": None}, r"down is a NoneType, expected a tensor"),
        ({"bias": [0.0]}, r"bias is a list, expected a tensor"),
        ({"down": torch.randn(0, 16)}, r"down has shape (0, 16), expected (r, 16)"),
        (
            {"up": torch.randn(9, 2)},
            "up has shape (9, 2), expected (8, 2): weight is (8, 16) (N, K) and down is (2, 16) (r, K)",
        ),
        ({"core": torch.randn(2, 3)}, "core has shape (2, 3), expected (2, 2)"),
        ({"core": torch.randn(3)}, "core has shape (3,), expected (2, 2)"),
        ({"core": torch.randn(4, 2, 2)}, "needs adapter_ids"),
        ({"bias": torch.randn(7)}, "bias has shape (7,), expected (8,)"),
        ({"x": torch.randn(6, 16).bfloat16()}, "x has dtype torch.bfloat16, expected weight's torch.float32"),
        ({"bias": torch.randn(8).half()}, "bias has dtype torch.float16, expected weight's torch.float32"),
        ({"weight": torch.ones(8, 16, dtype=torch.int8)}, "weight has dtype torch.int8, expected one of"),
        ({"core": torch.ones(2, 2, dtype=torch.int64)}, "core has dtype torch.int64"),
        ({"up": torch.randn(8, 2, device="meta")}, "up is on meta, expected weight's device cpu"),
        ({"adapter_ids": torch.zeros(6, dtype=torch.int64)}, "core has shape (2, 2), expected ('A', 2, 2)"),
        ({"core": None, "adapter_ids": torch.zeros(6, dtype=torch.int64)}, "adapter_ids came without a core"),
        ({"basis": torch.randn(5, 2, 2)}, "core has shape (2, 2), expected (5,): basis is (5, 2, 2) (u, r, r)"),
        ({"basis": torch.randn(5, 3, 3), "core": torch.randn(5)}, "basis has shape (5, 3, 3), expected (u, 2, 2)"),
        ({"basis": torch.randn(5, 2, 2), "core": None}, "basis came without a core"),
        ({"basis": torch.randn(5, 2, 2, requires_grad=True), "core": torch.randn(5)}, "basis requires a gradient"),
    ],
)
def test_errors_name_the_operand_what_came_and_what_was_expected(changes, message, operator):
    with pytest.raises(ValueError) as error:
        operator(**broken(**changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.tensor([0, 1, 2, 3, 0, 0]), "adapter_ids holds values from 0 to 3, expected -1 (no adapter) to 2"),
        (torch.tensor([0, 1, 2, -2, 0, 0]), "adapter_ids holds values from -2 to 2"),
        (torch.tensor([0, 1, 2]), "adapter_ids has shape (3,), expected (6,): one per row of x"),
        (torch.zeros(6), "adapter_ids has dtype torch.float32, expected torch.int64 or torch.int32"),
        (torch.zeros(6, dtype=torch.int64, device="meta"), "adapter_ids is on meta"),
    ],
)
def test_bad_ids(ids, message, operator):
    with pytest.raises(ValueError) as error:
        operator(**broken(core=torch.randn(3, 2, 2), adapter_ids=ids))
    assert message in str(error.value)


def test_int32_ids():
    operands, ids, _ = Problem(6, 8, 16, 2, core="rows").operands()
    torch.testing.assert_close(adapted_linear(*operands, ids.int()), adapted_linear(*operands, ids))


class _Passive(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("seen", [False, True])
def test_no_second_gradient_is_lost(seen):
    """The first one depends on what was saved, also where dY is constant: a graph that does not say so gives zeros."""
    (x, *rest), ids, basis = Problem(6, 8, 16, 2, core="rows").operands()
    rest[2].requires_grad_()

    def f(x):
        return adapted_linear(x, *rest, ids, basis=basis).square().sum()

    def penalty():
        (g,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        return torch.autograd.grad(f(leaf) + g.square().sum(), rest[2])

    leaf, one = x.clone().requires_grad_(), torch.ones_like(x)
    functional = torch.autograd.functional
    with _Passive() if seen else contextlib.nullcontext():
        for second in (penalty, lambda: functional.hvp(f, x, one), lambda: functional.jvp(f, x, one)):
            with pytest.raises(RuntimeError, match="the gradient of a gradient"):
                second()


@pytest.mark.parametrize(("N", "r"), [(1152, 2), (4000, 2), (1000, 6)])
def test_few_bf16_rows_are_rounded_as_many_are(N, r):
    """The correction is added to few rows in another way than to many: the bits must not show it."""
    g = torch.Generator().manual_seed(0)
    y, s, factor = (torch.randn(*shape, generator=g) for shape in ((512, N), (512, r), (r, N)))
    y, factor = y.bfloat16(), factor.bfloat16()
    many = y.clone()
    assert many.numel() > eager.SMALL >= 8 * N > eager.TINY
    eager.add_product(many, s, factor)
    few = y.clone()
    for rows in range(0, 512, 8):
        eager.add_product(few[rows : rows + 8], s[rows : rows + 8], factor)
    exact = y.float().addmm(s, factor.float()).bfloat16()
    # Of a million numbers none differs on an AMD, one on an Intel; s is rounded, and it shows.
    assert (few != many).float().mean() < 1e-5 < 1e-3 < (exact != many).float().mean()


def test_ids_without_a_gap_and_more_rows_than_a_block(monkeypatch):
    z, core = torch.randn(7, 3), torch.randn(4, 3, 3)
    ids = torch.tensor([3, 0, 1, 1, 2, 3, 0])
    want = torch.stack([core[i] @ row for i, row in zip(ids, z, strict=True)])
    for block in (eager.BLOCK, 20):
        monkeypatch.setattr(eager, "BLOCK", block)
        torch.testing.assert_close(eager.apply_core(z, core, ids, gaps=False), want)
        torch.testing.assert_close(eager.apply_core(z, core, ids), want)
        some = torch.where(ids == 1, -1, ids)
        got = eager.apply_core(z, core, some)
        torch.testing.assert_close(got, want * (some >= 0).unsqueeze(-1))
    assert eager.check_ids(some, 4) and not eager.check_ids(ids, 4)


@pytest.mark.parametrize("core", ["dense", "mixed", "diagonal"])
def test_forward_mode(core):
    """Dual numbers and torch.func.jvp: the tangents of plain torch, where a custom op would give zeros."""
    (x, weight, down, c, up, bias), _, basis = Problem(5, 24, 40, 3, core=core).operands()
    dx, dc = torch.randn_like(x), torch.randn_like(c)

    def want(x, c):
        return reference.adapted_linear(x, weight, down, c, up, bias, basis=basis)

    def ours(x, c):
        return adapted_linear(x, weight, down, c, up, bias, basis=basis)

    for a, b in zip(torch.func.jvp(ours, (x, c), (dx, dc)), torch.func.jvp(want, (x, c), (dx, dc)), strict=True):
        torch.testing.assert_close(a, b)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, dx), c)).tangent
        torch.testing.assert_close(found, forward_ad.unpack_dual(want(forward_ad.make_dual(x, dx), c)).tangent)
