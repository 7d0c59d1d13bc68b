"""`adapted_linear`: the one operator that every adapter runs through. Checks, autograd, tracing, autocast.

Eager calls on plain tensors go straight to the module that computes (`computing`): the dispatcher's
wrapper around a Python custom op costs tens of microseconds, as much as a small linear layer. Whatever looks
at the call from outside (torch.compile, torch.export, dispatch modes, tensor subclasses, autocast) meets
the custom op `tinylora::adapted_linear`, with the same two functions as its body.
"""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tinylora.ops import eager, invariant, reference
from tinylora.ops.backward import first_order, refuse_second_order
from tinylora.ops.checks import CAST, autocasts, check
from tinylora.ops.dispatch import TORCH, interpreting, route_of
from tinylora.ops.four_bit import Around, FourBit


def adapted_linear(
    x: Tensor,
    weight: Tensor | FourBit,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    *,
    basis: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ, without forming the adapted weight W + U C D.

    x:           [..., K], the dtype of weight
    weight:      [N, K], frozen or not; or a `FourBit`, which is frozen and has x's dtype wherever weight's is asked for
    down:        [r, K], any floating dtype
    core:        [r, r], or [r] for its diagonal, or None for the identity, or [A, r, r] with adapter_ids
    up:          [N, r], any floating dtype
    bias:        [N] or None, the dtype of weight
    adapter_ids: one integer per row of x ([M], or x's leading dimensions): row m uses core[adapter_ids[m]],
                 and -1 means no adapter
    basis:       [u, r, r], the frozen P of TinyLoRA: then core is v ([u], or [A, u]) and C = Σᵢ vᵢ Pᵢ
    batch_invariant: row m of Y and of dX has the same bits whatever the other rows are and however many, so that a
                 rollout's log-probabilities are the training forward's. Slower; the other gradients are sums over
                 all rows and depend on them
    returns      [..., N] in weight's dtype (under autocast: in autocast's)

    z = X Dᵀ and all that happens at rank r are fp32 (fp64 if an operand is). Gradients are computed for the
    operands that require them and for no other; when neither weight nor down does, the backward keeps z
    ([M, r]) and not x. With a zero core the result on a CPU is F.linear's, bit for bit.

    Raises ValueError, naming the operand, on shapes, dtypes, devices or ids that do not fit, and where
    batch_invariant cannot be had: on a GPU, for operands that no kernel takes. Ids are checked against A on a CPU
    only: a look at values on a GPU would stall it; there the kernels make a row whose id is out of range NaN.
    RuntimeError in a backward that is itself differentiated (create_graph=True).

    The operator is the common form of LoRA (arXiv 2106.09685), LoRA-XS (2405.17604) and TinyLoRA
    (2602.04118, section 4): each is a choice of (down, core, up).
    """
    like = weight.like(x) if isinstance(weight, FourBit) else weight
    check(x, like, down, core, up, bias, adapter_ids, basis)
    return unchecked(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant)


def unchecked(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant=False) -> Tensor:
    """`adapted_linear` for operands that are known to fit: a layer's own. Every microsecond here is paid per layer."""
    ids = None if adapter_ids is None else adapter_ids.reshape(-1)
    if type(weight) is FourBit:
        return _on_four_bits(x, weight, down, core, up, bias, ids, basis, batch_invariant)
    if seen_from_outside(x, weight, down, core, up):
        if by_torch_alone():
            return _by_formula(x, weight, down, core, up, bias, ids, basis)
        x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        y, _ = torch.ops.tinylora.adapted_linear(x2d, weight, down, core, up, bias, ids, basis, batch_invariant)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
    module = computing(x, weight, down, core, up, batch_invariant)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (core is not None and core.requires_grad)
        or down.requires_grad
        or up.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _AdaptedLinear.apply(x, weight, down, core, up, bias, ids, basis, module)
    return _run(module, x, weight, down, core, up, bias, ids, basis, False)[0]


def by_torch_alone() -> bool:
    """Whether plain torch must compute, for somebody who looks on and knows its calls alone: dual numbers, torch.func's
    transforms, which have no rule for the custom op, and torch.jit.trace, which makes constants of what kernels write.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and (  # there dynamo takes the first of these for true
        torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None
    )


def _by_formula(x, weight, down, core, up, bias, ids, basis) -> Tensor:
    """Y by plain torch, which differentiates it in every mode."""
    if autocasts(x.device.type):
        x, weight, bias = _as_autocast_would(x.device.type, x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            return _by_formula(x, weight, down, core, up, bias, ids, basis)
    dtype = eager.rank_dtype(x, down, up, core)
    wide = (None if t is None else t.to(dtype) for t in (x, weight, down, core, up, bias))
    basis = None if basis is None else basis.to(dtype)
    return reference.adapted_linear(*wide, ids, basis).to(x.dtype)


def _on_four_bits(x, weight: FourBit, down, core, up, bias, ids, basis, batch_invariant) -> Tensor:
    if seen_from_outside(x, x, down, core, up):  # which then sees W, and autograd keeps it
        return unchecked(x, weight.dense(x.dtype), down, core, up, bias, ids, basis, batch_invariant)
    module = Around(computing(x, x, down, core, up, batch_invariant), weight, batch_invariant)
    operands = x, None, down, core, up, bias, ids, basis
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands[:6]):
        return _AdaptedLinear.apply(*operands, module)
    return module.forward(*operands)[0]


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b, batch invariant: the operator, with a correction of rank 1 that is zero."""
    down, up = weight.new_zeros(1, weight.shape[1]), weight.new_zeros(weight.shape[0], 1)
    return adapted_linear(x, weight, down, None, up, bias, batch_invariant=True)


PLAIN = (Tensor, torch.nn.Parameter)


def plain(x: Tensor) -> bool:
    """Whether plain eager torch computes what is called now, on a plain x."""
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


def without_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def seen_from_outside(x, weight, down, core, up) -> bool:
    """Whether something other than plain eager torch must see one operator here."""
    return (
        not plain(x)
        or type(weight) not in PLAIN
        or (core is not None and type(core) not in PLAIN)
        or type(down) not in PLAIN
        or type(up) not in PLAIN
    )


def computing(x, weight, down, core, up, batch_invariant):
    """The module that computes these operands: `fused`, or where no kernel covers them `eager` or `invariant`."""
    if x.is_cpu and not interpreting():
        return invariant if batch_invariant else eager
    path, why = route_of(x, weight, down, core, up)
    if path == TORCH:
        if not batch_invariant:
            return eager
        if not x.is_cpu:
            raise ValueError(
                f"batch_invariant is True on {x.device}, but no kernel takes these operands ({why}), and the library's "
                "matmul rounds a row by how many there are: expected operands that the kernels take, or a CPU"
            )
        return invariant
    from tinylora.ops import fused  # here, because it imports Triton

    return fused.invariant if batch_invariant else fused


def _run(module, x, weight, down, core, up, bias, adapter_ids, basis, want_z):
    """(Y, z) by this module: torch's paths have z anyway, kernels leave it out."""
    if want_z or module is eager or module is invariant:
        return module.forward(x, weight, down, core, up, bias, adapter_ids, basis)
    return module.forward(x, weight, down, core, up, bias, adapter_ids, basis, want_z=False)


def by_operator(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant, want_z=True):
    module = computing(x, weight, down, core, up, batch_invariant)
    return _run(module, x, weight, down, core, up, bias, adapter_ids, basis, want_z)


def _backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, batch_invariant):
    module = computing(dy, weight, down, core, up, batch_invariant)
    return module.backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need)


