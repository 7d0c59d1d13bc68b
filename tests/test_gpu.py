"""The same problems on a card, at real sizes: `make gpu-test`. Skipped where there is none.

What only a card can show: numbers through the tensor cores, CUDA graphs, programs that really run at once,
addresses past 2^31 elements, and the sanitizers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from models import qwen2
from problems import Problem, assert_as_good_as_torch, exact, grads, packed, torch_own

import tinylora
from tinylora.nn.rows import own_stack
from tinylora.ops import adapted_linear

launch = pytest.importorskip("tinylora.kernels.launch")
fused = pytest.importorskip("tinylora.ops.fused")
ways = pytest.importorskip("tinylora.ops.ways")
tiles = pytest.importorskip("tinylora.kernels.tiles")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: not measured"),
]
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16

PROBLEMS = [
    Problem(0, 3584, 3584, 2, bf16),
    Problem(1, 3584, 3584, 2, bf16),
    Problem(1, 18944, 3584, 8, f16),
    Problem(5, 77, 100, 3, bf16),
    Problem(16, 3584, 18944, 2, bf16, core="mixed-rows"),
    Problem(33, 512, 3584, 16, bf16, core="rows", adapters=40),
    Problem(65, 3584, 3584, 64, f16),
    Problem(16, 3584, 3584, 8, bf16, core="diagonal"),
    Problem(4096, 3584, 3584, 64, bf16, core="diagonal", factors=f32),
    Problem(128, 3584, 3584, 2, bf16, core="mixed", u=13),
    Problem(130, 3584, 3584, 2, bf16),
    Problem(1000, 3584, 3584, 2, bf16, core="mixed-rows"),
    Problem(2048, 4608, 3584, 2, bf16, core="mixed"),
    Problem(2048, 3584, 18944, 2, bf16),  # the library multiplies
    Problem(4096, 18944, 3584, 16, bf16, core="none", factors=f32),
    Problem(4099, 3584, 3584, 64, f16),
    Problem(4096, 3584, 3584, 128, bf16),
    Problem(1000, 3584, 3584, 256, bf16, core="diagonal", factors=f32),  # no kernel takes the rank
    Problem(515, 3580, 3580, 2, bf16),  # rows that bulk copies refuse
    Problem(515, 517, 515, 3, f16),
    Problem(16, 512, 1024, 2, f32),
    Problem(515, 512, 1024, 16, f32),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.id)
def test_numbers(problem, poison_empty):
    operands, ids, basis = problem.operands(device="cuda")
    dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(1)).to("cuda", problem.dtype)
    ours = grads(adapted_linear, operands, ids, basis, dy)
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    x, weight, *_, bias = operands
    with torch.no_grad():  # what PyTorch's own layer loses: with a bias the library may add up in another order
        base = F.linear(x, weight, bias).double() - F.linear(x.double(), weight.double(), bias.double())
    if problem.M and base.abs().max() > (own["y"].double() - want["y"]).abs().max():
        own["y"] = want["y"] + base
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])


@pytest.mark.parametrize("M", [1, 16, 64, 65, 1000])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("r, core, factors", [(2, "mixed", bf16), (16, "diagonal", f32), (3, "mixed-rows", bf16)])
def test_four_bits(M, nested, r, core, factors):
    """Up to 64 rows by bitsandbytes' kernels, beyond on the dequantised weight."""
    pytest.importorskip("bitsandbytes")
    problem = Problem(M, 1024, 3584, r, bf16, core=core, factors=factors)
    (x, weight, *rest), ids, basis = problem.operands(device="cuda")
    four, dense = packed(weight, nested)
    operands = x, dense, *rest
    dy = torch.randn(M, 1024, generator=torch.Generator().manual_seed(1)).to("cuda", bf16)
    ours = grads(lambda x, _, *rest, **more: adapted_linear(x, four, *rest, **more), operands, ids, basis, dy)
    want, own = exact(operands, ids, basis, dy), torch_own(operands, ids, basis, dy)
    assert ours.pop("weight") is None
    for name, value in ours.items():
        assert_as_good_as_torch(name, value, want[name], own[name])


