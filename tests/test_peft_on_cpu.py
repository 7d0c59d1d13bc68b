"""What PEFT's layers run on a CPU: numbers and gradients, by torch's autograd and a node of our own, folded and not."""

import pytest
import torch
import torch.nn.functional as F
from problems import NAMES, Problem, assert_as_good_as_torch, grads

from tinylora.integrations import peft_on_cpu
from tinylora.ops import reference

f64, f32, f16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

FOLDED = [
    Problem(64, 48, 40, 3, f64),
    Problem(5, 7, 9, 2),
    Problem(0, 7, 9, 2),
    Problem(128, 48, 40, 3),  # a panel of rows for each thread
    Problem(131, 48, 40, 8, bias=False),  # panels that do not come out even
    Problem(128, 40, 48, 8, core="none"),
    Problem(128, 40, 48, 9, core="none", bias=False),  # a rank that lies in rows
]
UNFOLDED = [
    Problem(130, 200, 300, 3, f64),
    Problem(130, 200, 300, 3),
    Problem(131, 300, 200, 8, core="none"),
    Problem(130, 200, 300, 9, core="none", bias=False),
    Problem(5, 48, 40, 3, bf16, factors=f32),
    Problem(128, 48, 40, 8, f16, factors=f32, core="none"),
    Problem(600, 256, 40, 8, bf16, factors=f32),  # too many numbers in Y to add in fp32
    Problem(1200, 40, 1000, 2, bf16, factors=f32),  # several blocks of rows in fp32
    Problem(130, 200, 300, 3, bf16, factors=f32, bias=False),
    Problem(128, 48, 40, 9, bf16, factors=f32, core="none", bias=False),
    Problem(64, 48, 40, 3, f64, factors=f32, core="none"),
    Problem(5, 200, 300, 8, f64, factors=f32, core="none"),  # few rows of a larger W
    Problem(300, 200, 300, 3),  # many, and a core
]
MANY = [  # rows of a larger W: folded, and never all of dW'
    Problem(300, 200, 300, 3, core="none"),
    Problem(300, 300, 200, 8, f64, core="none"),
    Problem(240, 300, 200, 8, core="none", bias=False),
]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["whole", "node"])
def way(request, monkeypatch):
    """Both ways to the same gradients: torch's own from all of dW', and the nodes'."""
    for bound in ("BOTH", "ONE"):
        monkeypatch.setattr(peft_on_cpu, bound, 1 << 40 if request.param == "whole" else 0)
    return request.param


def ours(x, weight, down, core, up, bias, ids=None, basis=None, scale=1.0):
    return peft_on_cpu.linear_on_cpu(x, weight.detach(), bias, down, core, up, scale, basis)


def node(y):
    """Which node of ours made y."""
    return {"_FoldedBackward": "folded", "_ApartBackward": "apart"}.get(y.grad_fn.name())


def exact(x, weight, down, core, up, bias, ids=None, basis=None, scale=1.0):
    return reference.adapted_linear(x, weight, down, core, up * scale, bias)


@pytest.mark.parametrize("scale", [1.0, 0.75])
@pytest.mark.parametrize("problem", FOLDED + UNFOLDED + MANY, ids=lambda p: p.id)
def test_numbers(problem, scale, threads, way, poison_empty):
    operands, _, _ = problem.operands()
    x, weight, *_ = operands
    leaves = [None if t is None else t.clone().requires_grad_() for t in operands]
    small = problem in FOLDED or (problem.dtype in (bf16, f16) and weight.numel() <= peft_on_cpu.SMALL)
    if (way == "whole" and small) or problem.M == 0:
        assert node(ours(*leaves)) is None
    else:
        assert node(ours(*leaves)) == ("folded" if problem in FOLDED + MANY else "apart")
    dy = torch.randn(problem.M, problem.N).to(problem.dtype)

    def of(function, operands):
        return grads(lambda *t, **kw: function(*t, scale=scale, **kw), operands, None, None, dy)

    want = of(exact, [None if t is None else t.double() for t in operands])
    torchs = of(exact, [None if t is None else t.to(problem.dtype) for t in operands])
    found = of(ours, operands)
    with torch.no_grad():
        found["y without grad"] = ours(*operands, scale=scale)
    for name, value in found.items():
        if name == "weight":  # frozen
            assert value is None
            continue
        as_torch = name.split()[0]
        if problem.dtype is f64:
            torch.testing.assert_close(value, want[as_torch].to(value.dtype))
        else:
            assert_as_good_as_torch(name, value, want[as_torch], torchs[as_torch])
        operand = operands[0] if as_torch == "y" else operands[NAMES.index(name)]
        assert value.dtype == operand.dtype, name


