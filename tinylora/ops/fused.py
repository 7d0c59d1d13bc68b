"""The operator through the Triton kernels: `eager`'s functions by the same names, the same numbers.

Both directions are one function, `matmul.linear`: dX = dY W + ((dY U) C) D is the operator on (Wᵀ, Uᵀ, Cᵀ, Dᵀ).
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from tinylora.kernels import tiles
from tinylora.kernels.core import Core
from tinylora.kernels.gemm import plan_gemm
from tinylora.kernels.gradients import plan_core_gradient, plan_factor_gradient
from tinylora.kernels.launch import Plan
from tinylora.kernels.thin import plan_thin
from tinylora.ops import eager
from tinylora.ops.dispatch import interpreting
from tinylora.ops.matmul import Operand, linear
from tinylora.ops.ways import fp32_setting, kernel_capability, kind, kind_of_core, known, precision, remembered

# Up to this many products r u the kernels mix C = Σᵢ vᵢ Pᵢ themselves, on the way; above, one launch does it.
MIXED_INSIDE = 512
MIXED_RANK = 32


def interpreter_has_bf16() -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 numbers: the kernels see fp32 there instead."""
    return False


def mixed_inside(core: Tensor | None, basis: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(core, basis) as the kernels take them: C in place of (v, P) where mixing inside would not be small."""
    if basis is None:
        return core, None
    u, r, _ = basis.shape[-3:]
    groups = basis.shape[0] if basis.dim() == 4 else 1
    if groups * r * groups * u <= MIXED_INSIDE and groups * r <= MIXED_RANK:
        return core, basis
    return eager.mix(core, basis), None


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
    """(Y, z) for x of [..., K]; `choice`, `pin` and `want_z` as in `matmul.linear`."""
    if x.is_cpu:
        if adapter_ids is not None:
            eager.check_ids(adapter_ids, core.shape[0])
        if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
            wide = (None if t is None else t.float() for t in (x, weight, down, core, up, bias))
            y, z = forward(*wide, adapter_ids, None if basis is None else basis.float(), choice, pin)
            return y.to(x.dtype), z
    elif elsewhere(x):
        with torch.cuda.device(x.device):
            return forward(x, weight, down, core, up, bias, adapter_ids, basis, choice, pin, want_z)
    core, basis = mixed_inside(core, basis)
    return linear(x, weight, down, Core(core, basis, adapter_ids), up, bias, choice, pin, want_z)


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
    if elsewhere(x):
        with torch.cuda.device(x.device):
            return add_low_rank(y, x, down, core, up, adapter_ids, basis)
    core = Core(*mixed_inside(core, basis), adapter_ids)
    if len(x) == 0:
        return torch.empty(0, len(down), dtype=torch.float32, device=x.device)
    set_to = fp32_setting()
    key = ("add", kind(y), kind(x), x.data_ptr() % 16, kind(down), kind(up), kind_of_core(core), set_to)
    way = known.get(key)
    if way is None:

        def make() -> tuple[Plan, Plan]:
            thin, expand = tiles.added(*x.shape, len(down), x.dtype, kernel_capability(x.device))
            reduce = plan_thin(x, down, core, thin, precision(), want_s=True)
            return reduce, plan_gemm(None, None, y, thin.width, up, None, expand, precision())

        way = remembered(key, x.device, make)
    reduce, finish = way
    z, s = reduce.run(x, down, core, True)
    finish.run(None, None, y, s, up, None)
    return z


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
    elif elsewhere(dy):
        with torch.cuda.device(dy.device):
            return backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, choice, pin)
    need_x, need_weight, need_down, need_core, need_up, need_bias = need
    dx = dweight = ddown = dcore = dup = dbias = None
    if z is not None and not z.is_contiguous():  # the torch path's z: the kernels' rows lie one after the other
        z = z.contiguous()
    values, own_basis = mixed_inside(core, basis)
    ours = Core(values, own_basis, adapter_ids)
    theirs = Core(values, own_basis, adapter_ids, transposed=True)
    dy = walkable(dy)

    def core_gradient(t):
        nonlocal dcore
        dcore = _core_gradient(t, z, core, ours, basis, dy.dtype)

    if need_x:
        dx, t = linear(dy, weight, up, theirs, down, None, choice, pin, use_z=core_gradient if need_core else None)
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
    elif elsewhere(first):
        with torch.cuda.device(first.device):
            return backward_of_parts(dys, z, weight, down, core, up, adapter_ids, basis, need_x, need_core, choice)
    dys = [walkable(dy) for dy in dys]
    if z is not None and not z.is_contiguous():
        z = z.contiguous()
    values, own_basis = mixed_inside(core, basis)
    theirs = Core(values, own_basis, adapter_ids, transposed=True)
    dx = dcore = None

    def core_gradient(t):
        nonlocal dcore
        dcore = _core_gradient(t, z, core, Core(values, own_basis, adapter_ids), basis, first.dtype)

    if need_x:
        x = dys[0] if len(dys) == 1 else dys
        dx, _ = linear(x, weight, up, theirs, down, None, choice, use_z=core_gradient if need_core else None)
    elif need_core:
        core_gradient(_thin_alone(dys, up, theirs))
    return dx, dcore


def elsewhere(t: Tensor) -> bool:
    """Whether t is on another card than the current one, on which Triton launches."""
    return t.is_cuda and t.device.index != torch.cuda.current_device()


def walkable(dy: Tensor) -> Tensor:
    """dy, or a copy of a gradient that autograd broadcast."""
    strides = dy.stride()
    return dy.contiguous() if strides[-1] != 1 or 0 in strides else dy


def _thin_alone(dy: Operand, up: Tensor, theirs: Core) -> Tensor:
    """t = dY U, where nobody asks for dX."""
    first = dy if isinstance(dy, Tensor) else dy[0]
    kinds = kind(dy) if first is dy else tuple(map(kind, dy))
    key = ("thin", kinds, kind(up), kind_of_core(theirs), fp32_setting())
    way = known.get(key)
    if way is None:
        tile = tiles.thin_tile(first.shape[0], *up.shape, first.dtype, kernel_capability(first.device))
        way = remembered(key, first.device, lambda: plan_thin(dy, up.T, theirs, tile, precision(), want_s=False))
    return way.run(dy, up, theirs)[0]


def _core_gradient(t: Tensor, z: Tensor, core: Tensor, ours: Core, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dC, or dv, in the core's dtype; `ours` is the core as the kernels take it, `dtype` dY's."""
    if ours.kind == "diagonal":  # few train one, and it is r sums
        dcore = eager.core_gradient(t, z, core, None)
    else:
        dcore = core_way(t, z, ours, dtype).run(t, z, ours)
    if basis is not ours.basis:
        dcore = eager.mix_gradient(dcore, basis)
    return dcore if dcore.dtype == core.dtype else dcore.to(core.dtype)


def core_way(t: Tensor, z: Tensor, ours: Core, dtype: torch.dtype) -> Plan:
    values, _, ids, _ = ours
    key = ("core", t.shape, t.device, kind_of_core(ours), dtype)
    way = known.get(key)
    if way is None:
        adapters = values.shape[0] if ids is not None else 1
        tile = tiles.core_gradient_tile(*t.shape, adapters, dtype, kernel_capability(t.device))
        way = remembered(key, t.device, lambda: plan_core_gradient(t, z, values.float(), ours, tile))
    return way


def _factor_gradient(z: Tensor, core: Core, x: Tensor, out: Tensor) -> None:
    """out [r, C] = sᵀ X for x [M, C]: dD from (t, X), dU transposed from (z, dY)."""
    key = ("factor", kind_of_core(core), kind(x), kind(out), fp32_setting())
    way = known.get(key)
    if way is None:
        tile = tiles.factor_gradient_tile(*x.shape, z.shape[1], x.dtype, kernel_capability(x.device))
        way = remembered(key, x.device, lambda: plan_factor_gradient(z, core, x, out, tile, precision()))
    way(z, core, x, out)


# The operator's two functions with rows that do not depend on each other (`batch_invariant=True`).
invariant = SimpleNamespace(forward=partial(forward, pin=True), backward=partial(backward, pin=True))