@pytest.mark.parametrize("M", [16, 64, 128, 512])
def test_leading_dimensions_that_do_not_fold(M):
    """A transposed batch, and a transposed gradient, on whatever way these sizes take."""
    (x, weight, down, core, up, bias), _, _ = Problem(M, 512, 3584, 2, bf16).operands(device="cuda")
    want = adapted_linear(x, weight, down, core, up, bias)
    turned = x.view(M // 2, 2, -1).transpose(0, 1).requires_grad_()
    y = adapted_linear(turned, weight, down, core, up, bias)
    torch.testing.assert_close(y.transpose(0, 1).reshape(M, -1), want, rtol=2e-2, atol=2e-2)
    y.backward(torch.ones(512, device="cuda", dtype=bf16).expand(2, M // 2, 512))
    dy = torch.randn(M // 2, 2, 512, device="cuda", dtype=bf16).transpose(0, 1)
    adapted_linear(turned, weight, down, core, up, bias).backward(dy)
    assert turned.grad.shape == turned.shape


@pytest.mark.parametrize("problem", PROBLEMS[1:19], ids=lambda p: p.id)
def test_bitwise_repeatable(problem):
    """Programs arrive in another order every time; the sums must not notice."""
    operands, ids, basis = problem.operands(device="cuda")
    dy = torch.randn(problem.M, problem.N, device="cuda", dtype=problem.dtype)
    first = grads(adapted_linear, operands, ids, basis, dy)
    del first["weight"], first["bias"]  # the library's own sums
    for _ in range(20):
        again = grads(adapted_linear, operands, ids, basis, dy)
        for name in first:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("problem", PROBLEMS[1:], ids=lambda p: p.id)
def test_bitwise_repeatable_planned_or_not(problem):
    """What kernels/launch.py hands a compiled kernel gives the bits of Triton's own launcher, forward and backward."""

    def refuse(self, tensors):
        raise AssertionError(f"{self.kernel} was not planned")

    def results(seed):
        (x, *rest), ids, basis = problem.operands(seed, device="cuda")
        dy = torch.randn(problem.M, problem.N, generator=torch.Generator().manual_seed(seed)).to("cuda", problem.dtype)
        found = grads(adapted_linear, (x, *rest), ids, basis, dy)
        with torch.no_grad():
            found["quiet"] = adapted_linear(x, *rest, ids, basis=basis)
        return {name: t for name, t in found.items() if name not in ("weight", "bias")}  # the library's own sums

    with patch.object(launch, "KNOWN", False), patch.dict(ways.known, clear=True):
        want = [results(seed) for seed in (0, 1)]
    results(0)
    with patch.object(launch.Launch, "_through_triton", refuse):
        planned = [results(seed) for seed in (0, 1)]
    for ours, theirs in zip(planned, want, strict=True):
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
        assert torch.equal(ours["quiet"], ours["y"])


@pytest.mark.parametrize("M", [1, 16, 130, 2048])
def test_a_captured_graph_follows_v(M):
    """Forward and backward in one CUDA graph; v changes in place between replays, by `.data` as optimisers do."""
    (x, weight, down, v, up, bias), _, basis = Problem(M, 3584, 3584, 2, bf16, core="mixed", u=3).operands(
        device="cuda"
    )
    x.requires_grad_()
    v.requires_grad_()

    def step():
        y = adapted_linear(x, weight, down, v, up, bias, basis=basis)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for scale in (1.0, -3.0, 0.0):
        v.data.copy_(torch.tensor([0.5, -1.0, 2.0], device="cuda") * scale)
        for _ in range(3):
            graph.replay()
        for replayed, eager in zip(captured, step(), strict=True):
            assert torch.equal(replayed, eager), scale


@pytest.mark.parametrize("M, N", [(1, 3584), (16, 18944), (64, 512), (300, 3584), (2048, 18944)])
def test_a_layer_keeps_its_operands_and_sees_what_becomes_of_them(M, N):
    """From its third call on a decode layer hands over addresses: on every stream, beside graphs, wherever v lies."""
    (x, weight, down, v, up, bias), _, basis = Problem(M, N, 3584, 2, bf16, core="mixed", u=3).operands(device="cuda")
    linear = torch.nn.Linear(3584, N, device="meta", dtype=bf16)
    linear.weight, linear.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    svd = (up.float().contiguous(), torch.ones(2, device="cuda"), down.float())
    with patch("tinylora.adapters.lora_xs.cached_svd", lambda *_: svd):
        layer = tinylora.Linear.from_linear(linear, tinylora.TinyLoraConfig(r=2, u=3))
    adapter = layer.adapters["default"]
    adapter.v.data.copy_(v)
    adapter.P.copy_(basis)

    def want(x):
        f = adapter.factors()
        return adapted_linear(x, layer.weight, f.down, f.core, f.up, layer.bias, basis=f.basis)

    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(layer(x), want(x))
        y, z = layer._kept["default"].bound.forward(x, False)
        assert z is None and torch.equal(y, want(x))
        for change in (
            lambda: adapter.v.data.mul_(2),
            lambda: setattr(adapter.v, "data", adapter.v.data - 1),
            lambda: layer.weight.data.neg_(),
            lambda: setattr(layer.weight, "data", layer.weight.data * 2),
        ):
            change()
            for _ in range(3):
                other = torch.randn_like(x)
                assert torch.equal(layer(other), want(other))
        streams = [torch.cuda.Stream() for _ in range(3)]
        expected, found = want(x), []
        torch.cuda.synchronize()
        for stream in streams * 20:
            with torch.cuda.stream(stream):
                found.append(layer(x))
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in found)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected) and torch.equal(layer(x), expected)
    x.requires_grad_()
    dy = torch.randn_like(expected)
    for i in range(5):  # from the third time on launches are bound in both directions
        y = layer(x)
        found = y, *torch.autograd.grad(y, (x, adapter.v), dy)
        y = want(x)
        for got, expect in zip(found, (y, *torch.autograd.grad(y, (x, adapter.v), dy)), strict=True):
            assert torch.equal(got, expect), i
    bound = layer._kept["default"].bound
    assert len([way for way in bound.ways.values() if way is not None]) == len(bound.ways) == 3


def test_two_streams_at_once():
    """Each stream has counters of its own."""
    (x, weight, down, core, up, bias), _, _ = Problem(8, 512, 3584, 2, bf16).operands(device="cuda")
    want = adapted_linear(x, weight, down, core, up, bias)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(adapted_linear(x, weight, down, core, up, bias))
    torch.cuda.synchronize()
    assert all(torch.equal(r, want) for r in results)


@pytest.mark.parametrize("M", [8, 130])
def test_a_graph_beside_eager_calls(M):
    """What a stream keeps between launches is not what a graph uses, whatever runs beside it."""
    (x, weight, down, core, up, bias), _, _ = Problem(M, 512, 3584, 2, bf16).operands(device="cuda")
    other = torch.randn_like(x)
    with torch.no_grad():
        want, wanted_beside = (adapted_linear(t, weight, down, core, up, bias) for t in (x, other))
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph):
            captured = adapted_linear(x, weight, down, core, up, bias)
        torch.cuda.synchronize()
        for _ in range(50):
            captured.zero_()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.replay()
            beside = [adapted_linear(other, weight, down, core, up, bias) for _ in range(4)]
            torch.cuda.synchronize()
            assert torch.equal(captured, want) and all(torch.equal(b, wanted_beside) for b in beside)


def test_compiled_into_cuda_graphs():
    """torch.compile's graphs warm up in a pool of their own; what we keep from call to call must not lie in it."""
    torch._dynamo.reset()
    (x, weight, down, core, up, bias), _, _ = Problem(8, 512, 3584, 2, bf16).operands(device="cuda")
    with torch.no_grad():
        compiled = torch.compile(
            lambda x: F.silu(adapted_linear(x, weight, down, core, up, bias)), mode="reduce-overhead"
        )
        for scale in (1, 2, 3, 4, 5):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x * scale).clone()
            want = F.silu(adapted_linear(x * scale, weight, down, core, up, bias))
            torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


