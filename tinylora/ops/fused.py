"""The operator through the Triton kernels: `eager`'s functions by the same names, the same numbers.

Both directions are one function, `_linear`: dX = dY W + ((dY U) C) D is the operator on (Wᵀ, Uᵀ, Cᵀ, Dᵀ).
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import scratch, tiles
from tinylora.kernels.core import Core
from tinylora.kernels.decode import plan_decode
from tinylora.kernels.gemm import fits_descriptors, plan_gemm
from tinylora.kernels.gradients import plan_core_gradient, plan_factor_gradient
from tinylora.kernels.launch import Plan
from tinylora.kernels.thin import plan_thin
from tinylora.ops import eager
from tinylora.ops.dispatch import capability_of, interpreting, triton_version

# Up to this many products r u the kernels mix C = Σᵢ vᵢ Pᵢ themselves, on the way; above, one launch does it.
MIXED_INSIDE = 512
MIXED_RANK = 32


def kernel_capability(device: torch.device) -> tuple[int, int] | None:
    """The card's, or None in the interpreter, whose tensors are a CPU's: others need not read the environment."""
    return None if device.type == "cpu" and interpreting() else capability_of(device)


def _one_loop_only(capability: tuple[int, int] | None) -> bool:
    """Whether the long kernel must not take column blocks: of three loops in a row Triton 3.6 makes an empty kernel for
    10.0. 3.9 does not; the versions between were not looked at."""
    return capability is not None and capability[0] == 10 and triton_version() < (3, 9)


def _precision() -> str:
    """How fp32 operands are multiplied: as torch's own matmul setting allows, and never below tf32x3."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32x3"


def interpreter_has_bf16() -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 numbers: the kernels see fp32 there instead."""
    return False


def _mixed_inside(core: Tensor | None, basis: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(core, basis) as the kernels take them: C in place of (v, P) where mixing inside would not be small."""
    if basis is None:
        return core, None
    u, r, _ = basis.shape[-3:]
    groups = basis.shape[0] if basis.dim() == 4 else 1
    if groups * r * groups * u <= MIXED_INSIDE and groups * r <= MIXED_RANK:
        return core, basis
    return eager.mix(core, basis), None


# The kernels' steps along what is summed are int32: up to 256 numbers, this far apart.
FAR = 1 << 23

# How many kinds of x and dY are remembered around operands that stay.
KINDS = 64

Operand = Tensor | Sequence[Tensor]


class Way(NamedTuple):
    """How operands of one kind are computed.

    run:  a function of (x, w, down, core, up, bias, want_z, use_z), as `_linear`
    bind: a function of (w, down, core, up, bias), which stay, that gives a function of (x, want_z, use_z), or None
          where they cannot be bound; that function gives None where it could not launch
    """

    run: Callable[..., tuple[Tensor, Tensor | None]]
    bind: Callable[..., Callable | None] = lambda *_: None


# A model asks the same few questions at every call, unless it sees ever new numbers of rows.
WAYS = 4096
# What was found once and made ready to launch, by all that it depends on.
ways: dict[tuple, Callable] = {}


def _remembers(device: torch.device) -> bool:
    """On a card. On a CPU the interpreter takes seconds anyway, and tests put other tiles into it."""
    return device.type == "cuda"


def _remembered(key: tuple, device: torch.device, make: Callable[[], Callable]) -> Callable:
    """The way of this kind, from `make` if there is none yet."""
    way = make()
    if _remembers(device):
        if len(ways) >= WAYS:
            ways.clear()
        ways[key] = way
    return way


def _kind(t: Tensor | None) -> tuple | None:
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def _kind_of_core(core: Core) -> tuple:
    """Its strides are none of it: the kernels get it contiguous."""
    values, basis, ids, transposed = core
    return (
        None if values is None else (values.shape, values.dtype, values.device),
        None if basis is None else (basis.shape, basis.dtype, basis.device),
        None if ids is None else (ids.dtype, ids.device),
        transposed,
    )


