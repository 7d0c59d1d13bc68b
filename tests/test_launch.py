"""A planned launch is the one that Triton's launcher would have made: the same compiled kernel, the same arguments.

No GPU: Triton's launcher runs up to the driver, where a stand-in for the compiled kernel writes down what it is handed.
"""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import triton
from lanes import INTERPRETED_AT_IMPORT, interpreter
from problems import Problem
from test_kernels import hold, surround
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from bench import host
from bench import providers as who
from tinylora.kernels import launch, scratch, tiles
from tinylora.ops import fused, ways
from tinylora.ops.bound import Bound

pytestmark = pytest.mark.skipif(INTERPRETED_AT_IMPORT, reason="TRITON_INTERPRET is set: Triton's launcher does not run")

f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "weight", "down", "core", "up", "bias", "ids", "basis")


class Recorded(list):
    """What compiled kernels were handed: (the kernel, the arguments of its `run`); `planned` of them not by Triton."""

    planned = 0


@contextmanager
def recorded():
    """Launches on CPU tensors as on a card, written down instead of made."""
    calls = Recorded()

    def compiled(self, key, signature, device, *_):
        kernel = object.__new__(CompiledKernel)
        kernel.src, kernel.name, kernel.module, kernel._module_pid = None, self.fn.__name__, 0, None
        kernel.function, kernel.packed_metadata = len(self.device_caches[device][0]), (4, 1, 0)
        kernel._run = lambda *arguments: calls.append((kernel, arguments))
        self.device_caches[device][0][key] = kernel
        return kernel

    def run(self, *args, **kwargs):
        calls.planned -= 1
        return through_triton(self, *args, **kwargs)

    through_triton, call = JITFunction.run, launch.Launch.__call__

    def counted(self, *tensors):
        calls.planned += 1
        return call(self, *tensors)

    with (
        host.launches_stubbed_out(),
        patch.object(JITFunction, "_do_compile", compiled),
        patch.object(JITFunction, "run", run),
        patch.object(launch.Launch, "__call__", counted),
    ):
        try:
            yield calls
        finally:
            for kernel in {id(k): k for k in KERNELS}.values():
                kernel.device_caches.pop("stub", None)


def _kernels():
    from tinylora.kernels import decode, gemm, gradients, thin

    return (
        decode.decode_kernel,
        thin.thin_kernel,
        gemm.gemm_kernel,
        gradients.core_gradient_kernel,
        gradients.factor_gradient_kernel,
    )


KERNELS = _kernels()


# An int from here on is an address: no number of these problems is as large, and a heap begins no lower, not even that
# of a Python that is loaded at a fixed address (Debian's).
ADDRESSES = 1 << 23


def seen(argument, names):
    """An argument of a launch, tensors and addresses alike: whose memory it is, or that it is our own."""
    if isinstance(argument, TensorDescriptor):
        rest = {
            k: tuple(v) if isinstance(v, list | torch.Size) else v for k, v in vars(argument).items() if k != "base"
        }
        return "descriptor", seen(argument.base, names), tuple(sorted(rest.items()))
    if argument is None:
        return names.get(0, 0)
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    if type(argument) is int and argument >= ADDRESSES:
        return names.get(argument, f"own, {argument % 16}")
    return argument


def handed(calls, operands):
    """Calls with every operand's address as its name."""
    names = {t.data_ptr(): name for name, t in operands.items() if t is not None}
    return [
        (kernel, *arguments[:4], *arguments[4:6], *(seen(a, names) for a in arguments[9:]))
        for kernel, arguments in calls
    ]


# --- operands of many kinds --------------------------------------------------------------------------------


def shifted(t):
    """The same numbers one element further: no multiple of 16 bytes any more."""
    room = t.new_empty(t.numel() + 1)[1:]
    return room.as_strided(t.shape, t.stride(), 1).copy_(t) if t.is_contiguous() else room.view(t.shape).copy_(t)


