"""Counted, not timed: launches and compulsory bytes of one Qwen2.5-7B layer, ours against PEFT's TinyLoRA.

Bytes are what a kernel must move once: its operands in, its results out (partial sums count both ways). Nothing
here is a speed; a launch costs a microsecond or so and a byte 1/4.3 ps on an H200, if the roofline is reached.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from lanes import INTERPRETED_AT_IMPORT, compiler
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora.kernels import scratch
from tinylora.ops import fused, matmul

pytestmark = pytest.mark.skipif(INTERPRETED_AT_IMPORT, reason="TRITON_INTERPRET is set: launches cannot be counted")

LAYER = {  # name: (N, K), bias where Qwen2.5 has one
    "q": (3584, 3584, True),
    "k": (512, 3584, True),
    "v": (512, 3584, True),
    "o": (3584, 3584, False),
    "gate": (18944, 3584, False),
    "up": (18944, 3584, False),
    "down": (3584, 18944, False),
}
R, U = 2, 1
bf16, f32 = torch.bfloat16, torch.float32


def empty(*shape, dtype=bf16, grad=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def size(*tensors) -> int:
    """Bytes of the distinct tensors among these."""
    distinct = {id(t): t for t in tensors if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in distinct.values())


class Count(TorchDispatchMode):
    """Every torch operation that computes: a launch, with its operands' and results' bytes."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and not name.startswith(("empty", "new_empty", "detach")):
            flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.launches += 1
            self.bytes += size(*flat)
        return out


def kernel_bytes(launch) -> int:
    """Operands and results of one Triton launch; what is accumulated or summed in parts moves twice."""
    tensors = [getattr(a, "base", a) for a in launch.args]
    names = {"gemm_kernel": 4 if launch.options.get("EXPAND") else None, "thin_kernel": 9, "decode_kernel": 11}
    twice = names.get(launch.name)
    split = launch.options.get("SPLIT_K", True)
    return size(*tensors) + (size(tensors[twice]) if twice is not None and split else 0)


def ours(M, N, K, bias):
    """((launches, bytes) forward, the same backward) of one linear; the core's v and x ask for gradients."""
    x, weight, down, up, b = empty(M, K), empty(N, K), empty(R, K), empty(N, R), empty(N) if bias else None
    v, basis = empty(U, dtype=f32), empty(U, R, R, dtype=f32)
    totals = []
    with compiler((9, 0), only_count=True) as launches, Count() as torch_ops:
        for step in ("forward", "backward"):
            launches.clear()
            torch_ops.launches = torch_ops.bytes = 0
            if step == "forward":
                y, z = fused.forward(x, weight, down, v, up, b, None, basis)
            else:
                need = (True, False, False, True, False, False)
                fused.backward(torch.empty_like(y), None, z, weight, down, v, up, None, basis, need)
            totals.append(
                (len(launches) + torch_ops.launches, torch_ops.bytes + sum(kernel_bytes(launch) for launch in launches))
            )
    return totals


GROUPS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def siblings(M):
    """(launches, MB) forward and backward of the layer where q, k, v and gate, up are groups with one v."""
    totals = [[0, 0], [0, 0]]
    for group in GROUPS:
        sizes = [LAYER[name][0] for name in group]
        _, K, bias = LAYER[group[0]]
        N, r = sum(sizes), R * len(group)
        weight, down, up, b = empty(N, K), empty(r, K), empty(N, r), empty(N) if bias else None
        v, basis = empty(U, dtype=f32), empty(U, r, r, dtype=f32)
        with compiler((9, 0), only_count=True) as launches, Count() as torch_ops:
            y, z = fused.forward(empty(M, K), weight, down, v, up, b, None, basis)
            forward = len(launches), sum(map(kernel_bytes, launches)), torch_ops.launches, torch_ops.bytes
            dys = [empty(M, n) for n in sizes]
            fused.backward_of_parts(dys, z, weight, down, v, up, None, basis, True, True)
        both = len(launches), sum(map(kernel_bytes, launches)), torch_ops.launches, torch_ops.bytes
        totals[0][0] += forward[0] + forward[2]
        totals[0][1] += forward[1] + forward[3]
        totals[1][0] += both[0] + both[2] - forward[0] - forward[2]
        totals[1][1] += both[1] + both[3] - forward[1] - forward[3]
    return tuple((count, round(moved / 1e6)) for count, moved in totals)


def dx_adds(M):
    """(launches, MB) of what autograd adds where layers without groups share x: [M, K] twice in, once out."""
    adds = sum(len(group) - 1 for group in GROUPS)
    return adds, round(adds * 3 * M * 3584 * 2 / 1e6)


def peft(M, N, K, bias, adapter=True):
    """The same of PEFT 0.21's TinyLoRA layer, written out: fp32 factors, x widened, the delta added and rounded.

    Without `adapter`: the frozen layer alone.
    """
    x, weight, b = empty(M, K, grad=True), empty(N, K), empty(N) if bias else None
    down, up = empty(R, K, dtype=f32), empty(N, R, dtype=f32)
    v, basis = empty(U, dtype=f32, grad=True), empty(U, R, R, dtype=f32)
    totals = []
    with Count() as count:
        y = F.linear(x, weight, b)
        if adapter:
            core = torch.einsum("i,ijk->jk", v, basis)
            delta = F.linear(F.linear(F.linear(x.to(f32), down), core), up)
            y = (y + delta).to(bf16)
        totals.append((count.launches, count.bytes))
        count.launches = count.bytes = 0
        torch.autograd.grad(y, [x, v] if adapter else [x], torch.empty_like(y))
        totals.append((count.launches, count.bytes))
    return totals