STATIC = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}


@pytest.fixture
def adapted():
    """A small Qwen2 with an adapter, and nothing compiled yet."""
    pytest.importorskip("transformers")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = qwen2(hidden=256, intermediate_size=768, vocab_size=512)
    return tinylora.apply(model, tinylora.TinyLoraConfig(u=2)).cuda()


def test_generate_on_a_static_cache_follows_v(adapted):
    """transformers compiles the decode step into CUDA graphs: once, and v changes between generations."""
    ids = torch.randint(0, 512, (4, 8), device="cuda")
    distinct = set()
    for scale in (0.0, 0.5, -0.5):
        with torch.no_grad():
            for v in tinylora.adapter_parameters(adapted):
                v.fill_(scale)
        tokens = adapted.generate(ids, **STATIC)
        assert torch.equal(tokens, adapted.generate(ids, disable_compile=True, **STATIC))
        distinct.add(tuple(tokens.flatten().tolist()))
    assert len(distinct) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_on_a_static_cache_follows_the_stack(adapted):
    """As evolution strategies use it: other adapters in every generation, from one CUDA graph."""
    names, own = [n for n, _ in adapted.tinylora.default.named_parameters()], {}
    ids = torch.randint(0, 512, (1, 8), device="cuda").repeat(4, 1)
    distinct = set()
    for scale in (0.5, 1.0, -0.5):
        adapters = [dict.fromkeys(names, torch.full((2,), scale * k)) for k in range(4)]
        with own_stack(adapted, "default", adapters, own), tinylora.adapter_ids(adapted, [0, 1, 2, 3]):
            tokens = adapted.generate(ids, **STATIC)
            assert torch.equal(tokens, adapted.generate(ids, disable_compile=True, **STATIC))
        distinct |= {tuple(row) for row in tokens.tolist()}
    assert len(distinct) > 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("core", ["dense", "mixed-rows"])
