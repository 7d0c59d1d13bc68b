"""`python -m bench memory`: what one block's adapters keep between forward and backward, and the peak of both.

"kept": bytes of the distinct tensors that autograd keeps after the forward, without parameters, buffers and the block's
own outputs; inputs count where a layer keeps them. It is counted, not estimated, on any device. "forward+backward": the
peak of allocated memory above what was there before, outputs and gradients included: torch counts it on GPUs alone.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from bench import block, shapes, timing
from bench import providers as who
from bench.check import reason
from bench.linear import BOTH, DTYPES, R, U
from bench.rows import Results, Row

KEPT = "kept"
# The compiled one keeps what its code does, the fused one what the bare one does.
PROVIDERS = tuple(name for name in block.PROVIDERS if name not in (who.COMPILED_ADDMM, who.FUSED))


def kept(provider: block.Provider, xs: list[Tensor], weights: set[int]) -> int:
    """Bytes that autograd keeps of a forward, by storage; `weights`: the storages that live anyway."""
    found: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return t

    forward, trains = provider.copies[0]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = forward(*xs)
    lasting = weights | {t.untyped_storage().data_ptr() for t in (*outputs, *trains)}
    if isinstance(forward, torch.nn.Module):
        lasting |= {t.untyped_storage().data_ptr() for t in (*forward.parameters(), *forward.buffers())}
    return sum(size for address, size in found.items() if address not in lasting)


def run(results: Results, device: torch.device, models: tuple[str, ...], dtype: str, rows: tuple[int, ...]) -> None:
    """Rows of op "memory"; `peak_mb` holds both figures."""
    r, u = R, U
    with tqdm(total=len(models) * len(rows), desc="memory", unit="cell", dynamic_ncols=True) as bar:
        for model in models:
            case = block.Case(shapes.projections(model), DTYPES[dtype], device, r, u, lambda size: 1)
            weights = [*case.weights[0].values(), *(b for b in case.biases.values() if b is not None)]
            weights += [t for f in case.factors.values() for t in (f.down, f.up)]
            lasting = {t.untyped_storage().data_ptr() for t in weights}
            for M in rows:
                bar.set_postfix_str(f"{model} M = {M}")
                (xs,), (dys,) = case.operands(M)
                for name in PROVIDERS:

                    def row(pass_, mb=None, note="", model=model, M=M, name=name):
                        found = Row("memory", model, "block", name, pass_, M, None, None, r, u, dtype, note=note)
                        found.peak_mb = mb
                        results.add(found)

                    try:
                        provider = case.provider(name)
                    except ImportError as error:
                        row("", note=f"not measured: {error}")
                        continue
                    try:
                        size = kept(provider, xs, lasting)
                        provider.gradients(0, xs, dys)  # what is allocated once must not count
                        peak = timing.peak_mb(lambda p=provider, xs=xs, dys=dys: p.gradients(0, xs, dys), device)
                    except Exception as error:  # one that fails must not take the others' rows with it
                        for pass_ in (KEPT, BOTH):
                            row(pass_, note=reason(error))
                        continue
                    row(KEPT, size / 2**20)
                    row(BOTH, peak, "" if peak is not None else "not measured: torch counts allocations on GPUs alone")
                bar.update()