@pytest.mark.parametrize("problem", [FOLDED[3], FOLDED[5], UNFOLDED[1], UNFOLDED[2]], ids=lambda p: p.id)
@pytest.mark.parametrize(
    "asked", [("x",), ("core",), ("up",), ("down",), ("bias",), ("x", "core"), ("down", "up")], ids="+".join
)
def test_each_gradient_is_the_same_whatever_else_is_asked_for(problem, asked, way):
    operands, _, _ = problem.operands()
    all_of_them = grads(ours, operands, None, None, torch.ones(problem.M, problem.N))
    asked = [n for n in asked if operands[NAMES.index(n)] is not None]
    leaves = [t if t is None else t.requires_grad_(n in asked) for n, t in zip(NAMES, operands, strict=True)]
    y = ours(*leaves)
    assert y.requires_grad == bool(asked)
    wanted = [leaves[NAMES.index(name)] for name in asked]
    found = torch.autograd.grad(y, wanted, torch.ones_like(y)) if asked else ()
    for name, grad in zip(asked, found, strict=True):
        torch.testing.assert_close(grad, all_of_them[name], rtol=1e-4, atol=1e-4)
        assert grad.is_contiguous(), name  # torch's fused optimizers read a gradient as it lies


ONE_SIDE = [
    FOLDED[0],
    FOLDED[4],
    Problem(64, 48, 40, 3, bf16, factors=f32),
    Problem(131, 48, 64, 9, f16, factors=f32, bias=False),
    Problem(3500, 40, 48, 4),  # enough rows for a panel a thread
    UNFOLDED[1],
    UNFOLDED[9],
    MANY[2],
    Problem(5, 200, 300, 8),  # few rows of a larger W
    Problem(5, 200, 300, 8, bf16, factors=f32),
]


