"""`python -m bench layer`: the seven linear layers of a transformer block, every provider, against the roofline.

What is timed: a forward without gradients, and a forward with the backward to the four inputs and the seven v, of
`bench.block.Block`: the linear layers alone, q, k, v on one tensor and gate, up on another. On a GPU eagerly, and
captured in a CUDA graph. Outputs and gradients of every provider are held against fp64 before. The device's ceilings
are measured in the same run, and every row carries the least time that they allow. On a CPU `compiled addmm` is
measured in the first dtype alone. nf4 is a base of four bits a number, computed in bf16 (QLoRA's, by bitsandbytes):
bare and ours alone, as PEFT's TinyLoRA does not take one.
"""

import itertools
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench import block, roofline, shapes, timing
from bench import providers as who
from bench.check import reason, why_not
from bench.linear import BOTH, DTYPES, PASSES, R, U
from bench.rows import Results, Row

NF4 = "nf4"
BASES = (*DTYPES, NF4)
EAGER, CAPTURED = "eager", "captured"
CPU_ROWS, CUDA_ROWS = (1, 16, 256), (1, 16, 128, 1024, 8192)
CPU_MODELS, CUDA_MODELS = ("Qwen2.5-0.5B",), ("Qwen2.5-1.5B", "Qwen2.5-7B")


@dataclass(frozen=True)
class Plan:
    """models x dtypes x rows x passes x providers, in about `budget` seconds of timing."""

    models: tuple[str, ...]
    dtypes: tuple[str, ...]
    rows: tuple[int, ...]
    providers: tuple[str, ...] = block.PROVIDERS
    budget: float = 110.0
    r: int = R
    u: int = U


def run(plan: Plan, results: Results, device: torch.device) -> list[str]:
    """Measure; rows of ops "layer" and "ceilings" go to `results`. Returns what the budget did not reach, in words."""
    deadline = time.perf_counter() + plan.budget
    ceilings, rows = roofline.measure(device, dict.fromkeys(map(_computed, plan.dtypes)), 0.05 * plan.budget)
    for row in rows:
        results.add(row)
    modes = (CAPTURED, EAGER) if device.type == "cuda" else (EAGER,)
    if device.type != "cuda":
        results.add(Row("layer", "", "block", "", "", mode=CAPTURED, note="not measured: CUDA graphs need a GPU"))
    cells = [(model, dtype, M) for model in plan.models for dtype in plan.dtypes for M in plan.rows]
    left = sum(map(_weight, cells))
    missed: list[str] = []
    case, of = None, None
    with tqdm(total=len(cells), desc="layer", unit="cell", dynamic_ncols=True) as bar:
        for cell in cells:
            model, dtype, M = cell
            bar.set_postfix_str(f"{model} {dtype} M = {M}")
            if time.perf_counter() > deadline:
                missed.append(f"{model} {dtype}, M = {M}")
                continue
            if of != (model, dtype):
                case = present = weights64 = None  # what the last one held goes first
                of = model, dtype
                try:
                    case = block.Case(
                        shapes.projections(model), DTYPES[_computed(dtype)], device, plan.r, plan.u,
                        lambda size: timing.buffers_past_cache(size, device), nf4=dtype == NF4,
                    )  # fmt: skip
                except ImportError as error:  # bitsandbytes
                    results.add(_row(plan, (model, dtype, None), "", "", "", note=f"not measured: {error}"))
                else:
                    weights64 = {name: weight.double() for name, weight in case.weights[0].items()}
                    present = _make(plan, case, results, model, dtype)
            if case is not None:
                share = max(0.0, deadline - time.perf_counter()) * _weight(cell) / left
                _cell(plan, case, weights64, present, cell, modes, share, ceilings, results, device)
            left -= _weight(cell)
            bar.update()
    return missed


def _computed(dtype: str) -> str:
    """What a base of this kind is computed in."""
    return "bf16" if dtype == NF4 else dtype