def _linear(
    x: Operand,
    w: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None,
    choice: tiles.Choice | None = None,
    pin: bool = False,
    want_z: bool = True,
    use_z: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(Y, z) with Y = X Wᵀ + s Uᵀ + b, z = X Dᵀ in fp32, s = z Cᵀ, for x of [..., K]; z is None unless wanted.

    core.transposed: the same with (Wᵀ, Dᵀ, Uᵀ) for (W, D, U), which are given as they lie: views cost microseconds.
    choice: forces what `tiles.choose` would decide. pin: one choice for every M, and for every layout of x.
    x may come in column blocks; then there is no bias.
    use_z: is given z as soon as its launch is queued: what it launches then runs beside the matmul.
    """
    way = _way_of(x, w, down, core, up, bias, choice, pin)
    return way.run(x, w, down, core, up, bias, want_z, use_z)


def _way_of(x: Operand, w: Tensor, down: Tensor, core: Core, up: Tensor, bias: Tensor | None, choice=None, pin=False):
    """How `_linear` computes these operands: found once for each kind of them."""
    first = x if isinstance(x, Tensor) else x[0]
    # Whatever the way depends on, and whatever Triton's compiler specialises on, stands here (kernels/launch.py).
    key = (
        (first.shape, first.stride(), first.dtype, first.device, first.data_ptr() % 16 == 0)
        if first is x
        else tuple([(*_kind(t), t.data_ptr() % 16 == 0) for t in x]),
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        w.data_ptr() % 16 == 0,
        down.shape,
        down.stride(),
        down.dtype,
        down.device,
        up.stride(),
        up.dtype,
        up.device,
        _kind_of_core(core),
        None if bias is None else (bias.dtype, bias.device),
        torch.get_float32_matmul_precision(),
        choice,
        pin,
    )
    way = ways.get(key)
    if way is None:
        way = _remembered(key, first.device, lambda: _way(x, w, down, core, up, bias, choice, pin))
    return way


def _way(
    x: Operand,
    w: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None,
    choice: tiles.Choice | None,
    pin: bool,
) -> Way:
    """How `_linear` computes operands like these."""
    if core.transposed:
        w, down, up = w.T, down.T, up.T
    if max(t.stride(-1) for t in (x if isinstance(x, Tensor) else x[0], w, down)) >= FAR:

        def nearer(x, w, down, core, up, bias, want_z, use_z):
            x = x.contiguous() if isinstance(x, Tensor) else [t.contiguous() for t in x]
            return _linear(x, w.contiguous(), down.contiguous(), core, up, bias, choice, pin, want_z, use_z)

        return Way(nearer)
    xs = [x.reshape(-1, x.shape[-1])] if isinstance(x, Tensor) else list(x)
    shape = (*x.shape[:-1], w.shape[0]) if isinstance(x, Tensor) else (xs[0].shape[0], w.shape[0])
    M, (N, K), r = xs[0].shape[0], w.shape, down.shape[0]
    dtype, device = xs[0].dtype, xs[0].device
    if M == 0:

        def nothing(x, w, down, core, up, bias, want_z, use_z):
            z = torch.empty(0, r, dtype=torch.float32, device=device)
            if use_z is not None:
                use_z(z)
            return (x if isinstance(x, Tensor) else x[0]).new_empty(shape), z

        return Way(nothing)
    precision, capability = _precision(), kernel_capability(device)
    copies = isinstance(x, Tensor) and xs[0].data_ptr() != x.data_ptr()
    if pin:
        # A view of x that bulk copies refuse must not take another path than its rows do elsewhere.
        copies = copies or xs[0].stride() != (K, 1) or xs[0].data_ptr() % 16
        if copies:
            xs = [xs[0].new_empty(M, K)]
    rows = xs[0] if len(xs) == 1 else xs
    bulk, turned = fits_descriptors(rows, w), w.stride(1) != 1
    if pin:
        choice = tiles.pinned(N, K, r, dtype, capability, bulk, turned)
    elif choice is None:
        choice = tiles.choose(M, N, K, r, dtype, capability, bulk, turned, len(xs))
    # Few rows: a copy of them is nothing beside W.
    few = isinstance(choice.main, tiles.Decode)
    joined = len(xs) > 1 and (few or (choice.main and choice.main.descriptors and _one_loop_only(capability)))
    reduce = width = None
    if choice.thin is not None:
        reduce, width = plan_thin(rows, down, core, choice.thin, precision, want_s=True), choice.thin.width
    whole = xs[0].new_empty(M, K) if joined else rows  # what it will look like
    if few:
        finish = plan_decode(whole, w, down, core, up, bias, width, choice.main, precision)
    else:
        y = torch.empty(M, N, dtype=dtype, device=device)
        if choice.main is None:
            finish = plan_gemm(None, None, y, width, up, None, choice.expand, precision)
        else:
            finish = plan_gemm(whole, w, y, width, up, bias, choice.main, precision)
    library, transposed, one = choice.main is None, core.transposed, len(xs) == 1

    def way(x, w, down, core, up, bias, want_z, use_z):
        if copies:
            x = x.reshape(M, K)
            x = x.clone(memory_format=torch.contiguous_format) if pin else x
        # Before the thin pass: what comes after it may start with it, but for s, so all that it reads must be there.
        whole = torch.cat(tuple(x), 1) if joined else x
        y = _library(x, w.T if transposed else w, bias) if library else None
        z = s = None
        if reduce is not None:
            z, s = reduce.run(x, down, core, want_z)
            if use_z is not None:
                use_z(z)
        elif want_z:
            z = torch.empty((M, r), dtype=torch.float32, device=device)
        if library:
            finish.run(None, None, y, s, up, None)
            return y.resize_(shape) if copies else y, z
        y = (x if isinstance(x, Tensor) else x[0]).new_empty(shape)
        if few:
            finish.run(whole, w, down, core, up, bias, y, z, s)
            if use_z is not None and reduce is None:
                use_z(z)
        else:
            finish.run(whole, w, y, s, up, bias)
        return y, z

    def bind(w, down, core, up, bias):
        last = finish.bind(w, down, core, up, bias) if few else finish.bind(w, up, None if library else bias)
        first = None if reduce is None else reduce.bind(down, core)
        if last is None or (reduce is not None and first is None):
            return None
        tensors = bool(not few and not library and choice.main.descriptors)
        together = joined and few and first is None
        if joined and not together:
            return None
        by_library = (w.T if transposed else w), bias

        def bound(x, want_z, use_z):
            parts = (x,) if one else (torch.cat(tuple(x), 1),) if together else tuple(x)
            places = [t.data_ptr() for t in parts]
            for at in places:
                if at % 16:
                    return None
            places += [0] * (3 - len(places))
            y = _library(x, *by_library) if library else None
            z, s, at_s = None, None, 0
            if first is not None:
                found = first(*places, want_z)
                if found is None:
                    return None
                z, s = found
                at_s = s.data_ptr()
                if use_z is not None:
                    use_z(z)
            elif want_z:
                z = torch.empty((M, r), dtype=torch.float32, device=device)
            if y is None:
                y = parts[0].new_empty(shape)
            if few:
                done = last(places[0], y.data_ptr(), 0 if z is None else z.data_ptr(), at_s)
            elif tensors:
                done = last(*(*parts, 0, 0)[:3], y, at_s)
            else:
                done = last(*places, y.data_ptr(), at_s)
            if not done:
                return None
            if use_z is not None and first is None:
                use_z(z)
            return y, z

        return bound

    return Way(way) if copies else Way(way, bind)


def _library(x: Operand, w: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b by torch."""
    if isinstance(x, Tensor):
        return F.linear(x, w, bias)
    parts = w.split([t.shape[1] for t in x], 1)
    y = torch.mm(x[0], parts[0].T)
    for t, part in zip(x[1:], parts[1:], strict=True):
        y.addmm_(t, part.T)
    return y


def forward(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    choice: tiles.Choice | None = None,
    pin: bool = False,
    want_z: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """(Y, z) for x of [..., K]; `choice`, `pin` and `want_z` as in `_linear`."""
    if x.is_cpu:
        if adapter_ids is not None:
            eager.check_ids(adapter_ids, core.shape[0])
        if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
            wide = (None if t is None else t.float() for t in (x, weight, down, core, up, bias))
            y, z = forward(*wide, adapter_ids, None if basis is None else basis.float(), choice, pin)
            return y.to(x.dtype), z
    elif _elsewhere(x):
        with torch.cuda.device(x.device):
            return forward(x, weight, down, core, up, bias, adapter_ids, basis, choice, pin, want_z)
    core, basis = _mixed_inside(core, basis)
    return _linear(x, weight, down, Core(core, basis, adapter_ids), up, bias, choice, pin, want_z)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
) -> Tensor:
    """Y += ((X Dᵀ) Cᵀ) Uᵀ in place, for y [M, N] that something else has multiplied, and x [M, K]. Returns z [M, r]."""
    if _elsewhere(x):
        with torch.cuda.device(x.device):
            return add_low_rank(y, x, down, core, up, adapter_ids, basis)
    core = Core(*_mixed_inside(core, basis), adapter_ids)
    if len(x) == 0:
        return torch.empty(0, len(down), dtype=torch.float32, device=x.device)
    precision = torch.get_float32_matmul_precision()
    key = ("add", _kind(y), _kind(x), x.data_ptr() % 16, _kind(down), _kind(up), _kind_of_core(core), precision)
    way = ways.get(key)
    if way is None:

        def make() -> tuple[Plan, Plan]:
            thin, expand = tiles.added(*x.shape, len(down), x.dtype, kernel_capability(x.device))
            reduce = plan_thin(x, down, core, thin, _precision(), want_s=True)
            return reduce, plan_gemm(None, None, y, thin.width, up, None, expand, _precision())

        way = _remembered(key, x.device, make)
    reduce, finish = way
    z, s = reduce.run(x, down, core, True)
    finish.run(None, None, y, s, up, None)
    return z


class Bound:
    """`forward` and `backward_of_parts` around operands that stay, for x and dY of kinds that were seen before.

    What the kernels are handed of the operands, their addresses, is settled once. The operands' values are read anew
    at each call; that they still stand where they stood is the caller's to see. A call gives None where it has not
    learnt the kind, or something that it rests on is no more: then the long way computes it, and is learnt from.
    """

    def __init__(self, weight, down, core, up, bias, basis):
        self.operands = weight, down, up, bias
        values, own_basis = _mixed_inside(core, basis)
        # fp32 products follow torch's setting, which may change; C that is mixed by a launch of its own is a new one.
        self.possible = weight.dtype != torch.float32 and own_basis is basis
        self.core, self.turned = (Core(values, basis, None, transposed) for transposed in (False, True))
        self.ways: dict[tuple, Callable | None] = {}

    def forward(self, x: Tensor, want_z: bool) -> tuple[Tensor, Tensor | None] | None:
        """(Y, z), z None unless it is wanted."""
        run = self.ways.get((x.shape, x.stride(), x.dtype, x.device, want_z))
        return None if run is None or self._elsewhere(x) else run(x, want_z, None)

    def backward(self, dys: Sequence[Tensor], z: Tensor) -> tuple[Tensor, Tensor] | None:
        """(dX, dC or dv) from dY [M, N], in parts or whole."""
        run = self.ways.get(tuple([(dy.shape, dy.stride(), dy.dtype, dy.device) for dy in dys]))
        if run is None or not z.is_contiguous() or z.data_ptr() % 16:  # a hook on saved tensors may unpack others
            return None
        return None if self._elsewhere(z) else run(dys, z)

    @staticmethod
    def _elsewhere(t: Tensor) -> bool:
        """On another card than the current one, or while a graph is captured: its launches have planes of their own."""
        return _elsewhere(t) or not scratch.kept_by_stream(t.device)

    def learn(self, x: Tensor, want_z: bool) -> None:
        """From a forward of this kind that the long way has just computed."""
        key = x.shape, x.stride(), x.dtype, x.device, want_z
        if key in self.ways or not self._may_learn(x):
            return
        weight, down, up, bias = self.operands
        bind = _way_of(x, weight, down, self.core, up, bias).bind
        self.ways[key] = bind(weight, down, self.core, up, bias)

    def learn_backward(self, dys: Sequence[Tensor], z: Tensor) -> None:
        key = tuple([(dy.shape, dy.stride(), dy.dtype, dy.device) for dy in dys])
        if key in self.ways or not self._may_learn(z) or any(_walkable(dy) is not dy for dy in dys):
            return
        if self.core.kind in ("none", "diagonal") or self.core.values.dtype != torch.float32 or not z.is_contiguous():
            return
        weight, down, up, _ = self.operands
        x = dys[0] if len(dys) == 1 else dys
        matmul = _way_of(x, weight, up, self.turned, down, None).bind(weight, up, self.turned, down, None)
        gradient = _core_way(z, z, self.core, dys[0].dtype).bind(self.core)  # t is as z is

        def run(dys, z):
            dcore = None

            def use(t):
                nonlocal dcore
                dcore = gradient(t, z)

            found = matmul(dys[0] if len(dys) == 1 else dys, True, use)
            return None if found is None or dcore is None else (found[0], dcore)

        self.ways[key] = None if matmul is None or gradient is None else run

    def _may_learn(self, t: Tensor) -> bool:
        if len(self.ways) >= KINDS:  # of ever new shapes none comes again
            self.ways.clear()
        return self.possible and _remembers(t.device) and not torch.compiler.is_compiling() and not self._elsewhere(t)


def backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    need: tuple[bool, bool, bool, bool, bool, bool],
    choice: tiles.Choice | None = None,
    pin: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, down, core, up, bias), None where `need` is False; `eager.backward`'s formulas.

    dX with t comes from one call of the forward's kernels; dC reads t and z alone; dD reads X once and dU reads
    dY once, and only where they are needed. dW and db are the library's. dy [..., N], x [..., K] as the forward's.
    """
    if dy.is_cpu:
        if dy.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
            wide = (None if t is None else t.float() for t in (dy, x, z, weight, down, core, up))
            grads = backward(*wide, adapter_ids, None if basis is None else basis.float(), need, choice, pin)
            like = (dy, weight, down, core, up, dy)
            return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    elif _elsewhere(dy):
        with torch.cuda.device(dy.device):
            return backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, choice, pin)
    need_x, need_weight, need_down, need_core, need_up, need_bias = need
    dx = dweight = ddown = dcore = dup = dbias = None
    if z is not None and not z.is_contiguous():  # the torch path's z: the kernels' rows lie one after the other
        z = z.contiguous()
    values, own_basis = _mixed_inside(core, basis)
    ours = Core(values, own_basis, adapter_ids)
    theirs = Core(values, own_basis, adapter_ids, transposed=True)
    dy = _walkable(dy)

    def core_gradient(t):
        nonlocal dcore
        dcore = _core_gradient(t, z, core, ours, basis, dy.dtype)

    if need_x:
        dx, t = _linear(dy, weight, up, theirs, down, None, choice, pin, use_z=core_gradient if need_core else None)
    elif need_down or need_core:
        t = _thin_alone(dy.reshape(-1, dy.shape[-1]), up, theirs)
        if need_core:
            core_gradient(t)
    if need_weight or need_down or need_up or need_bias:
        dy = dy.reshape(-1, dy.shape[-1])
    if need_down:
        x = x.reshape(-1, x.shape[-1])
        ddown = torch.empty(down.shape, dtype=down.dtype, device=down.device)
        _factor_gradient(t, theirs, x, ddown)
    if need_up:
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        _factor_gradient(z, ours, dy, dup.T)
    if need_weight:
        dweight = dy.T @ x.reshape(-1, x.shape[-1])
    if need_bias:
        dbias = dy.sum(0)
    return dx, dweight, ddown, dcore, dup, dbias


def backward_of_parts(dys, z, weight, down, core, up, adapter_ids, basis, need_x, need_core, choice=None):
    """(dX, dC or dv) of layers that share x, for dY whole or in column blocks; weight is all of theirs, [N, K].

    One launch for t and q, one matmul for dX, one launch for dC, however many layers there are.
    """
    first = dys[0]
    if first.is_cpu:
        if first.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
            wide = (None if t is None else t.float() for t in (z, weight, down, core, up))
            basis = None if basis is None else basis.float()
            wide_dys = [dy.float() for dy in dys]
            dx, dcore = backward_of_parts(wide_dys, *wide, adapter_ids, basis, need_x, need_core, choice)
            return None if dx is None else dx.bfloat16(), None if dcore is None else dcore.to(core.dtype)
    elif _elsewhere(first):
        with torch.cuda.device(first.device):
            return backward_of_parts(dys, z, weight, down, core, up, adapter_ids, basis, need_x, need_core, choice)
    dys = [_walkable(dy) for dy in dys]
    if z is not None and not z.is_contiguous():
        z = z.contiguous()
    values, own_basis = _mixed_inside(core, basis)
    theirs = Core(values, own_basis, adapter_ids, transposed=True)
    dx = dcore = None

    def core_gradient(t):
        nonlocal dcore
        dcore = _core_gradient(t, z, core, Core(values, own_basis, adapter_ids), basis, first.dtype)

    if need_x:
        x = dys[0] if len(dys) == 1 else dys
        dx, _ = _linear(x, weight, up, theirs, down, None, choice, use_z=core_gradient if need_core else None)
    elif need_core:
        core_gradient(_thin_alone(dys, up, theirs))
    return dx, dcore


def _elsewhere(t: Tensor) -> bool:
    """Whether t is on another card than the current one, on which Triton launches."""
    return t.is_cuda and t.device.index != torch.cuda.current_device()


def _walkable(dy: Tensor) -> Tensor:
    """dy, or a copy of a gradient that autograd broadcast."""
    strides = dy.stride()
    return dy.contiguous() if strides[-1] != 1 or 0 in strides else dy


def _thin_alone(dy: Operand, up: Tensor, theirs: Core) -> Tensor:
    """t = dY U, where nobody asks for dX."""
    first = dy if isinstance(dy, Tensor) else dy[0]
    kinds = _kind(dy) if first is dy else tuple(map(_kind, dy))
    key = ("thin", kinds, _kind(up), _kind_of_core(theirs), torch.get_float32_matmul_precision())
    way = ways.get(key)
    if way is None:
        tile = tiles.thin_tile(first.shape[0], *up.shape, first.dtype, kernel_capability(first.device))
        way = _remembered(key, first.device, lambda: plan_thin(dy, up.T, theirs, tile, _precision(), want_s=False))
    return way.run(dy, up, theirs)[0]


def _core_gradient(t: Tensor, z: Tensor, core: Tensor, ours: Core, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dC, or dv, in the core's dtype; `ours` is the core as the kernels take it, `dtype` dY's."""
    if ours.kind == "diagonal":  # few train one, and it is r sums
        dcore = eager.core_gradient(t, z, core, None)
    else:
        dcore = _core_way(t, z, ours, dtype).run(t, z, ours)
    if basis is not ours.basis:
        dcore = eager.mix_gradient(dcore, basis)
    return dcore if dcore.dtype == core.dtype else dcore.to(core.dtype)