def _saved(x, weight, down, core, up, adapter_ids, basis, z, need):
    """What the backward reads, and nothing more: x only where dW or dD is asked for, z only for dC or dU."""
    _, need_weight, need_down, need_core, need_up, _ = need
    return (
        x if need_weight or need_down else None,
        z if need_core or need_up else None,
        weight,
        down,
        core,
        up,
        adapter_ids,
        basis,
    )


def _gradients(ctx, dy):
    return *ctx.module.backward(dy, *ctx.saved_tensors, ctx.needs_input_grad[:6]), None, None, None


class _AdaptedLinear(torch.autograd.Function):
    """The eager call. The gradient of the gradient does not exist: a frozen layer's users never take it."""

    @staticmethod
    def forward(ctx, x, weight, down, core, up, bias, adapter_ids, basis, module):
        ctx.module = module
        y, z = module.forward(x, weight, down, core, up, bias, adapter_ids, basis)
        ctx.save_for_backward(*_saved(x, weight, down, core, up, adapter_ids, basis, z, ctx.needs_input_grad[:6]))
        return y

    backward = first_order(_gradients)


# --- the custom op: what torch.compile, torch.export and dispatch modes see -------------------------------

_DEVICES = ("cpu", "cuda")


@torch.library.custom_op("tinylora::adapted_linear", mutates_args=(), device_types=_DEVICES)
def _op(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    y, z = by_operator(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant)
    return y, z.contiguous()  # of one layout, whichever path made it: graphs know it beforehand


@_op.register_fake
def _(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant=False):
    z = x.new_empty(x.shape[0], down.shape[0], dtype=eager.rank_dtype(x, down))
    return x.new_empty(x.shape[0], weight.shape[0]), z


@torch.library.custom_op("tinylora::adapted_linear_backward", mutates_args=(), device_types=_DEVICES)
def _op_backward(
    dy: Tensor,
    x: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    need: list[bool],
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _backward(dy, x, z, weight, down, core, up, adapter_ids, basis, tuple(need), batch_invariant)
    # A schema has no optional outputs, and a graph knows their layout beforehand.
    return tuple(dy.new_empty(0) if g is None else g.contiguous() for g in grads)


@_op_backward.register_fake
def _(dy, x, z, weight, down, core, up, adapter_ids, basis, need, batch_invariant=False):
    M, (N, K) = dy.shape[0], weight.shape
    like = (
        ((M, K), dy.dtype),
        ((N, K), weight.dtype),
        (down.shape, down.dtype),
        ((0,) if core is None else core.shape, dy.dtype if core is None else core.dtype),
        (up.shape, up.dtype),
        ((N,), dy.dtype),
    )
    return tuple(
        dy.new_empty(shape, dtype=dtype) if asked else dy.new_empty(0)
        for asked, (shape, dtype) in zip(need, like, strict=True)
    )


def _setup_context(ctx, inputs, output):
    x, weight, down, core, up, _, adapter_ids, basis, ctx.batch_invariant = inputs
    need = ctx.needs_input_grad[:6]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*_saved(x, weight, down, core, up, adapter_ids, basis, output[1], need))


def _op_autograd(ctx, dy, _):
    refuse_second_order()
    need = list(ctx.needs_input_grad[:6])
    grads = torch.ops.tinylora.adapted_linear_backward(dy, *ctx.saved_tensors, need, ctx.batch_invariant)
    return (*(g if asked else None for g, asked in zip(grads, need, strict=True)), None, None, None)


_op.register_autograd(_op_autograd, setup_context=_setup_context)

# Autocast casts what F.linear would have cast (x, weight, bias) and leaves the factors alone: the core stays
# fp32. torch.library.register_autocast casts every operand to one fixed dtype, hence the kernels by hand.
_lib = torch.library.Library("tinylora", "IMPL")


def _as_autocast_would(device: str, *operands: Tensor | None) -> list[Tensor | None]:
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype in CAST else t for t in operands]


def _register_autocast(device: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def forward(x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant=False):
        x, weight, bias = _as_autocast_would(device, x, weight, bias)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.tinylora.adapted_linear(
                x, weight, down, core, up, bias, adapter_ids, basis, batch_invariant
            )

    def backward(*operands):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.ops.tinylora.adapted_linear_backward(*operands)

    _lib.impl("adapted_linear", forward, key)
    _lib.impl("adapted_linear_backward", backward, key)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