def layer(function, M):
    """(launches, MB) forward and backward over the seven linears."""
    per_linear = [function(M, *shape) for shape in LAYER.values()]
    return tuple((sum(t[i][0] for t in per_linear), round(sum(t[i][1] for t in per_linear) / 1e6)) for i in (0, 1))


TABLE = {
    1: {
        "frozen": ((7, 466), (7, 466)),
        "ours": ((7, 468), (14, 467)),
        "peft": ((56, 468), (77, 468)),
        "siblings": ((4, 467), (10, 467)),
        "adds": (3, 0),
    },
    16: {
        "frozen": ((7, 469), (7, 469)),
        "ours": ((7, 486), (14, 475)),
        "peft": ((56, 492), (77, 493)),
        "siblings": ((4, 475), (10, 476)),
        "adds": (3, 1),
    },
    512: {
        "frozen": ((7, 558), (7, 558)),
        "ours": ((21, 703), (24, 664)),  # all but some dX by the library, whose tiles end in whole waves there
        "peft": ((56, 1275), (77, 1297)),
        "siblings": ((11, 603), (15, 650)),
        "adds": (3, 33),
    },
    8192: {
        "frozen": ((7, 1942), (7, 1942)),
        "ours": ((14, 2610), (21, 2762)),
        "peft": ((56, 13396), (77, 13757)),
        "siblings": ((8, 2256), (12, 2584)),
        "adds": (3, 528),
    },
}


@pytest.fixture(autouse=True)
def counters_are_there_already(monkeypatch):
    """A card keeps its zeroed counters from call to call."""
    monkeypatch.setattr(scratch, "counters", lambda n, device: torch.empty(n, dtype=torch.int32, device=device))


@pytest.mark.parametrize("M", [1, 16, 512, 8192])
def test_one_layer_of_qwen_7b(M):
    """((launches, MB) forward, (launches, MB) backward). Autograd's adds come on top of all but "siblings"."""
    counted = {
        "frozen": layer(lambda *shape: peft(*shape, adapter=False), M),
        "ours": layer(ours, M),
        "siblings": siblings(M),
        "peft": layer(peft, M),
        "adds": dx_adds(M),
    }
    assert counted == TABLE[M]


def test_with_siblings_a_decode_layer_is_four_launches_and_dx_is_never_added():
    assert TABLE[1]["siblings"][0][0] == 4
    launches, moved = TABLE[8192]["siblings"][1]
    adds, added = TABLE[8192]["adds"]
    assert launches < TABLE[8192]["ours"][1][0] and moved < TABLE[8192]["ours"][1][1] + added


def test_decode_is_one_launch_per_linear_and_streams_w_once():
    for N, K, bias in LAYER.values():
        (launches, moved), _ = ours(1, N, K, bias)
        assert launches == 1
        assert moved < 1.02 * N * K * 2, (N, K, moved / (N * K * 2))


def test_no_pass_over_x_in_the_backward_when_only_the_core_trains():
    """The backward has no x to read, and moves little beyond dY (twice), W and dX."""
    for N, K, bias in LAYER.values():
        _, (launches, moved) = ours(8192, N, K, bias)
        assert launches <= 3
        assert moved < 1.02 * 2 * (2 * 8192 * N + N * K + 8192 * K), (N, K)


def launches_in_order(M, monkeypatch) -> list[str]:
    """What a group of siblings with M rows launches, forward and backward."""
    weight, down, up = empty(4608, 3584), empty(6, 3584), empty(4608, 6)
    core = empty(6, 6, dtype=f32)
    order: list[str] = []

    class Noted(list):
        def append(self, launch):
            order.append(f"{launch.name}{' pdl' if launch.options.get('launch_pdl') else ''}")
            super().append(launch)

    class Torch(Count):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            before = self.launches
            out = super().__torch_dispatch__(func, types, args, kwargs)
            order.extend([func.overloadpacket.__name__] * (self.launches - before))
            return out

    monkeypatch.setattr("lanes.Launches", Noted)
    with compiler((9, 0), only_count=True), Torch():
        _, z = fused.forward(empty(M, 3584), weight, down, core, up, None, None, None)
        fused.backward_of_parts(
            [empty(M, n) for n in (3584, 512, 512)], z, weight, down, core, up, None, None, True, True
        )
    return order


@pytest.mark.parametrize("one_loop_only", [False, True])
def test_a_matmul_that_starts_early_follows_the_thin_pass(one_loop_only, monkeypatch):
    """It reads X and W while the launch before it may run: nothing that writes them may stand between."""
    monkeypatch.setattr(matmul, "_one_loop_only", lambda capability: one_loop_only)
    order = launches_in_order(8192, monkeypatch)
    assert order.count("gemm_kernel pdl") == 2
    for before, name in itertools.pairwise(order):
        if name == "gemm_kernel pdl":
            assert before in ("thin_kernel", "core_gradient_kernel pdl"), order
    assert ("cat" in order) == one_loop_only and "thin_kernel pdl" not in order, order


def test_a_pass_over_y_that_starts_early_follows_the_library_and_the_thin_pass(monkeypatch):
    """It reads Y while the launch before it may run."""
    order = launches_in_order(256, monkeypatch)
    first, second = [i for i, name in enumerate(order) if name == "gemm_kernel pdl"]
    assert order[:first] == ["mm", "thin_kernel"], order
    assert order[first + 1 : second] == ["mm", "addmm_", "addmm_", "thin_kernel", "core_gradient_kernel pdl"], order