def _core_way(t: Tensor, z: Tensor, ours: Core, dtype: torch.dtype) -> Plan:
    values, _, ids, _ = ours
    key = ("core", t.shape, t.device, _kind_of_core(ours), dtype)
    way = ways.get(key)
    if way is None:
        adapters = values.shape[0] if ids is not None else 1
        tile = tiles.core_gradient_tile(*t.shape, adapters, dtype, kernel_capability(t.device))
        way = _remembered(key, t.device, lambda: plan_core_gradient(t, z, values.float(), ours, tile))
    return way


def _factor_gradient(z: Tensor, core: Core, x: Tensor, out: Tensor) -> None:
    """out [r, C] = sᵀ X for x [M, C]: dD from (t, X), dU transposed from (z, dY)."""
    key = ("factor", _kind_of_core(core), _kind(x), _kind(out), torch.get_float32_matmul_precision())
    way = ways.get(key)
    if way is None:
        tile = tiles.factor_gradient_tile(*x.shape, z.shape[1], x.dtype, kernel_capability(x.device))
        way = _remembered(key, x.device, lambda: plan_factor_gradient(z, core, x, out, tile, _precision()))
    way(z, core, x, out)


# The operator's two functions with rows that do not depend on each other (`batch_invariant=True`).
invariant = SimpleNamespace(forward=partial(forward, pin=True), backward=partial(backward, pin=True))