@pytest.mark.parametrize("way", ["whole", "node", "no W' for a core"])
@pytest.mark.parametrize(
    "trains", ["down", "core", "v", "many v", "up", "b and d", "b", "d", "up, b and d", "b and d, none"]
)
@pytest.mark.parametrize("problem", ONE_SIDE, ids=lambda p: p.id)
def test_gradients_where_one_side_trains(problem, trains, way, threads, poison_empty, monkeypatch):
    """TinyLoRA's v, VeRA's diagonals and so on, in a node of few thin products, in 16 bits as well."""
    monkeypatch.setattr(peft_on_cpu, "BOTH", 1 << 40)
    monkeypatch.setattr(peft_on_cpu, "ONE", 1 << 40 if way == "whole" else 0)
    monkeypatch.setattr(peft_on_cpu, "CORE", 1 << 40 if way in ("whole", "node") else 0)
    if way == "node":  # few rows in 16 bits as they are
        monkeypatch.setattr(peft_on_cpu, "COPY", 0)
    core = {"core": "dense", "v": "mixed", "many v": "mixed"}.get(trains, "none")
    operands, _, basis = problem.with_(core=core, u=40 if trains == "many v" else 5).operands()
    g = torch.Generator().manual_seed(1)
    wide = f64 if problem.dtype is f64 else f32
    b, d = (torch.randn(n, generator=g).to(wide) for n in (problem.N, problem.r))
    dy = torch.randn(problem.M, problem.N, generator=g)
    ends = "b" in trains or trains == "d"
    names = ["core" if n.endswith("v") else n for n in trains.replace(" and ", ", ").split(", ")]
    names = ["x", "bias"] + ([] if "none" in names else names)

    def of(function, dtype=None, rows=slice(None)):
        x, weight, down, core, up, bias = (t if t is None or dtype is None else t.to(dtype) for t in operands)
        named = {"x": x[rows], "bias": bias, "down": down, "core": core, "up": up, "b": b, "d": d}
        named = {n: t if t is None or dtype is None else t.to(dtype) for n, t in named.items()}
        for name in names:
            if named[name] is not None:
                named[name] = named[name].detach().clone().requires_grad_()
        y = function(weight=weight, basis=basis if dtype is None or basis is None else basis.to(dtype), **named)
        leaves = {n: t for n, t in named.items() if t is not None and t.requires_grad}
        found = torch.autograd.grad(y, list(leaves.values()), dy[rows].to(y.dtype))
        with torch.no_grad():
            alone = function(weight=weight, basis=basis if dtype is None or basis is None else basis.to(dtype), **named)
        return y, {"y": y.detach(), "y without grad": alone} | dict(zip(leaves, found, strict=True))

    def on_cpu(x, weight, bias, down, core, up, b, d, basis):
        three = x.unflatten(0, (1, -1)) if problem.M % 2 == 0 else x
        y = peft_on_cpu.linear_on_cpu(three, weight, bias, down, core, up, 0.75, basis, (b, d) if ends else None)
        assert y.shape == (*three.shape[:-1], problem.N)
        return y.view(-1, problem.N) if three is not x else y

    def plainly(x, weight, bias, down, core, up, b, d, basis):
        core = core if basis is None else torch.einsum("u,uij->ij", core, basis)
        up = up * 0.75 * (b[:, None] * d if ends else 1)
        return reference.adapted_linear(x, weight, down, core, up, bias)

    y, found = of(on_cpu)
    if problem.M % 2:  # no view made of it
        small = problem is not UNFOLDED[9] and problem.N < 200
        if way == "no W' for a core" and core != "none":
            small = small and problem.factors is not None  # in 16 bits it is made nevertheless
        folded = way != "whole" and len(names) > 2
        assert node(y) == (("folded" if folded else None) if small else "apart")
    _, want = of(plainly, f64)
    torchs = [of(plainly, problem.dtype)[1]]
    # Sums over the rows in other orders: which one is lucky differs from one processor to the next.
    for seed in range(7):
        order = torch.randperm(problem.M, generator=torch.Generator().manual_seed(seed))
        _, other = of(plainly, problem.dtype, order)
        torchs.append(other | {name: other[name][order.argsort()] for name in ("x", "y", "y without grad")})
    assert found.keys() == want.keys()
    for name, value in found.items():
        if problem.dtype is f64:
            torch.testing.assert_close(value, want[name])
        else:
            assert_as_good_as_torch(name, value, want[name], [own[name] for own in torchs])
        assert value.is_contiguous(), name  # torch's fused optimizers read a gradient as it lies
        assert value.dtype == (problem.dtype if name[0] in "xy" or name == "bias" else wide), name


@pytest.mark.parametrize("change", ["rows", "kept"])
def test_a_larger_layer_is_folded_for_many_rows_and_where_autograd_may_keep_it(change, monkeypatch):
    few, many = (Problem(M, 300, 200, 8, core="none").operands()[0] for M in (239, 240))
    assert node(ours(*(t if t is None else t.requires_grad_() for t in many))) == "folded"
    if change == "kept":
        monkeypatch.setattr(peft_on_cpu, "MANY", 300 * 200 - 1)
    else:
        many = few
    assert node(ours(*(t if t is None else t.requires_grad_() for t in many))) == "apart"


@pytest.mark.parametrize(
    "problem, taken",
    [
        (Problem(5, 48, 40, 3), None),  # a small W is folded
        (Problem(5, 200, 100, 3), "_in_few_calls"),
        (Problem(5, 128, 128, 16), "_in_few_calls"),  # of a rank for which it is not
        (Problem(512, 512, 64, 3), None),  # few numbers in x, and more in Y than are few
        (Problem(130, 200, 300, 3), "_forward"),  # neither few nor many
        (Problem(300, 200, 300, 3), None),
        (Problem(600, 600, 500, 3), "_forward"),  # many, of a W too large
        (Problem(5, 128, 200, 3, bf16, factors=f32), None),  # rounded as in training
        (Problem(5, 200, 300, 3, bf16, factors=f32), "_in_few_calls"),
        (Problem(5, 200, 300, 3, f64, factors=f32, core="none"), "_forward"),
    ],
    ids=lambda p: getattr(p, "id", p),
)
def test_which_way_is_taken_without_gradients(problem, taken, monkeypatch):
    ways = []
    for way in ("_in_few_calls", "_forward"):
        function = getattr(peft_on_cpu, way)
        monkeypatch.setattr(peft_on_cpu, way, lambda *a, way=way, to=function: (ways.append(way), to(*a))[1])
    with torch.no_grad():
        y = ours(*problem.operands()[0])
    assert ways == ([] if taken is None else [taken])
    assert y.dtype is problem.dtype and not y._is_view()


