"""`python -m bench host`: microseconds of the host per call of one layer so small that its arithmetic is nothing.

On a CPU that is the whole call; on a GPU the time until the call returns, the device idle before it, and with CUDA
graphs the replay of a hundred calls divided by a hundred. "hot": calls follow one another. "cold": between two calls
twice the last cache's bytes are written, as a model's weights go through it between two layers.

Without a GPU also the kernels' path, with their launches stubbed out: all Python from the layer down to what Triton has
written in C, which then does nothing. The driver's own part of a launch is not in it. Once as it is, and once with no
launch planned (kernels/launch.py): the difference is Triton's part, which a planned launch leaves out.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench import block, timing
from bench import providers as who
from bench.check import reason
from bench.linear import DTYPES, R, U
from bench.providers import Case
from bench.rows import Results, Row

HOT, COLD, CAPTURED = "hot", "cold", "captured"
QUIET, FORWARD, BACKWARD = PASSES = ("forward, no grad", "forward", "backward")
FUNCTION, OPERATOR, STUBBED = "F.linear", "adapted_linear", "launches stubbed out"
UNPLANNED = f"none planned, {STUBBED}"
SIZE = 64  # N and K of the layer, at one row
# The two ways through the kernels, by rows; the layers' N and K are of a size that decides for the fused matmul.
KERNEL_ROWS = {"decode": 1, "fused matmul": 512}
KERNEL_SIZE = 512
IN_A_GRAPH = 100
CPU = torch.device("cpu")


@dataclass
class Host:
    """One way to call. forward: the inputs -> one output or several; trains: what trains beside the inputs."""

    name: str
    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    trains: list[Tensor]


def one_layer(case: Case) -> list[Host]:
    """F.linear and the bare layer, PEFT's layer, ours, and the operator under it."""
    from tinylora.ops import adapted_linear

    f, linear = case.factors, case.linear
    made = [Host(FUNCTION, lambda x: F.linear(x, linear.weight, linear.bias), [])]
    for name in (who.BARE, who.PEFT, who.OURS):
        with contextlib.suppress(ImportError):  # a machine without PEFT measures the others
            p = who.make(name, linear, f)
            made.append(Host(name, p.forward, [] if p.trains is None else [p.trains]))
    v, basis = f.v.float().requires_grad_(), f.basis.float()

    def operator(x):
        return adapted_linear(x, linear.weight, f.down, v, f.up, linear.bias, basis=basis)

    return [*made, Host(OPERATOR, operator, [v])]


def seven_layers(case: block.Case, names: tuple[str, ...]) -> list[Host]:
    """A block as in `bench layer`: what siblings cost and spare the host."""
    made = []
    for name in names:
        with contextlib.suppress(ImportError):
            ((forward, trains),) = case.provider(name).copies
            made.append(Host(name, forward, trains))
    return made


class Calls:
    """Every provider's call in one pass, and what has to happen between two: `between` is not timed."""

    def __init__(self, providers: list[Host], xs: list[Tensor], dys: list[Tensor], pass_: str, flush: Callable):
        self.providers, self.xs, self.dys, self.pass_, self.flush = providers, xs, dys, pass_, flush
        self.outputs: dict[str, Tensor | tuple[Tensor, ...]] = {}

    def between(self, _: int = 0) -> None:
        if self.pass_ == BACKWARD:
            self.outputs = {p.name: p.forward(*self.xs) for p in self.providers}
        self.flush()
        if self.xs[0].is_cuda:
            torch.cuda.synchronize()

    def call(self, p: Host) -> Callable[[], object]:
        xs, dys = self.xs, self.dys
        if self.pass_ == BACKWARD:
            wanted = [*xs, *p.trains]
            return lambda: torch.autograd.grad(self.outputs[p.name], wanted, dys)
        if self.pass_ == FORWARD:
            return lambda: p.forward(*xs)

        def quiet():
            with torch.no_grad():
                return p.forward(*xs)

        return quiet

    def times(self, budget: float, failed: Callable[[str, Exception], None]) -> dict[str, timing.Times]:
        calls = {p.name: self.call(p) for p in self.providers}
        # the host's clock, on a GPU, too
        return timing.alternate(calls, self.between, 1, budget, CPU, failed=failed)