def wider(t):
    """The same numbers with room between the rows."""
    return t.new_zeros(*t.shape[:-1], t.shape[-1] + 8)[..., : t.shape[-1]].copy_(t)


def made(M, N=64, K=96, r=2, dtype=bf16, core="mixed", u=3, bias=True, adapters=3, **changes):
    """Operands by name; changes: a function for each that is not as `Problem` makes it."""
    operands, ids, basis = Problem(M, N, K, r, dtype, core=core, bias=bias, u=u, adapters=adapters).operands()
    found = dict(zip(NAMES, (*operands, ids, basis), strict=True))
    for name, change in changes.items():
        found[name.strip("_")] = change(found[name.strip("_")])
    return found


def to(dtype):
    return lambda t: t.to(dtype)


def ids(rows, dtype):
    return lambda _: torch.zeros(rows, dtype=dtype)


def by_columns(t):
    return t.t().contiguous().t()


# Each differs from the first of its number of rows in one thing that a launch depends on.
KINDS = [
    (rows, size, changes)
    for rows, size in ((5, {}), (400, {"N": 512, "K": 512}))
    for changes in (
        {},
        {"M": rows + 1},
        {"N": size.get("N", 64) + 8},
        {"x": to(f16)},
        {"x": wider},
        {"x": shifted},
        {"weight": to(f16)},
        {"weight": wider},
        {"weight": by_columns},
        {"weight": shifted},
        {"down": wider},
        {"down": by_columns},
        {"down": shifted},
        {"down": to(f32)},
        {"up": wider},
        {"up": by_columns},
        {"up": shifted},
        {"up": to(f32)},
        {"core_": to(bf16)},
        {"core_": shifted},
        {"basis": to(bf16)},
        {"basis": shifted},
        {"basis": lambda t: t.transpose(1, 2)},
        {"u": 4},
        {"r": 3},
        {"core_": lambda t: None, "basis": lambda t: None},
        {"core_": lambda t: None, "basis": lambda t: None, "up": by_columns},
        {"core_": lambda t: None, "basis": lambda t: None, "up": by_columns, "r": 3},
        {"basis": lambda t: None, "core_": lambda t: torch.randn(2, 2)},
        {"basis": lambda t: None, "core_": lambda t: torch.randn(3, 2, 2), "ids": ids(rows, torch.int64)},
        {"basis": lambda t: None, "core_": lambda t: torch.randn(3, 2, 2), "ids": ids(rows, torch.int32)},
        {"basis": lambda t: None, "core_": lambda t: torch.randn(4, 2, 2), "ids": ids(rows, torch.int32)},
        {"bias": False},
        {"bias_": shifted},
        {"bias_": to(f32)},
        {"dtype": f16},
        {"dtype": f32},
        {"x": lambda t: t[None]},
        {"x": lambda t: t.expand(2, *t.shape).transpose(0, 1)},
    )
]
KINDS += [
    (1, {}, {}),
    (1, {"N": 77, "K": 100}, {}),
    (5, {"r": 16}, {}),
    (5, {"r": 32, "core": "dense"}, {}),
    (5, {"r": 32, "core": "diagonal"}, {}),
    (5, {"r": 32, "core": "dense", "dtype": f32}, {}),
    (5, {"N": 16, "K": 16, "r": 16, "core": "dense", "bias": False}, {}),
    (200, {"N": 512, "K": 1 << 14}, {}),  # the library multiplies
]


def operands(kind):
    rows, size, changes = kind
    return made(**{"M": rows} | size | changes)


