"""The operator through the Triton kernels: the same two functions as `eager`, the same numbers.

Both directions are one function, `_linear`: dX = dY W + ((dY U) C) D is the operator on (Wᵀ, Uᵀ, Cᵀ, Dᵀ).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import tiles
from tinylora.kernels.core import Core
from tinylora.kernels.decode import decode
from tinylora.kernels.gemm import fits_descriptors, gemm
from tinylora.kernels.gradients import core_gradient, factor_gradient
from tinylora.kernels.thin import thin
from tinylora.ops import eager
from tinylora.ops.dispatch import capability_of, interpreting, triton_version

# Up to this many products r u the kernels mix C = Σᵢ vᵢ Pᵢ themselves, on the way; above, one launch does it.
MIXED_INSIDE = 512
MIXED_RANK = 32


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The card's, or None in the interpreter, whose tensors are a CPU's: others need not read the environment."""
    return None if device.type == "cpu" and interpreting() else capability_of(device)


def _current(device: torch.device):
    """Triton launches on the current device: a context in which that is the operands' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


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
    u, r, _ = basis.shape
    if r * u <= MIXED_INSIDE and r <= MIXED_RANK:
        return core, basis
    return eager.mix(core, basis), None


def _linear(
    x: Tensor | Sequence[Tensor],
    w: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None,
    choice: tiles.Choice | None = None,
    pin: bool = False,
) -> tuple[Tensor, Tensor]:
    """(Y, z) with Y = X Wᵀ + s Uᵀ + b, z = X Dᵀ in fp32, s = z Cᵀ; w, down and up may be transposed views.

    choice: forces what `tiles.choose` would decide. pin: one choice for every M, and for every layout of x.
    x may come in column blocks; then there is no bias.
    """
    xs = [x] if isinstance(x, Tensor) else x
    M, (N, K), r = xs[0].shape[0], w.shape, down.shape[0]
    dtype, device = xs[0].dtype, xs[0].device
    z = torch.empty(M, r, dtype=torch.float32, device=device)
    if M == 0:
        return xs[0].new_empty(0, N), z
    precision = _precision()
    if pin:
        # A view of x that bulk copies refuse must not take another path than its rows do elsewhere.
        if x.stride() != (K, 1) or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        choice = tiles.pinned(N, K, r, dtype, _capability(device), fits_descriptors(x, w), w.stride(1) != 1)
    elif choice is None:
        choice = tiles.choose(M, N, K, r, dtype, _capability(device), fits_descriptors(x, w), w.stride(1) != 1)
    s = None
    if choice.thin is not None:
        z, s = thin(x, down, core, choice.thin, precision, want_s=True)
    if choice.main is None:
        if len(xs) == 1:
            y = F.linear(xs[0], w, bias)
        else:
            parts = w.split([t.shape[1] for t in xs], 1)
            y = torch.mm(xs[0], parts[0].T)
            for t, part in zip(xs[1:], parts[1:], strict=True):
                y.addmm_(t, part.T)
        gemm(None, None, y, s, up, None, choice.expand, precision)
        return y, z
    y = torch.empty(M, N, dtype=dtype, device=device)
    if isinstance(choice.main, tiles.Decode):
        # Few rows: a copy of them is nothing beside W.
        decode(xs[0] if len(xs) == 1 else torch.cat(xs, 1), w, down, core, up, bias, y, z, s, choice.main, precision)
    else:
        if len(xs) > 1 and choice.main.descriptors and _one_loop_only(_capability(device)):
            x = torch.cat(xs, 1)
        gemm(x, w, y, s, up, bias, choice.main, precision)
    return y, z


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
) -> tuple[Tensor, Tensor]:
    """(Y, z) for x of [M, K]; `choice` and `pin` as in `_linear`."""
    if adapter_ids is not None and adapter_ids.device.type == "cpu":
        eager.check_ids(adapter_ids, core.shape[0])
    if x.is_cpu and x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
        wide = (None if t is None else t.float() for t in (x, weight, down, core, up, bias))
        y, z = forward(*wide, adapter_ids, None if basis is None else basis.float(), choice, pin)
        return y.to(x.dtype), z
    with _current(x.device):
        core, basis = _mixed_inside(core, basis)
        return _linear(x, weight, down, Core(core, basis, adapter_ids), up, bias, choice, pin)


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
    dY once, and only where they are needed. dW and db are the library's.
    """
    if dy.is_cpu and dy.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
        wide = (None if t is None else t.float() for t in (dy, x, z, weight, down, core, up))
        grads = backward(*wide, adapter_ids, None if basis is None else basis.float(), need, choice, pin)
        like = (dy, weight, down, core, up, dy)
        return tuple(None if g is None else g.to(t.dtype) for g, t in zip(grads, like, strict=True))
    with _current(dy.device):
        return _backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, choice, pin)


