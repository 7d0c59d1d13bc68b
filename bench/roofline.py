"""`python -m bench roofline`: the least time that a block's linear layers can take on an H200, and a model of each way.

One linear layer of Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ, X [M, K], W [N, K], rank r, is at the least

    2 M N K + 2 M r (K + N) operations        M K + N K + M N + r (K + N) numbers read or written once

and dX = dY W + ((dY U) C) D the same again. Layers that read one X ("siblings": q, k, v; gate, up) read it once, and
sum their dX in one. No way of computing beats `bound`: the larger of operations / rate and bytes / bandwidth, one
group of siblings after the other. Everything else here is a model: `modelled` adds to the bound the launches and passes
that a way of computing needs beside the frozen matmul (whole waves of programs, which cost the frozen matmul 0 to 30 %
more than its bound, are left out of both).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bench import providers as who
from bench import shapes, timing
from bench.linear import BOTH, DTYPES, PASSES
from bench.rows import Row, device_name
from tinylora.kernels import tiles


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: operations per second by dtype, bytes per second, and where these numbers are from."""

    device: str
    rates: dict[str, float]
    bandwidth: float
    source: str
    gap: float = 1e-6  # seconds between two dependent kernels in a CUDA graph
    shortest: float = 1.5e-6  # seconds of the shortest kernel


# One H200 as `measure` found it (bench/results/nvidia-h200.csv), rounded; fp16 is taken to be as fast as bf16. Gap and
# shortest kernel are assumptions.
H200 = Ceilings(
    "NVIDIA H200",
    {"bf16": 790e12, "fp16": 790e12, "fp32": 50e12},
    4.3e12,
    "but its ceilings, on one H200; `python -m bench gpu --stage parts` measures them",
)


@dataclass(frozen=True)
class Group:
    """Layers that read the same X: weights [N_i, K]."""

    K: int
    Ns: tuple[int, ...]

    @property
    def N(self) -> int:
        return sum(self.Ns)

    def operations(self, M: int, r: int) -> float:
        return 2.0 * M * self.N * self.K + 2.0 * M * r * (len(self.Ns) * self.K + self.N)

    def bytes(self, M: int, r: int, size: float, of_weight: float | None = None) -> float:
        """Read or written once, of `size` bytes a number, or `of_weight` where it is one of W's."""
        others = M * self.K + M * self.N + r * (len(self.Ns) * self.K + self.N)
        return size * others + (of_weight or size) * self.N * self.K


def groups(model: str) -> tuple[Group, ...]:
    """The groups of siblings in one transformer block of a model."""
    found = shapes.projections(model)
    return tuple(Group(found[names[0]][1], tuple(found[n][0] for n in names)) for names in shapes.SIBLINGS)


def bound(
    work: Iterable[Group],
    M: int,
    r: int,
    dtype: str,
    size: int,
    ceilings: Ceilings,
    pass_: str,
    of_weight: float | None = None,
) -> float:
    """Seconds that no way of computing these groups, one after the other, goes below; r = 0 is the frozen layer."""
    rate = ceilings.rates[dtype]
    one = sum(max(g.operations(M, r) / rate, g.bytes(M, r, size, of_weight) / ceilings.bandwidth) for g in work)
    return one * (2 if pass_ == BOTH else 1)


# What every way launches beside the frozen matmul, for one layer: a kernel is the bytes it moves for every number of
# [M, K] and of [M, N], 16 bits a number; (0, 0) works on [M, r] or less. Forward, then backward (v trains, x asks).
SMALL = (0, 0)
EXTRA: dict[str, tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]] = {
    who.BARE: ((), ()),
    who.PEFT: (  # x widened, C, x Dᵀ, z Cᵀ, s Uᵀ, the sum in fp32, rounded: all in fp32
        ((6, 0), SMALL, (4, 0), SMALL, (0, 4), (0, 10), (0, 6)),
        ((0, 6), (0, 6), (0, 4), SMALL, (4, 0), (6, 0), (6, 0), SMALL, SMALL),
    ),
    who.PEFT_SAME_DTYPE: (
        (SMALL, (2, 0), SMALL, (0, 2), (0, 6)),
        ((0, 2), SMALL, (2, 0), (6, 0), SMALL, SMALL),
    ),
    who.ADDMM: (  # C first: cast, mixed, cast; and dv after
        (SMALL, SMALL, SMALL, (2, 0), SMALL, (0, 4)),
        ((0, 2), SMALL, (4, 0), SMALL, SMALL, SMALL),
    ),
    who.ALONE: (((2, 0),), ((0, 2), SMALL)),
    who.OURS: (((2, 0),), ((0, 2), SMALL)),  # the forward's once for a group
}