def step(given, calls, fresh=False, **options):
    """Forward and backward for all that trains: what was handed to the kernels, operands by name.

    fresh: no call knows of another.
    """
    x, weight, down, core, up, bias, ids, basis = (given[name] for name in NAMES)

    def run(function, *arguments, names=given, **more):
        if fresh:
            ways.known.clear()
        start = len(calls)
        results = function(*arguments, **more, **options)
        found.extend(handed(calls[start:], names))
        return results

    found = []
    run(fused.forward, x, weight, down, core, up, bias, ids, basis, want_z=False)
    y, z = run(fused.forward, x, weight, down, core, up, bias, ids, basis)
    dy, rows = torch.ones_like(y), x.reshape(-1, x.shape[-1])
    names = given | {"dy": dy, "z": z, "rows": rows}
    for need_x in (True, False):
        need = (need_x, False, True, core is not None, True, False)
        run(fused.backward, dy, rows, z, weight, down, core, up, ids, basis, need, names=names)
    return found


def again(given):
    """Other operands of the same kind."""
    twin = {}
    for name, t in given.items():
        if t is not None:
            own = t.untyped_storage().clone()
            t = torch.empty(0, dtype=t.dtype).set_(own, t.storage_offset(), t.shape, t.stride())
        twin[name] = t
    return twin


@pytest.mark.parametrize("options", [{}, {"pin": True}], ids=["", "pinned"])
def test_a_planned_launch_is_what_triton_would_have_made(options):
    """Every kind in one process, three times each, against a launch that remembers nothing."""
    with recorded() as calls:
        fresh = [step(operands(kind), calls, fresh=True, **options) for kind in KINDS]
        ways.known.clear()
        for kind in KINDS:
            step(operands(kind), calls, **options)
        for kind, want in zip(KINDS, fresh, strict=True):
            calls.planned = 0
            given = operands(kind)
            assert step(given, calls, **options) == want, kind
            assert step(again(given), calls, **options) == want, kind
            assert calls.planned == 2 * len(want), kind
        assert len({call[0] for want in fresh for call in want}) > 60  # they really are different kernels


def test_what_the_caller_asks_for_is_part_of_the_kind():
    """The matmul precision, one choice for every M, and a choice that is forced."""
    given = made(200, N=512, K=512, dtype=f32)
    usual, ways = tiles.default(200, 512, 512, 2, f32, (9, 0)), {"highest": {}, "high": {}, "pinned": {"pin": True}}
    for split in (1, 2):
        ways[f"split {split}"] = {"choice": replace(usual, thin=replace(usual.thin, split=split))}
    with recorded() as calls:
        found = {name: [] for name in ways}
        for _ in range(3):
            for name, options in ways.items():
                torch.set_float32_matmul_precision("high" if name == "high" else "highest")
                try:
                    found[name].append(step(given, calls, **options))
                finally:
                    torch.set_float32_matmul_precision("highest")
        assert all(each[0] == each[1] == each[2] for each in found.values())
        assert len({str(each[0]) for each in found.values()}) == len(found)
        for full, three in zip(found["highest"][0], found["high"][0], strict=True):
            assert (full == three) == (full[0].name == "core_gradient_kernel")  # which has a precision of its own


def test_siblings_gradients_in_parts():
    """dX of several gradients side by side: of widths that tell the plans apart, and at addresses that 16 divides or
    not."""
    with recorded() as calls:
        want, given = {}, made(200, N=512, K=512, r=4, core="dense")
        x, weight, down, core, up, bias, ids, basis = (given[name] for name in NAMES)
        wide, z = torch.ones(200, 512, dtype=bf16), torch.zeros(200, 4)
        for _ in range(3):
            for sizes in ((256, 128, 128), (128, 256, 128), (256, 256)):
                for whole in (wide, shifted(wide)):
                    dys = whole.split(sizes, 1)
                    start, before = len(calls), calls.planned
                    for _ in range(2):
                        fused.backward_of_parts(dys, z, weight, down, core, up, ids, basis, True, True)
                    found = handed(calls[start:], given | {f"dy {i}": t for i, t in enumerate(dys)} | {"z": z})
                    assert found == want.setdefault((sizes, whole is wide), found)
                    assert calls.planned - before >= len(found) // 2
        assert len({tuple(map(str, found)) for found in want.values()}) == 6