def test_compile(core):
    torch._dynamo.reset()
    operands, ids, basis = Problem(64, 512, 1024, 2, bf16, core=core).operands(device="cuda")

    def function(x, ids):
        return F.silu(adapted_linear(F.gelu(x), *operands[1:], ids, basis=basis))

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for M in (5, 64, 200):
        x = torch.randn(M, 1024, device="cuda", dtype=bf16)
        own = None if ids is None else torch.randint(-1, 3, (M,), device="cuda")
        torch.testing.assert_close(compiled(x, own), function(x, own), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("M, N, K", [(300_000, 8192, 64), (40_000, 64, 65_536)], ids=["Y", "X"])
def test_offsets_past_two_to_the_31(M, N, K):
    """More than 2^31 elements in Y, or in X; the last rows are held against a call of their own."""
    assert max(M * N, M * K) > 1 << 31
    (_, weight, down, core, up, bias), _, _ = Problem(1, N, K, 2, bf16).operands(device="cuda")
    x = torch.randn(M, K, device="cuda", dtype=bf16)
    y = adapted_linear(x, weight, down, core, up, bias)
    tail = slice(M - 300, M)
    torch.testing.assert_close(y[tail], adapted_linear(x[tail], weight, down, core, up, bias), rtol=2e-2, atol=2e-2)


SANITIZED = """
import torch
from problems import Problem, grads
from tinylora.ops import adapted_linear
for M, core, r in ((5, "mixed-rows", 3), (77, "dense", 13), (200, "rows", 2), (300, "dense", 64)):
    operands, ids, basis = Problem(M, 136, 264, r, torch.bfloat16, core=core).operands(device="cuda")
    grads(adapted_linear, operands, ids, basis, torch.randn(M, 136, device="cuda").bfloat16())
torch.cuda.synchronize()
print("ran")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed: not measured")
    root = Path(__file__).parents[1]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    env = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "ran" in done.stdout, done.stdout[-4000:]