def modelled(provider: str, work: Iterable[Group], M: int, ceilings: Ceilings, pass_: str) -> float:
    """Seconds of one way, in bf16: the frozen layer's bound, and its extra kernels one after the other."""
    work = tuple(work)

    def kernel(of_x: int, of_y: int, M_K: float, M_N: float) -> float:
        moved = (of_x * M_K + of_y * M_N) / ceilings.bandwidth
        return max(moved, ceilings.shortest) + ceilings.gap

    seconds = bound(work, M, 0, "bf16", 2, ceilings, pass_)
    forward, backward = EXTRA[provider]
    if provider in (who.ALONE, who.OURS) and M <= tiles.DECODE_ROWS_HOPPER:  # z on the way, or beside what streams W
        forward, backward = (), (SMALL,)
    for g in work:
        shared = provider == who.OURS
        Ns = (g.N,) if shared else g.Ns
        seconds += sum(kernel(*bytes_, M * g.K, M * N) for N in Ns for bytes_ in forward)
        if pass_ == BOTH:
            seconds += sum(kernel(*bytes_, M * g.K, M * N) for N in Ns for bytes_ in backward)
            # autograd adds up the dX of siblings, one addition at a time
            seconds += 0 if shared else (len(g.Ns) - 1) * kernel(6, 0, M * g.K, 0)
    return seconds


def table(model: str, rows: Iterable[int], ceilings: Ceilings = H200) -> tuple[list[str], list[list]]:
    """(headers, lines): of one block, the frozen layers' bound in microseconds and what every way adds, in percent."""
    lines, work = [], groups(model)
    for pass_ in PASSES:
        for M in rows:
            base = bound(work, M, 0, "bf16", 2, ceilings, pass_)
            added = (modelled(name, work, M, ceilings, pass_) / base - 1 for name in EXTRA if name != who.BARE)
            lines.append([model, pass_, M, f"{base * 1e6:.0f}", *(f"+{a:.1%}" for a in added)])
    return ["model", "pass", "M", "frozen, bound us", *(name for name in EXTRA if name != who.BARE)], lines


# How many fp32 numbers are copied, and the side of the matmul: past every cache, and enough to fill the device.
SIZES = {"cpu": (1 << 25, 1536), "cuda": (1 << 28, 8192)}


def measure(device: torch.device, dtypes: Iterable[str], budget: float) -> tuple[Ceilings, list[Row]]:
    """The ceilings of this device, now, and rows of op "ceilings" that say how they were found.

    Bandwidth is the larger of a copy's (bytes read and written) and of a sum's (read alone: some CPUs write a copy's
    target twice); a rate is that of a square matmul on random numbers. Each is by the shortest of its times: a ceiling
    is what the device reaches when nothing else runs.
    """
    numbers, side = SIZES[device.type]
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source), "read": source.sum}
    moved = {"copy": 8.0 * numbers, "read": 4.0 * numbers}
    operations = {}
    for name in dtypes:
        n = side // 2 if name == "fp32" and device.type == "cuda" else side
        a, b = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        calls[f"matmul {name}"] = lambda a=a, b=b: a @ b
        operations[name] = 2.0 * n**3
    times = timing.alternate(calls, lambda i: None, 1, budget, device)
    rows = []
    for name, t in times.items():
        kind, _, dtype = name.partition(" ")
        row = Row("ceilings", "", "", kind, name, dtype=dtype or "fp32", rounds=t.rounds)
        row.p50_ms, row.p20_ms, row.p80_ms = t.p50, t.p20, t.p80
        if name in moved:
            row.gb_per_s = moved[name] / t.best / 1e6
        else:
            row.tflops = operations[dtype] / t.best / 1e9
        rows.append(row)
    ceilings = Ceilings(
        device_name(device),
        {row.dtype: row.tflops * 1e12 for row in rows if row.tflops},
        max(row.gb_per_s for row in rows if row.gb_per_s) * 1e9,
        "measured in the same run",
    )
    return ceilings, rows