def _weight(cell: tuple[str, str, int]) -> float:
    """A cell's claim on the budget: a fixed part, and its operations."""
    model, _, M = cell
    return 0.3 + sum(g.operations(M, 0) for g in roofline.groups(model)) / 2.5e9


def _make(plan, case, results, model, dtype) -> dict[str, block.Provider]:
    """The providers of a block. One that cannot be made (PEFT not installed, say) leaves a row that says so."""
    present = {}
    for name in plan.providers:
        if dtype == NF4 and name not in block.FOUR_BIT_PROVIDERS:
            continue
        if name == who.PEFT_SAME_DTYPE and dtype == "fp32":
            continue  # an fp32 base has fp32 adapters either way: this is `peft`
        if (
            name == who.COMPILED_ADDMM
            and case.device.type == "cpu"
            and dtype != next(d for d in plan.dtypes if d != NF4)
        ):
            continue  # compiling takes longer than timing all the others does
        try:
            present[name] = case.provider(name)
        except Exception as error:  # not installed, or not at this rank
            results.add(_row(plan, (model, dtype, None), name, "", "", note=why_not(error)))
    return present


def _cell(plan, case, weights64, present, cell, modes, budget, ceilings, results, device) -> None:
    """All providers, passes and modes at one M: first the gate, then the times."""
    model, dtype, M = cell
    start = time.perf_counter()
    xs, dys = case.operands(M)
    gate = block.Gate(case, xs[0], dys[0], weights64)
    good = {}
    for name, provider in present.items():
        try:
            gate.admit(provider)
            good[name] = provider
        except Exception as error:  # a provider that fails must not take the others' rows with it
            for pass_, mode in itertools.product(PASSES, modes):
                results.add(_row(plan, cell, name, pass_, mode, note=reason(error)))
    del gate
    work, computed = roofline.groups(model), _computed(dtype)
    size, of_weight = DTYPES[computed].itemsize, block.NF4_BYTES if dtype == NF4 else None
    budget = max(0.0, budget - (time.perf_counter() - start))
    turn = Turn()
    for pass_ in PASSES:
        calls = {name: _call(provider, turn, xs, dys, pass_) for name, provider in good.items()}
        for mode in modes:
            share = budget / len(PASSES) / len(modes)

            def failed(name, error, pass_=pass_, mode=mode):
                results.add(_row(plan, cell, name, pass_, mode, note=reason(error)))

            times = timing.alternate(calls, turn, case.buffers, share, device, graphs=mode == CAPTURED, failed=failed)
            for name, t in times.items():
                row = _row(plan, cell, name, pass_, mode)
                row.p50_ms, row.p20_ms, row.p80_ms, row.rounds = t.p50, t.p20, t.p80, t.rounds
                row.ratio_to_bare = t.over(times[who.BARE]) if who.BARE in times else None
                rank = 0 if name in block.WITHOUT else plan.r
                row.bound_ms = 1e3 * roofline.bound(work, M, rank, computed, size, ceilings, pass_, of_weight)
                directions = 2 if pass_ == BOTH else 1
                row.tflops = directions * sum(g.operations(M, 0) for g in work) / t.p50 / 1e9
                row.gb_per_s = directions * sum(g.bytes(M, 0, size, of_weight) for g in work) / t.p50 / 1e6
                row.peak_mb = timing.peak_mb(calls[name], device)
                results.add(row)


class Turn:
    """Which copy of the weights and operands is used."""

    i = 0

    def __call__(self, i: int) -> None:
        self.i = i


def _call(provider: block.Provider, turn: Turn, xs, dys, pass_: str):
    if pass_ == BOTH:
        return lambda: provider.gradients(turn.i, xs[turn.i], dys[turn.i])
    return lambda: provider.forward(turn.i, xs[turn.i])


def _row(plan, cell, provider, pass_, mode, note="") -> Row:
    model, dtype, M = cell
    return Row("layer", model, "block", provider, pass_, M, None, None, plan.r, plan.u, dtype, mode=mode, note=note)