BOUND = {
    "one row": {},
    "a split of K": {"N": 512, "K": 1024},
    "no bias": {"bias": False},
    "C itself": {"core": "dense"},
    "its diagonal": {"core": "diagonal"},
    "fp16": {"dtype": f16},
    "a batch": {"M": 8},
    "decode in two launches": {"M": 8, "r": 16},
    "bulk copies": {"M": 384, "N": 512, "K": 512},
    "addresses": {"M": 384, "N": 544, "K": 512, "weight": wider, "x": wider},
    "the library": {"M": 256, "N": 512, "K": 64},
}


def bindable(M=1, **changes):
    """Operands by name, and what binds them."""
    given = made(M, **changes)
    return given, Bound(*(given[n] for n in ("weight", "down", "core", "up", "bias", "basis")))


@pytest.mark.parametrize("parts", [1, 2], ids=["one layer", "siblings"])
@pytest.mark.parametrize("changes", BOUND.values(), ids=BOUND)
def test_a_bound_launch_is_handed_what_a_planned_one_is(changes, parts):
    """Forward with z and without, and backward; on another stream, too, whose planes are others."""
    with recorded() as calls:
        given, bound = bindable(**changes)
        x, weight, down, core, up, bias, _, basis = (given[n] for n in NAMES)
        dys = list(torch.randn(len(x), len(weight), dtype=x.dtype).split(len(weight) // parts, 1))
        z = torch.zeros(len(x), down.shape[0])

        def launched(call):
            """What a call's launches are handed, and what it returns."""
            start = len(calls)
            found = call()
            named = given | {f"dy {i}": t for i, t in enumerate(dys)} | {"z": z}
            return handed(calls[start:], named), found

        def forward(want_z):
            return fused.forward(x, weight, down, core, up, bias, None, basis, want_z=want_z)

        def backward():
            return fused.backward_of_parts(dys, z, weight, down, core, up, None, basis, True, True)

        for want_z in (False, True):
            forward(want_z)
            want, (y, own_z) = launched(lambda w=want_z: forward(w))
            assert bound.forward(x, want_z) is None
            bound.learn(x, want_z)
            found, (other, other_z) = launched(lambda w=want_z: bound.forward(x, w))
            assert found == want and len(found) > 0
            if len(found) == 2:  # the s that the thin pass writes is what the second launch reads
                (_, writes), (second, reads) = calls[-2:]
                assert writes[9 + 8] == reads[9 + (8 if second.name == "decode_kernel" else 5)]
            assert (other.shape, other.dtype, other.stride()) == (y.shape, y.dtype, y.stride())
            assert (other_z is None) == (not want_z) and (not want_z or other_z.shape == own_z.shape)
        backward()
        want, (dx, dcore) = launched(backward)
        assert bound.backward(dys, z) is None
        bound.learn_backward(dys, z)
        # Parts that are put together first, for two launches, and a diagonal's gradient: the long way.
        if changes.get("core") == "diagonal" or (parts > 1 and (changes.get("r") == 16 or changes.get("N") == 544)):
            assert bound.backward(dys, z) is None
            return
        found, (other, other_core) = launched(lambda: bound.backward(dys, z))
        assert sorted(map(str, found)) == sorted(map(str, want)) and len(found) > 1
        assert (other.shape, other.dtype, other_core.shape) == (dx.shape, dx.dtype, dcore.shape)

        def addresses(call):
            start = len(calls)
            call()
            return [[a for a in handed_to[9:] if type(a) is int and a >= ADDRESSES] for _, handed_to in calls[start:]]

        here = [addresses(lambda: bound.forward(x, False)) for _ in range(2)]
        with patch.object(triton.runtime.driver.active, "get_current_stream", lambda device=None: 7):
            there = addresses(lambda: bound.forward(x, False))
            assert calls[-1][1][3] == 7
        planes = calls[-1][0].name == "decode_kernel"
        assert not planes or (here[0][-1][-3:] == here[1][-1][-3:] != there[-1][-3:])


@pytest.mark.parametrize("name", [who.ALONE, who.OURS])
@pytest.mark.parametrize("M", [1, 8, 200, 512])
def test_from_the_third_step_on_every_launch_of_a_block_is_bound(M, name, monkeypatch):
    """With gradients and without, whatever came before: of siblings and of layers alone, in both directions."""
    case = host._seven(512, bf16, torch.device("cpu"))
    others: list[str] = []
    call = launch.Launch.__call__

    def counted(self, *tensors):
        others.append(self.kernel.__name__)
        return call(self, *tensors)

    monkeypatch.setattr(launch.Launch, "__call__", counted)
    with recorded() as calls:
        (provider,) = host.seven_layers(case, (name,))
        for graded in (True, False, True):
            (xs,), (dys,) = case.operands(M)
            for _ in range(4):
                others.clear()
                start = len(calls)
                if graded:
                    torch.autograd.grad(provider.forward(*xs), [*xs, *provider.trains], dys)
                else:
                    with torch.no_grad():
                        provider.forward(*xs)
            assert not others and len(calls) - start >= 4


def test_what_cannot_be_bound_goes_the_long_way():
    with recorded() as calls:
        for changes in (
            {"dtype": f32},  # torch's setting for products
            {"core": "mixed", "u": 600},  # C is mixed by a launch of its own
            {"weight": shifted},  # not aligned
        ):
            given, bound = bindable(**changes)
            x, weight, down, core, up, bias, _, basis = (given[n] for n in NAMES)
            fused.forward(x, weight, down, core, up, bias, None, basis, want_z=False)
            bound.learn(x, False)
            assert bound.forward(x, False) is None, changes
        given, bound = bindable()
        x, weight, down, core, up, bias, _, basis = (given[n] for n in NAMES)
        bound.learn(x, False)
        assert bound.forward(x, False) is None  # nothing was compiled yet
        given, bound = bindable()
        x, weight, down, core, up, bias, _, basis = (given[n] for n in NAMES)
        fused.forward(x, weight, down, core, up, bias, None, basis, want_z=False)
        bound.learn(x, False)
        before = len(calls)
        for other in (shifted(x), x.expand(3, -1), x.float()):
            assert bound.forward(other, False) is None
        assert bound.forward(x, True) is None and bound.backward([x], x) is None
        with hooked(knobs.runtime.launch_enter_hook):
            assert bound.forward(x, False) is None
        with patch.object(scratch, "kept_by_stream", lambda device: False):  # a graph is captured
            assert bound.forward(x, False) is None
        assert len(calls) == before and bound.forward(x, False) is not None and len(calls) == before + 1
        z, dys = torch.zeros(len(x), down.shape[0]), [torch.ones(len(x), len(weight), dtype=x.dtype)]
        fused.backward_of_parts(dys, z, weight, down, core, up, None, basis, True, True)
        bound.learn_backward(dys, z)
        before, M = len(calls), len(x)
        for other in (shifted(z), torch.zeros(down.shape[0], 2 * M).T[::2]):  # as a hook on saved tensors may
            assert other.shape == z.shape and bound.backward(dys, other) is None
        assert len(calls) == before and bound.backward(dys, z) is not None


@pytest.mark.parametrize("name", NAMES)
def test_an_operand_on_another_device_is_another_kind(name):
    """A planned launch hands over bare addresses, and nobody asks any more whose they are."""
    with recorded():
        given = made(5, core="mixed-rows")
        fused.forward(*(given[n] for n in NAMES))
        before = len(ways.known)
        with patch.object(fused.eager, "check_ids", lambda *_: None):  # it reads them on a CPU
            fused.forward(*((given | {name: given[name].to("meta")})[n] for n in NAMES))
        assert len(ways.known) == before + 1


# --- when Triton's launcher must be asked -------------------------------------------------------------------


@contextmanager
def hooked(chain):
    chain.add(print_nothing)
    try:
        yield
    finally:
        chain.remove(print_nothing)


def print_nothing(*_, **__):
    pass


@pytest.mark.parametrize(
    "looking",
    [
        lambda: hooked(knobs.runtime.launch_enter_hook),
        lambda: hooked(knobs.runtime.launch_exit_hook),
        lambda: patch.object(knobs.runtime, "launch_enter_hook", None),
        lambda: patch.object(knobs.runtime, "debug", True),
        lambda: patch.object(knobs.compilation, "instrumentation_mode", "fpsan"),
        lambda: patch.object(KERNELS[0], "pre_run_hooks", [print_nothing]),
        lambda: patch.object(launch, "KNOWN", False),
    ],
    ids=["enter", "exit", "no chain", "debug", "instrumented", "pre-run", "unknown Triton"],
)
def test_who_looks_at_launches_sees_them(looking):
    given = made(5)
    with recorded() as calls:

        def planned():
            calls.planned = 0
            for _ in range(2):
                fused.forward(*(given[n] for n in NAMES))
            return calls.planned

        with looking():
            assert planned() == 0
        if looking is not None:
            ways.known.clear()
        assert planned() == 1  # the second
        assert planned() == 2
        with looking():
            assert planned() in (0, 2 * (not launch.KNOWN))
        assert planned() == 2


def test_another_driver_is_asked_anew():
    given = made(5)
    with recorded() as calls:
        for _ in range(2):
            fused.forward(*(given[n] for n in NAMES))
        assert calls.planned == 1
        own = triton.runtime.driver.active
        triton.runtime.driver.set_active(type(own)(**vars(own)))
        fused.forward(*(given[n] for n in NAMES))
        assert calls.planned == 1


def test_a_value_changed_in_place_needs_no_new_plan_and_another_tensor_neither():
    with recorded() as calls:
        given = made(5)
        step(given, calls)
        given["core"].data.mul_(2)
        calls.planned = 0
        found = step(given, calls)
        assert calls.planned == len(found)
        given["core"] = given["core"].clone()
        assert step(given, calls) == found and calls.planned == 2 * len(found)
        address = given["core"].data_ptr()
        assert any(address in arguments for _, arguments in calls[-len(found) :])


def test_a_plan_keeps_no_operand_alive():
    with recorded() as calls:
        for kind in (KINDS[0], (200, {"N": 512, "K": 512}, {}), (0, {}, {})):
            given = operands(kind)
            for _ in range(2):
                y, z = fused.forward(*(given[n] for n in NAMES))
                fused.backward(y, None, z, *(given[n] for n in ("weight", "down", "core", "up", "ids", "basis")),
                               (True, False, False, kind[0] > 0, False, False))  # fmt: skip
            calls.clear()
            watched = [weakref.ref(t) for t in (*given.values(), y, z) if t is not None]
            del given, y, z
            gc.collect()
            assert not any(ref() is not None for ref in watched)


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(5, 77, 100, 3, bf16, core="mixed-rows"),
        Problem(33, 40, 72, 13),
        Problem(130, 72, 104, 2, f16, core="mixed"),
        Problem(130, 77, 105, 3, core="rows"),
        Problem(40, 40, 72, 40, core="mixed", u=20),
    ],
    ids=lambda p: p.id,
)
def test_a_way_serves_other_operands_of_its_kind(problem, poison_empty):
    """Numbers and gradients through the interpreter, by ways that were found for other tensors."""
    with interpreter(), patch.object(ways, "remembers", lambda device: True), patch.dict(ways.known, clear=True):
        hold(problem)
        found = len(ways.known)
        hold(problem)
        assert found == len(ways.known) > 1
        if problem.M < 100:
            hold(problem, layout=surround)
            assert len(ways.known) > found


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("M", [6, 132])
def test_x_in_three_dimensions(M, poison_empty):
    """The kernels write Y of x's own shape: the same numbers as row by row, without a view in autograd's books."""
    from tinylora.ops import adapted_linear

    (x, *rest), _, _ = Problem(M, 40, 72, 3).operands()
    with interpreter():
        leaves = [t.requires_grad_() for t in (x, *rest)]
        flat = adapted_linear(*leaves)
        want = torch.autograd.grad(flat.square().sum(), leaves)
        for deep in (
            x.view(2, M // 2, 72),
            x.detach().view(2, M // 2, 72).transpose(0, 1).contiguous().transpose(0, 1),
        ):
            y = adapted_linear(deep, *leaves[1:])
            assert y.shape == (2, M // 2, 40) and not y._is_view()
            assert torch.equal(y.view(M, 40), flat)
            if deep.requires_grad:
                got = torch.autograd.grad(y.square().sum(), leaves)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with torch.no_grad():
            assert torch.equal(adapted_linear(x.view(2, M // 2, 72), *rest).view(M, 40), flat)


# --- what launches share ------------------------------------------------------------------------------------


@contextmanager
def streams():
    """A card's streams on a CPU: `now` is the current one, None while a graph is captured."""
    now = [1]
    driver = type("Driver", (), {"get_current_stream": lambda self, device: now[0]})()
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with (
            patch.object(scratch, "kept_by_stream", lambda device: now[0] is not None),
            patch.object(scratch, "_to_keep", lambda make: make()),
            patch.dict(scratch._planes, clear=True),
            patch.dict(scratch._views, clear=True),
        ):
            yield now
    finally:
        triton.runtime.driver._active = before


def test_launches_on_one_stream_share_their_scratch_and_no_others_do():
    cpu = torch.device("cpu")
    with streams() as now:
        first = scratch.workspace(cpu, (5, 30), 7)
        assert [t.numel() for t in first] == [5, 30, 7] and not first[2].any()
        assert all(a is b for a, b in zip(first, scratch.workspace(cpu, (5, 30), 7), strict=True))
        places = {t.data_ptr() for t in first}
        a, b, _ = first
        assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0 and b.data_ptr() >= a.data_ptr() + a.nbytes
        now[0] = 2
        assert places.isdisjoint(t.data_ptr() for t in scratch.workspace(cpu, (5, 30), 7))
        now[0] = None
        captured = scratch.workspace(cpu, (5, 30), 7)
        assert places.isdisjoint(t.data_ptr() for t in captured)
        assert not any(a is b for a, b in zip(captured, scratch.workspace(cpu, (5, 30), 7), strict=True))
        now[0] = 1
        (larger,) = scratch.workspace(cpu, (1 << 17,), 0)
        assert larger.numel() == 1 << 17 and larger.data_ptr() == scratch._planes[cpu, 1].data_ptr()
        again = scratch.workspace(cpu, (5, 30), 7)
        assert again[0].data_ptr() == larger.data_ptr()  # nothing holds the smaller buffer
        (huge,) = scratch.workspace(cpu, (scratch.KEPT + 1,), 0)
        assert huge.data_ptr() != larger.data_ptr() and len(scratch._planes[cpu, 1]) == 1 << 17
        assert scratch.workspace(cpu, (scratch.KEPT + 1,), 0)[0] is not huge


def test_counters_of_a_captured_launch_lie_as_those_of_an_eager_one(monkeypatch):
    """Triton compiles another kernel for a pointer that 16 does not divide, which within a capture comes too late."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with patch.dict(scratch._captured, {device: (torch.zeros(16, dtype=torch.int32), 0)}):
        found = [scratch.counters(n, device) for n in (3, 1, 5, 3)]
    assert [t.numel() for t in found] == [3, 1, 5, 3]
    assert found[3].data_ptr() == found[0].data_ptr() != found[1].data_ptr()  # the buffer is full, and begins anew
    assert all((t.data_ptr() - found[0].data_ptr()) % 16 == 0 for t in found)