def _backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, choice, pin):
    need_x, need_weight, need_down, need_core, need_up, need_bias = need
    (M, N), r = dy.shape, down.shape[0]
    dx = dweight = ddown = dcore = dup = dbias = None
    values, own_basis = _mixed_inside(core, basis)
    ours = Core(values, own_basis, adapter_ids)
    theirs = Core(values, own_basis, adapter_ids, transposed=True)
    small = dy.is_cpu and interpreting()
    dy = _walkable(dy)
    if need_x:
        dx, t = _linear(dy, weight.T, up.T, theirs, down.T, None, choice, pin)
    elif need_down or need_core:
        tile = tiles.thin_tile(M, N, r, dy.dtype, _capability(dy.device))
        t, _ = thin(dy, up.T, theirs, tile, _precision(), want_s=False)
    if need_core:
        dcore = _core_gradient(t, z, core, ours, basis, dy.dtype)
    if need_down:
        ddown = torch.empty(down.shape, dtype=down.dtype, device=down.device)
        factor_gradient(t, theirs, x, ddown, tiles.factor_gradient_tile(M, x.shape[1], r, small), _precision())
    if need_up:
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        factor_gradient(z, ours, dy, dup.T, tiles.factor_gradient_tile(M, N, r, small), _precision())
    if need_weight:
        dweight = dy.T @ x
    if need_bias:
        dbias = dy.sum(0)
    return dx, dweight, ddown, dcore, dup, dbias


def backward_of_parts(dys, z, weight, down, core, up, adapter_ids, basis, need_x, need_core, choice=None):
    """(dX, dC or dv) of layers that share x, for dY whole or in column blocks; weight is all of theirs, [N, K].

    One launch for t and q, one matmul for dX, one launch for dC, however many layers there are.
    """
    if dys[0].is_cpu and dys[0].dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
        wide = (None if t is None else t.float() for t in (z, weight, down, core, up))
        basis = None if basis is None else basis.float()
        wide_dys = [dy.float() for dy in dys]
        dx, dcore = backward_of_parts(wide_dys, *wide, adapter_ids, basis, need_x, need_core, choice)
        return None if dx is None else dx.bfloat16(), None if dcore is None else dcore.to(core.dtype)
    with _current(dys[0].device):
        dys = [_walkable(dy) for dy in dys]
        (M, _), dtype, (N, _), r = dys[0].shape, dys[0].dtype, weight.shape, down.shape[0]
        values, own_basis = _mixed_inside(core, basis)
        theirs = Core(values, own_basis, adapter_ids, transposed=True)
        dx = dcore = None
        if need_x:
            dx, t = _linear(dys, weight.T, up.T, theirs, down.T, None, choice)
        else:
            tile = tiles.thin_tile(M, N, r, dtype, _capability(dys[0].device))
            t, _ = thin(dys, up.T, theirs, tile, _precision(), want_s=False)
        if need_core:
            dcore = _core_gradient(t, z, core, Core(values, own_basis, adapter_ids), basis, dtype)
        return dx, dcore


def _walkable(dy: Tensor) -> Tensor:
    """dy, or a copy of a gradient that autograd broadcast."""
    return dy.contiguous() if dy.stride(1) != 1 or 0 in dy.stride() else dy


def _core_gradient(t: Tensor, z: Tensor, core: Tensor, ours: Core, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    """dC, or dv, in the core's dtype; `ours` is the core as the kernels take it, `dtype` dY's."""
    M, r = t.shape
    adapters = core.shape[0] if ours.ids is not None else 1
    like, small = ours.values.float(), t.is_cpu and interpreting()
    dcore = core_gradient(t, z, like, ours, r, tiles.core_gradient_tile(M, r, adapters, dtype, small))
    return (eager.mix_gradient(dcore, basis) if ours.basis is None else dcore).to(core.dtype)


# The same two functions with rows that do not depend on each other (`batch_invariant=True`).
invariant = SimpleNamespace(forward=partial(forward, pin=True), backward=partial(backward, pin=True))