def flusher(mode: str) -> Callable[[], None]:
    """What empties the host's caches between two calls, or nothing."""
    if mode != COLD:
        return lambda: None
    buffer = torch.zeros(2 * timing.last_level_cache(CPU), dtype=torch.int8)
    return lambda: buffer.add_(1)


def run(results: Results, device: torch.device, dtype: str, budget: float) -> None:
    """Rows of op "host"."""
    cuda = device.type == "cuda"
    case = Case(SIZE, SIZE, True, DTYPES[dtype], device, R, U)
    (x,), (dy,) = case.operands(1, 1)
    seven = _seven(SIZE, DTYPES[dtype], device)
    (xs,), (dys,) = seven.operands(1)
    everybody = seven_layers(seven, (who.BARE, who.PEFT, who.ALONE, who.OURS))
    measured = [("layer", one_layer(case), [x], [dy]), ("block of seven", everybody, xs, dys)]
    total = len(PASSES) * 2 * (3 if cuda else 2 + 4 * len(KERNEL_ROWS))
    with tqdm(total=total, desc="host", unit="cell", dynamic_ncols=True) as bar:

        def measure(layer, size, found, xs, dys, kind=dtype, modes=(HOT, COLD)):
            for mode in modes:
                for pass_ in PASSES:
                    calls = Calls(found, xs, dys, pass_, flusher(mode))

                    def row(name, pass_=pass_, mode=mode, **values):
                        return Row("host", "", layer, name, pass_, *size, R, U, kind, mode=mode, **values)

                    def failed(name, error, row=row):
                        results.add(row(name, note=reason(error)))

                    if mode != CAPTURED:
                        times = calls.times(budget / total, failed)
                    elif pass_ != BACKWARD:  # whose graph would be of another forward
                        times = _captured(calls, budget / total, failed)
                    else:
                        times = {}
                    for name, t in times.items():
                        base = times.get(FUNCTION) or times.get(who.BARE)
                        ratio = t.p50 / base.p50 if base else None
                        of = {"p50_ms": t.p50, "p20_ms": t.p20, "p80_ms": t.p80, "rounds": t.rounds}
                        results.add(row(name, **of, ratio_to_bare=ratio))
                    bar.update()

        for layer, found, xs, dys in measured:
            measure(layer, (1, SIZE, SIZE), found, xs, dys, modes=(HOT, COLD, CAPTURED) if cuda else (HOT, COLD))
        if cuda:
            return
        results.add(Row("host", "", "layer", "", "", mode=CAPTURED, note="not measured: CUDA graphs need a GPU"))
        try:
            import triton  # noqa: F401
        except ImportError as error:
            results.add(Row("host", "", "kernels", STUBBED, "", note=f"not measured: {error}"))
            return
        size = (KERNEL_SIZE, KERNEL_SIZE)
        for way, M in KERNEL_ROWS.items():
            case, seven = Case(*size, True, torch.bfloat16, device, R, U), _seven(KERNEL_SIZE, torch.bfloat16, device)
            ours = who.make(who.OURS, case.linear, case.factors)
            several = seven_layers(seven, (who.ALONE, who.OURS))
            for planned, stubbed in ((True, STUBBED), (False, UNPLANNED)):
                one = [Host(f"ours, {stubbed}", ours.forward, [ours.trains])]
                block_of = [Host(f"{p.name}, {stubbed}", p.forward, p.trains) for p in several]
                with launches_stubbed_out(planned=planned):
                    measure(f"layer, {way}", (M, *size), one, *case.operands(M, 1), "bf16")
                    (xs,), (dys,) = seven.operands(M)
                    measure(f"block of seven, {way}", (M, *size), block_of, xs, dys, "bf16")


def _seven(size: int, dtype: torch.dtype, device: torch.device) -> block.Case:
    """Seven layers of [size, size]."""
    shape = dict.fromkeys(block.NAMES, (size, size, False))
    return block.Case(shape, dtype, device, R, U, lambda size: 1)