@pytest.mark.parametrize("M", [5, 200])  # few rows and more
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_a_core_beside_diagonals(M, dtype):
    (x, weight, down, core, up, bias), _, _ = Problem(M, 200, 300, 8, dtype, factors=f32).operands()
    b, d = torch.randn(200), torch.randn(8)
    with torch.no_grad():
        y = peft_on_cpu.linear_on_cpu(x, weight, bias, down, core, up, diagonals=(b, d))
    scaled = b[:, None] * up * d
    want = reference.adapted_linear(*(t.double() for t in (x, weight, down, core, scaled, bias)))
    torchs = reference.adapted_linear(*(t.to(dtype) for t in (x, weight, down, core, scaled, bias)))
    assert_as_good_as_torch("y", y, want, torchs)
    assert y.dtype is dtype and not y._is_view()  # in place it may be changed with gradients as well


@pytest.mark.parametrize("problem", [FOLDED[3], MANY[0], *(UNFOLDED[i] for i in (1, 4, 5, 8))], ids=lambda p: p.id)
@pytest.mark.parametrize("zero", ["core", "up"])
def test_a_zero_core_or_up_gives_the_base_layer_bit_for_bit(problem, zero, way):
    if way == "whole" and problem.dtype in (bf16, f16):
        pytest.skip("rounded as F.linear rounds, summed in another order: the next test")
    operands, _, _ = problem.with_(core="dense").operands()
    x, weight, down, core, up, bias = operands
    core, up = (torch.zeros_like(t) if n == zero else t for n, t in (("core", core), ("up", up)))
    for rows in (x, x.unsqueeze(1), x[:3]):
        for grad in (False, True):
            y = ours(rows, weight, down, core.requires_grad_(grad), up, bias)
            assert torch.equal(y, F.linear(rows, weight, bias))


@pytest.mark.parametrize("grad", [False, True])
def test_few_bf16_rows_of_a_small_layer_are_rounded_as_many_are(grad):
    """They are multiplied in fp32, in another order than oneDNN's: one number in 40,000 to 200,000 differs."""
    g = torch.Generator().manual_seed(0)
    differ = total = 0
    for _ in range(200):
        x, weight = (torch.randn(n, 128, generator=g).to(bf16) for n in (32, 128))
        bias, down, up = torch.randn(128, generator=g).to(bf16), torch.randn(2, 128), torch.zeros(128, 2)
        with torch.set_grad_enabled(grad):
            y = peft_on_cpu.linear_on_cpu(x, weight, bias, down, None, up.requires_grad_(grad))
            want = F.linear(x, weight, bias)
        differ, total = differ + (y != want).sum().item(), total + y.numel()
        torch.testing.assert_close(y, want, rtol=2**-7, atol=1e-3)
    assert differ <= 1e-4 * total


def test_strides_and_dimensions():
    operands, _, _ = Problem(24, 20, 32, 3).operands()
    x, *rest = operands
    want = ours(*operands)
    apart = torch.full((24, 64), float("nan"))
    apart[:, ::2] = x
    for same in (apart[:, ::2], x.T.contiguous().T):
        torch.testing.assert_close(ours(same, *rest), want)
    for lead in ((2, 3, 4), (24, 1), (1, 24)):
        leaf = x.clone().requires_grad_()
        y = ours(leaf.view(*lead, 32), *rest)
        torch.testing.assert_close(y.detach(), want.view(*lead, 20))
        y.sum().backward()  # dY is one number, expanded
        assert leaf.grad.shape == x.shape
    assert ours(x[0], *rest).shape == (20,)


@pytest.mark.parametrize("problem", [FOLDED[3], UNFOLDED[1]], ids=lambda p: p.id)
def test_a_node_refuses_the_gradient_of_a_gradient_and_autocast_changes_nothing_in_its_backward(problem, monkeypatch):
    monkeypatch.setattr(peft_on_cpu, "ONE", 0)
    operands, _, _ = problem.operands()
    x = operands[0].requires_grad_()
    up = operands[4].requires_grad_()
    y = ours(*operands)
    (want,) = torch.autograd.grad(y.square().sum(), up, retain_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of a gradient"):
        torch.autograd.grad(y.square().sum(), up, create_graph=True)
    y = ours(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(y.square().sum(), up)
    assert torch.equal(inside, want) and x.grad is None
