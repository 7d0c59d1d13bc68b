"""`python -m bench parts`: the kernels one by one, on a GPU: what the constants in kernels/tiles.py should be.

    fused matmul  Y = X Wᵀ + S Uᵀ with s given, and dX the same on Wᵀ, against the library's bare matmul: `slack`
    thin pass     z = X Dᵀ and t = dY U: bytes per second, U lying in memory as U and as Uᵀ
    decode        Y of a few rows, all of it, against the library's bare matmul: bytes of W per second

Each is held against fp64 before it is timed, in CUDA graphs, on operands that are no longer in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import shapes, timing
from bench.check import WrongResult, allowance, reason, some_rows
from bench.linear import R
from bench.rows import Results, Row

MATMUL, THIN, DECODE = "fused matmul", "thin pass", "decode"
LIBRARY, OURS, AS_U, AS_UT = "F.linear", "ours", "ours, U as [N, r]", "ours, U as [r, N]"
ROWS = {MATMUL: (512, 2048, 8192), THIN: (512, 8192), DECODE: (1, 8, 16)}
PASSES = {MATMUL: ("Y", "dX"), THIN: ("z",), DECODE: ("Y",)}


@dataclass
class Cell:
    """Ways to compute one thing.

    calls: by provider, each on the i-th set of operands; exact: the result in fp64 at some rows; own: PyTorch's own
    error; moved, operations: the bytes and operations that any way needs
    """

    calls: dict[str, Callable[[int], Tensor]]
    exact: dict[str, Tensor]
    own: dict[str, float]
    rows: Tensor
    moved: float
    operations: float


def run(results: Results, device: torch.device, models: tuple[str, ...], budget: float, check: bool = True) -> None:
    """Rows of op "parts". `check` is off where launches are stubbed out, and numbers mean nothing."""
    cells = [
        (model, part, pass_, layer, M)
        for part, Ms in ROWS.items()
        for model in models
        for layer in shapes.layers(model)
        for M in Ms
        for pass_ in PASSES[part]
    ]
    with tqdm(total=len(cells), desc="parts", unit="cell", dynamic_ncols=True) as bar:
        for model, part, pass_, layer, M in cells:
            bar.set_postfix_str(f"{part} {layer.N} x {layer.K}, M = {M}")
            make = {MATMUL: _matmul, THIN: _thin, DECODE: _decode}[part]
            N, K = (layer.K, layer.N) if pass_ == "dX" else (layer.N, layer.K)
            buffers = timing.buffers_past_cache(2 * (N * K + M * (N + K)), device)
            cell = make(M, N, K, pass_ == "dX", buffers, device)
            where = (model, layer.name, f"{part}, {pass_}", M, N, K)
            _measure(results, cell, where, buffers, budget / len(cells), device, check)
            bar.update()


def _measure(results, cell: Cell, where: tuple, buffers: int, budget: float, device, check: bool) -> None:
    model, layer, part, M, N, K = where

    def row(provider, note="", **values):
        results.add(Row("parts", model, layer, provider, part, M, N, K, R, dtype="bf16", note=note, **values))

    good = {}
    for name, call in cell.calls.items():
        try:
            error = (call(0)[cell.rows].double() - cell.exact[name]).abs().max().item()
            allowed = allowance(cell.own[name], cell.exact[name], torch.bfloat16)
            if check and not error <= allowed:
                raise WrongResult(f"error {error:.1e}, allowed {allowed:.1e}")
            good[name] = call
        except Exception as error:  # one that fails must not take the others' rows with it
            row(name, note=reason(error))
    turn = [0]

    def rotate(i):
        turn[0] = i

    calls = {name: lambda call=call: call(turn[0]) for name, call in good.items()}
    times = timing.alternate(
        calls, rotate, buffers, budget, device, failed=lambda name, error: row(name, note=reason(error))
    )
    for name, t in times.items():
        ratio = t.p50 / times[LIBRARY].p50 if LIBRARY in times else None
        times_ = {"p50_ms": t.p50, "p20_ms": t.p20, "p80_ms": t.p80, "rounds": t.rounds, "ratio_to_bare": ratio}
        rates = {"gb_per_s": cell.moved / t.p50 / 1e6, "tflops": cell.operations / t.p50 / 1e9}
        row(name, "" if check else "launches stubbed out: not a measurement", **times_, **rates)


def _normal(*shape, scale=1.0, device, seed=0) -> Tensor:
    g = torch.Generator(device).manual_seed(seed)
    return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=g)


def _operands(M, N, K, transposed, buffers, device):
    """(xs, ws, up, rows): w [N, K], or a view of Wᵀ where W is [K, N] as dX sees it."""
    xs = [_normal(M, K, device=device)]
    ws = [_normal(*((K, N) if transposed else (N, K)), scale=K**-0.5, device=device, seed=1)]
    for _ in range(1, buffers):
        xs.append(xs[0].clone())
        ws.append(ws[0].clone())
    up = _normal(R, N, scale=R**-0.5, device=device, seed=2).T
    return xs, [w.T for w in ws] if transposed else ws, up, some_rows(M, device)


def _matmul(M, N, K, transposed, buffers, device) -> Cell:
    from tinylora.kernels import tiles
    from tinylora.kernels.gemm import fits_descriptors, gemm
    from tinylora.ops.ways import kernel_capability

    xs, ws, up, rows = _operands(M, N, K, transposed, buffers, device)
    ys = [torch.empty(M, N, dtype=torch.bfloat16, device=device) for _ in xs]
    capability = kernel_capability(device)
    chip, thin = tiles.card(capability), tiles.thin_tile(M, K, R, torch.bfloat16, capability)
    descriptors = fits_descriptors(xs[0], ws[0])
    tile = tiles.gemm_tile(M, N, chip, descriptors and chip.bulk_copies, thin.width, descriptors)
    s = torch.zeros(M, thin.width, dtype=torch.bfloat16, device=device)
    s[:, :R] = _normal(M, R, device=device, seed=3)

    def ours(i):
        gemm(xs[i], ws[i], ys[i], s, up, None, tile, "ieee")
        return ys[i]

    bare = xs[0][rows].double() @ ws[0].double().T
    exact = {LIBRARY: bare, OURS: bare + s[rows, :R].double() @ up.double().T}
    own = (F.linear(xs[0][rows], ws[0]).double() - bare).abs().max().item()
    calls = {LIBRARY: lambda i: F.linear(xs[i], ws[i]), OURS: ours}
    moved, operations = 2.0 * (M * K + N * K + M * N), 2.0 * M * N * K
    return Cell(calls, exact, dict.fromkeys(calls, own), rows, moved, operations)


def _thin(M, N, K, transposed, buffers, device) -> Cell:
    from tinylora.kernels import tiles
    from tinylora.kernels.core import Core
    from tinylora.kernels.thin import thin
    from tinylora.ops.ways import kernel_capability

    xs = [_normal(M, K, device=device)]
    xs += [xs[0].clone() for _ in range(1, buffers)]
    down, core, rows = _normal(R, K, scale=K**-0.5, device=device, seed=2), Core(), some_rows(M, device)
    up = down.T.contiguous().T  # the backward's: t = dY U with U [K, r] in memory
    tile = tiles.thin_tile(M, K, R, torch.bfloat16, kernel_capability(device))

    def pass_over(factor):
        return lambda i: thin(xs[i], factor, core, tile, "ieee", want_s=True)[0]

    exact = xs[0][rows].double() @ down.double().T
    own = (F.linear(xs[0][rows], down).double() - exact).abs().max().item()
    calls = {LIBRARY: lambda i: F.linear(xs[i], down), AS_UT: pass_over(down), AS_U: pass_over(up)}
    moved = 2.0 * (M * K + R * K) + 6.0 * M * R
    return Cell(calls, dict.fromkeys(calls, exact), dict.fromkeys(calls, own), rows, moved, 2.0 * M * K * R)


def _decode(M, N, K, transposed, buffers, device) -> Cell:
    from tinylora.ops import fused

    xs, ws, up, rows = _operands(M, N, K, transposed, buffers, device)
    down, core = _normal(R, K, scale=K**-0.5, device=device, seed=4), _normal(R, R, device=device, seed=5).float()

    def ours(i):
        return fused.forward(xs[i], ws[i], down, core, up, None, None, None)[0]

    bare = xs[0][rows].double() @ ws[0].double().T
    z = xs[0][rows].double() @ down.double().T
    exact = {LIBRARY: bare, OURS: bare + z @ core.double().T @ up.double().T}
    own = (F.linear(xs[0][rows], ws[0]).double() - bare).abs().max().item()
    calls = {LIBRARY: lambda i: F.linear(xs[i], ws[i]), OURS: ours}
    return Cell(calls, exact, dict.fromkeys(calls, own), rows, 2.0 * N * K, 2.0 * M * N * K)