def _captured(calls: Calls, budget: float, failed: Callable[[str, Exception], None]) -> dict[str, timing.Times]:
    """The host's part of a replay, for one of the calls in the graph."""
    replays = {}
    for p in calls.providers:
        call = calls.call(p)
        try:
            replays[p.name] = timing.captured(lambda call=call: [call() for _ in range(IN_A_GRAPH)]).replay
        except Exception as error:
            failed(p.name, error)
    return timing.alternate(replays, calls.between, 1, budget, CPU, each=IN_A_GRAPH, failed=failed)


@contextlib.contextmanager
def launches_stubbed_out(capability: tuple[int, int] = (9, 0), planned: bool = True) -> Iterator[list[str]]:
    """CPU tensors take the kernels' path as on a card of this capability, and a launch ends where the driver's would
    begin: nothing is compiled, nothing is computed, results are whatever memory held. Yields the kernels' names.

    Triton's own Python (binding of arguments, their specialisation, its cache, the launcher before its part in C) runs
    as it is: at every launch unless `planned`, else where kernels/launch.py does not go past it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from tinylora.kernels import launch as planning
    from tinylora.kernels import scratch
    from tinylora.nn.kept import Kept
    from tinylora.ops import dispatch, fused, ways
    from tinylora.ops import linear as operator

    launched: list[str] = []
    jitted: list[JITFunction] = []
    plain = ("num_ctas", "global_scratch_align", "profile_scratch_align")
    empty = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl", "gsan_enabled")
    box = {"swizzle": 3, "elem_size": 2, "elem_type": 1, "block_size": [64, 64], "fp4_padded": False}

    def compiled(self, key, signature, device, *_):
        name = self.fn.__name__
        launcher = object.__new__(CudaLauncher)
        boxes = [box for kind in signature.values() if isinstance(kind, str) and kind.startswith("tensordesc")]
        launcher.__dict__.update(dict.fromkeys(plain, 1) | dict.fromkeys(empty, 0))
        launcher.arg_annotations = launcher.kernel_signature = ()
        launcher.launch = wrap_handle_tensordesc(lambda *args: launched.append(name), signature, boxes)
        launch = object.__new__(CompiledKernel)
        launch.src, launch.name, launch.module, launch._module_pid = None, name, 0, None
        launch.function, launch.packed_metadata, launch._run = 0, (), launcher
        self.device_caches[device][0][key] = launch
        jitted.append(self)
        return launch

    @functools.cache
    def routed(device, dtype, *rest):
        return dispatch.route("cuda", dtype, (), rest[-1], capability, False, dispatch.triton_version())

    def computes(x, weight, down, core, up, batch_invariant):
        routed(x.device, weight.dtype, down.dtype, up.dtype, None if core is None else core.dtype, down.shape[0])
        return fused.invariant if batch_invariant else fused

    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: "stub",  # a key of Triton's caches
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: CPU,
        utils=SimpleNamespace(fill_tma_descriptor=lambda *_: None, fill_tma_descriptor_tiled=lambda *_: None),
    )
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, stub in (
                (JITFunction, "_do_compile", compiled),
                (ways, "capability_of", lambda device: capability),
                (fused, "interpreting", lambda: False),
                (ways, "interpreting", lambda: False),
                (ways, "remembers", lambda device: True),
                (scratch, "kept_by_stream", lambda device: True),
                (scratch, "_to_keep", lambda make: make()),
                (planning, "KNOWN", planned and planning.KNOWN),
                (operator, "computing", computes),
                (Kept, "pays", staticmethod(lambda x: True)),
            ):
                stack.enter_context(mock.patch.object(owner, name, stub))
            for kept in (ways.known, scratch._planes, scratch._counters, scratch._views):
                stack.enter_context(mock.patch.dict(kept, clear=True))
            yield launched
    finally:
        triton.runtime.driver._active = before
        for function in jitted:
            function.device_caches.pop("stub", None)
