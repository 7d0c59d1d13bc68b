"""The operator through the Triton kernels: the same two functions as `eager`, the same numbers.

Both directions are one function, `_linear`: dX = dY W + ((dY U) C) D is the operator on (Wᵀ, Uᵀ, Cᵀ, Dᵀ).
"""

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
from tinylora.ops.dispatch import capability_of, interpreting

# Up to this many products r u the kernels mix C = Σᵢ vᵢ Pᵢ themselves, on the way; above, one launch does it.
MIXED_INSIDE = 512
MIXED_RANK = 32


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The card's, or None in the interpreter."""
    return None if interpreting() else capability_of(device)


def _current(device: torch.device):
    """Triton launches on the current device: a context in which that is the operands' one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


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
    x: Tensor,
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
    """
    (M, K), N, r = x.shape, w.shape[0], down.shape[0]
    z = torch.empty(M, r, dtype=torch.float32, device=x.device)
    if M == 0:
        return x.new_empty(0, N), z
    precision = _precision()
    if pin:
        # A view of x that bulk copies refuse must not take another path than its rows do elsewhere.
        if x.stride() != (K, 1) or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        choice = tiles.pinned(N, K, r, x.dtype, _capability(x.device), fits_descriptors(x, w), w.stride(1) != 1)
    elif choice is None:
        choice = tiles.choose(M, N, K, r, x.dtype, _capability(x.device), fits_descriptors(x, w), w.stride(1) != 1)
    s = None
    if choice.thin is not None:
        z, s = thin(x, down, core, choice.thin, precision, want_s=True)
    if choice.main is None:
        y = F.linear(x, w, bias)
        gemm(None, None, y, s, up, None, choice.expand, precision)
        return y, z
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if isinstance(choice.main, tiles.Decode):
        decode(x, w, down, core, up, bias, y, z, s, choice.main, precision)
    else:
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
    if x.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
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
    if dy.dtype == torch.bfloat16 and interpreting() and not interpreter_has_bf16():
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
    small = interpreting()
    if dy.stride(1) != 1 or 0 in dy.stride():  # a gradient that autograd broadcast
        dy = dy.contiguous()
    if need_x:
        dx, t = _linear(dy, weight.T, up.T, theirs, down.T, None, choice, pin)
    elif need_down or need_core:
        tile = tiles.thin_tile(M, N, r, dy.dtype, _capability(dy.device))
        t, _ = thin(dy, up.T, theirs, tile, _precision(), want_s=False)
    if need_core:
        adapters = core.shape[0] if adapter_ids is not None else 1
        like = values if values.dtype == torch.float32 else values.float()
        tile = tiles.core_gradient_tile(M, r, adapters, dy.dtype, small)
        dcore = core_gradient(t, z, like, ours, r, tile)
        dcore = (eager.mix_gradient(dcore, basis) if own_basis is None else dcore).to(core.dtype)
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


# The same two functions with rows that do not depend on each other (`batch_invariant=True`).
invariant = SimpleNamespace(forward=partial(forward, pin=True), backward=partial(backward, pin=True))
