"""`python -m bench linear`: forward and forward + backward of one adapted linear layer."""

import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench import providers as who
from bench import shapes, timing
from bench.check import Gate, reason, why_not
from bench.providers import Case, Provider
from bench.rows import Results, Row

FORWARD, BOTH = PASSES = ("forward", "forward+backward")
R, U = 2, 13  # the adapter's, unless a command is told otherwise: what means, bars and summaries are about
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# On a CPU the default grid is a sample: the three shapes of a model that differ most in N / K (o_proj is q_proj again,
# k_proj and v_proj are small), no cell above this many operations, and torch.compile, which takes longer to compile
# than all of a layer's cells take to time, on one layer.
SAMPLE = ("q_proj", "gate_proj", "down_proj", "query", "intermediate", "output")
CPU_OPERATIONS = 2.5e9
CPU_COMPILED = ("Qwen2.5-1.5B", "q_proj")
CPU_ROWS, CUDA_ROWS = (1, 16, 64, 256), (1, 16, 128, 1024, 8192)


@dataclass(frozen=True)
class Plan:
    """What to measure: layers x dtypes x M x passes x providers, in about `budget` seconds."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    rows: tuple[int, ...]
    passes: tuple[str, ...]
    providers: tuple[str, ...]
    budget: float
    sample: bool  # the layers of the sample above, or every distinct one
    most: float = math.inf  # operations of a cell
    r: int = R
    u: int = U

    def cells(self) -> list[tuple[shapes.Layer, str, list[int]]]:
        """(layer, dtype, the Ms). Qwen2.5 first, as the bars are about it; the same projection of every model before
        the next one, so that a budget that ends early leaves no model out."""
        cells = []
        for model in self.models:
            chosen = [s for s in shapes.layers(model) if not self.sample or s.projections[0] in SAMPLE]
            for place, layer in enumerate(chosen):
                rows = [M for M in self.rows if self.most >= 2 * M * layer.N * layer.K]
                order = (not model.startswith("Qwen2.5"), place)
                cells += [(order, (layer, dtype, rows)) for dtype in self.dtypes if rows]
        return [cell for _, cell in sorted(cells, key=lambda c: c[0])]


def _weight(layer: shapes.Layer, M: int) -> float:
    """A cell's claim on the budget: a fixed part, and its operations."""
    return 0.3 + 2 * M * layer.N * layer.K / CPU_OPERATIONS


def run(plan: Plan, results: Results, device: torch.device) -> list[str]:
    """Measure; rows go to `results`. Returns what the budget did not reach, in words."""
    deadline = time.perf_counter() + plan.budget
    cells = plan.cells()
    total = sum(len(rows) for *_, rows in cells)
    left = sum(_weight(layer, M) for layer, _, rows in cells for M in rows)
    missed: list[str] = []
    with tqdm(total=total, desc="linear", unit="cell", dynamic_ncols=True) as bar:
        for layer, dtype, rows in cells:
            if time.perf_counter() > deadline:
                missed.append(f"{layer.model} {layer.projections[0]} {dtype}, M = {', '.join(map(str, rows))}")
                continue
            bar.set_postfix_str(f"{layer.model} {layer.projections[0]} {dtype}")
            case = Case(layer.N, layer.K, layer.bias, DTYPES[dtype], device, plan.r, plan.u)
            weight64 = case.linear.weight.double()
            present = _make(plan, case, results, layer, dtype)
            for M in rows:
                share = max(0.0, deadline - time.perf_counter()) * _weight(layer, M) / left
                _cell(plan, case, weight64, present, layer, dtype, M, share, results, device)
                left -= _weight(layer, M)
                bar.update()
    return missed


def _make(plan, case, results, layer, dtype) -> dict[str, Provider]:
    """The providers of a layer. One that cannot be made (PEFT not installed, say) leaves a row that says so."""
    present = {}
    for name in plan.providers:
        if name == who.PEFT_SAME_DTYPE and dtype == "fp32":
            continue  # an fp32 base has fp32 adapters either way: this is `peft`
        if name == who.COMPILED and plan.sample and (layer.model, layer.projections[0]) != CPU_COMPILED:
            continue
        try:
            present[name] = who.make(name, case.linear, case.factors)
        except Exception as error:  # not installed, or not at this rank
            results.add(_row(plan, layer, dtype, None, name, "", note=why_not(error)))
    return present


def _cell(plan, case, weight64, present, layer, dtype, M, budget, results, device) -> None:
    """All providers and passes at one M: first the gate, then the times."""
    size = DTYPES[dtype].itemsize
    buffers = timing.buffers_past_cache(size * (layer.N * layer.K + M * (layer.N + layer.K)), device)
    start = time.perf_counter()
    xs, dys = case.operands(M, buffers)
    with case.rotating(xs, dys) as rotation:
        gate = Gate(case.linear, case.factors, rotation.x, rotation.dy, weight64)
        good = {}
        for name, provider in present.items():
            try:
                gate.admit(provider)
                good[name] = provider
            except Exception as error:  # a provider that fails must not take the others' rows with it
                for pass_ in plan.passes:
                    results.add(_row(plan, layer, dtype, M, name, pass_, note=reason(error)))
        budget = max(0.0, budget - (time.perf_counter() - start))
        for pass_ in plan.passes:
            calls = {name: _call(provider, rotation, pass_) for name, provider in good.items()}

            def failed(name, error, pass_=pass_):
                results.add(_row(plan, layer, dtype, M, name, pass_, note=reason(error)))

            times = timing.alternate(calls, rotation, buffers, budget / len(plan.passes), device, failed=failed)
            rotation(0)
            for name, t in times.items():
                row = _row(plan, layer, dtype, M, name, pass_)
                row.p50_ms, row.p20_ms, row.p80_ms, row.rounds = t.p50, t.p20, t.p80, t.rounds
                row.ratio_to_bare = t.over(times[who.BARE]) if who.BARE in times else None
                directions = 2 if pass_ == BOTH else 1
                row.tflops = directions * 2 * M * layer.N * layer.K / t.p50 / 1e9
                row.gb_per_s = directions * size * (layer.N * layer.K + M * (layer.N + layer.K)) / t.p50 / 1e6
                row.peak_mb = timing.peak_mb(calls[name], device)
                results.add(row)


def _row(plan, layer, dtype, M, provider, pass_, note="") -> Row:
    return Row(
        "linear", layer.model, layer.name, provider, pass_, M, layer.N, layer.K, plan.r, plan.u, dtype, note=note
    )


def _call(provider: Provider, rotation, pass_: str):
    if pass_ == BOTH:
        return lambda: provider.gradients(rotation.x, rotation.dy)

    def forward():
        with torch.no_grad():
            return provider.forward(rotation.x)

    return forward
