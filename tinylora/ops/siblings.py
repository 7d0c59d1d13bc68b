"""One input, several frozen weights: q, k, v of an attention, gate and up of an MLP, as one operator.

    Y_i = X W_iᵀ + b_i + ((X Dᵀ) Cᵀ) U_iᵀ,   i = 1 .. G

is `adapted_linear` on W = [W_1; ..; W_G] and U = [U_1; ..; U_G]: X is read once for z, the matmul is one wide one where
the weights lie side by side in memory, and dX = Σ_i dY_i W_i + q D is formed once, so that autograd adds nothing. The
weights come in parts, because a module owns each; where they do not lie side by side they are multiplied in parts.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinylora.ops import eager, linear
from tinylora.ops.backward import first_order, refuse_second_order


def adapted_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    down: Tensor,
    core: Tensor | Sequence[Tensor] | None,
    up: Tensor,
    biases: Sequence[Tensor],
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    sizes: Sequence[int] | None = None,
    kept=None,
) -> tuple[Tensor, ...]:
    """(Y_1, .., Y_G), each [..., N_i], for operands that are known to fit: those of layers.

    x:       [..., K]
    weights: each [N_i, K], frozen; or all of them as one, with sizes
    down:    [R, K], frozen; up: [N_1 + .. + N_G, R], frozen
    core:    as `adapted_linear` takes it, or the layers' own: each one's v, or its block of C
    basis:   as `adapted_linear` takes it; or [G, u, r, r], the layers' own P, where each has r = R / G ranks and u
             numbers of its own: then C has G blocks on its diagonal
    biases:  each [N_i], frozen, or all as one, or none at all
    sizes:   N_1 .. N_G
    kept:    computes with operands that were found before (nn/kept.py), and has seen that nobody looks on

    Gradients are computed for x and core. The results are slices of one buffer: their rows are strided.
    """
    cores = [core] if core is None or isinstance(core, Tensor) else core
    sizes = [w.shape[0] for w in weights] if sizes is None else sizes
    ids = None if adapter_ids is None else adapter_ids.reshape(-1)
    if kept is None and linear.seen_from_outside(x, weights[0], down, cores[0], up):
        x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        core = _one_core(cores, basis)
        y, _ = torch.ops.tinylora.adapted_linears(x2d, list(weights), down, core, up, list(biases), ids, basis)
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])
        # Each a view of its own: of several that one call gives, none may be changed in place.
        ends = itertools.accumulate(sizes)
        return tuple([y.narrow(-1, end - n, n) for end, n in zip(ends, sizes, strict=True)])
    elif torch.is_grad_enabled() and (x.requires_grad or any(c is not None and c.requires_grad for c in cores)):
        return _AdaptedLinears.apply(x, _Frozen(weights, down, up, biases, ids, basis, sizes, kept), *cores)
    else:
        found = None if kept is None else kept.forward(x, False)
        y, _ = found or _forward(x, weights, down, _one_core_apart(cores, basis), up, biases, ids, basis, want_z=False)
        if kept is not None and found is None:
            kept.learn(x, False)
    if len(sizes) == 1:
        return (y,)
    parts = y.split_with_sizes(sizes, -1)
    # Views of one call may not be changed in place where gradients are recorded, as any layer's output may.
    return tuple([part.data for part in parts]) if torch.is_grad_enabled() else parts


def _one_core(cores: Sequence[Tensor | None], basis: Tensor | None) -> Tensor | None:
    """The group's core from the layers': [v_1 | .. | v_G], or a C of blocks."""
    if len(cores) == 1:
        return cores[0]
    return torch.block_diag(*cores) if basis is None else torch.cat(tuple(cores), -1)


def _one_core_apart(cores: Sequence[Tensor | None], basis: Tensor | None) -> Tensor | None:
    """`_one_core` outside autograd's books: without a copy where every v lies in one storage."""
    if len(cores) > 1 and basis is not None and cores[0].dim() == 1:
        core = joined(cores)
        if core is not None:
            return core
    return _one_core(cores, basis)


def _their_cores(dcore: Tensor, cores: Sequence[Tensor | None], basis: Tensor | None) -> Sequence[Tensor]:
    """The layers' gradients from the group's: `_one_core` backwards."""
    if len(cores) == 1:
        return (dcore,)
    sizes = [c.shape[-1] for c in cores]
    if basis is not None:
        return dcore.split_with_sizes(sizes, -1)
    ends = itertools.accumulate(sizes)
    return [dcore[end - r : end, end - r : end].contiguous() for end, r in zip(ends, sizes, strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor that parts form without a copy: rows one after another in one storage; None if they do not."""
    # Asked on every call, so in few steps: memory within the first one's storage is in no other's.
    first = parts[0]
    at = first.data_ptr()
    rows = 0
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous():
            return None
        at += part.nbytes
        rows += len(part)
    storage = first.untyped_storage()
    if at > storage.data_ptr() + storage.nbytes():
        return None
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


# On a CPU one wide product of 16-bit numbers takes 0.75 to 1.0 of the time of several, and one of fp32 numbers as long,
# but from about this many weights on longer, by 2 to 14 %.
WIDE_ON_CPU = 1 << 22


def on_torch(x, weights, down, core, up) -> bool:
    """Whether torch's calls compute these operands, not kernels."""
    return linear.computing(x, weights[0], down, core, up, False) is eager


def _forward(x, weights, down, core, up, biases, adapter_ids, basis, want_z=True) -> tuple[Tensor, Tensor | None]:
    """([Y_1 | .. | Y_G], z), Y [..., N] for x of [..., K] and z [M, R]; kernels leave out a z that nobody wants."""
    weight = weights[0] if len(weights) == 1 else joined(weights)
    apart = weight is None or (weight.element_size() > 2 and weight.numel() > WIDE_ON_CPU)
    if x.is_cpu and apart and on_torch(x, weights, down, core, up):
        rows = eager.in_rows(x)
        y, z = eager.forward_of_parts(rows, weights, down, core, up, biases, adapter_ids, basis)
        return eager.like_rows(y, x), z
    if weight is None:
        ys = []
        for i, (own, u) in enumerate(zip(weights, up.split([w.shape[0] for w in weights]), strict=True)):
            own_bias = biases[i] if biases else None
            y, z = linear.by_operator(x, own, down, core, u, own_bias, adapter_ids, basis, False, want_z)
            ys.append(y)
        return torch.cat(ys, -1), z
    bias = None
    if biases:
        bias = biases[0] if len(biases) == 1 else joined(biases)
        bias = torch.cat(list(biases)) if bias is None else bias
    return linear.by_operator(x, weight, down, core, up, bias, adapter_ids, basis, False, want_z)


def _backward(dys, z, weights, down, core, up, adapter_ids, basis, need_x, need_core):
    """(dX, dC or dv) from dY, [M, N] as a whole or in parts."""
    if on_torch(dys[0], weights, down, core, up):
        if len(dys) < len(weights):
            dys = dys[0].split([w.shape[0] for w in weights], 1)
        elif len(weights) < len(dys):
            weights = weights[0].split([dy.shape[1] for dy in dys])
        return eager.backward_of_parts(dys, z, weights, down, core, up, adapter_ids, basis, need_x, need_core)
    from tinylora.ops import fused  # here, because it imports Triton

    weight = weights[0] if len(weights) == 1 else joined(weights)
    weight = torch.cat(list(weights)) if weight is None else weight
    return fused.backward_of_parts(dys, z, weight, down, core, up, adapter_ids, basis, need_x, need_core)


class _Frozen(NamedTuple):
    """What is not in the graph, as one argument: each costs `apply` and the backward's result their time."""

    weights: Sequence[Tensor]
    down: Tensor
    up: Tensor
    biases: Sequence[Tensor]
    adapter_ids: Tensor | None
    basis: Tensor | None
    sizes: Sequence[int]
    kept: object


def _gradients(ctx, *dys):
    z, down, up, adapter_ids, basis, *rest = ctx.saved_tensors
    cores, weights = rest[: ctx.count], rest[ctx.count :]
    need_x, _, *need_cores = ctx.needs_input_grad
    need_core = True in need_cores
    core = cores[0] if ctx.core is None else ctx.core
    given, dys = dys[0], [eager.in_rows(dy) for dy in dys]
    kept = ctx.kept if need_x and need_core else None
    found = None if kept is None else kept.backward(dys, z)
    if found is None:
        found = _backward(dys, z, weights, down, core, up, adapter_ids, basis, need_x, need_core)
        if kept is not None:
            kept.learn_backward(dys, z)
    dx, dcore = found
    if dx is not None and given.dim() != 2:
        dx = dx.view(*given.shape[:-1], dx.shape[-1])
    return dx, None, *(_their_cores(dcore, cores, basis) if need_core else [None] * len(cores))


class _AdaptedLinears(torch.autograd.Function):
    """The eager call; dY comes in parts and is never put together, and no core but the layers' own is in the graph."""

    @staticmethod
    def forward(ctx, x, frozen, *cores):
        weights, down, up, biases, adapter_ids, basis, sizes, kept = frozen
        needs_core = True in ctx.needs_input_grad[2:]
        core = _one_core_apart(cores, basis) if kept is None else kept.operands.core
        found = None if kept is None else kept.forward(x, needs_core)
        y, z = found or _forward(x, weights, down, core, up, biases, adapter_ids, basis)
        if kept is not None and found is None:
            kept.learn(x, needs_core)
        ctx.count, ctx.kept = len(cores), kept
        ctx.core = None if len(cores) == 1 else core  # cores are saved as well, so that a change of theirs is noticed
        ctx.save_for_backward(z if needs_core else None, down, up, adapter_ids, basis, *cores, *weights)
        # Slices, but not views in autograd's books: each may be changed in place as any layer's output may.
        return (y,) if len(sizes) == 1 else tuple([part.data for part in y.split_with_sizes(sizes, -1)])

    backward = first_order(_gradients)


# --- the custom op: what torch.compile, torch.export and dispatch modes see -------------------------------


@torch.library.custom_op("tinylora::adapted_linears", mutates_args=(), device_types=("cpu", "cuda"))
def _op(
    x: Tensor,
    weights: Sequence[Tensor],
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    biases: Sequence[Tensor],
    adapter_ids: Tensor | None,
    basis: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y, z = _forward(x, weights, down, core, up, biases, adapter_ids, basis)
    return y, z.contiguous()  # of one layout, whichever path made it: graphs know it beforehand


@_op.register_fake
def _(x, weights, down, core, up, biases, adapter_ids, basis):
    z = x.new_empty(x.shape[0], down.shape[0], dtype=eager.rank_dtype(x, down))
    return x.new_empty(x.shape[0], up.shape[0]), z


@torch.library.custom_op("tinylora::adapted_linears_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _op_backward(
    dy: Tensor,
    z: Tensor | None,
    weights: Sequence[Tensor],
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    adapter_ids: Tensor | None,
    basis: Tensor | None,
    need_x: bool,
    need_core: bool,
) -> tuple[Tensor, Tensor]:
    grads = _backward([dy], z, weights, down, core, up, adapter_ids, basis, need_x, need_core)
    # A schema has no optional outputs, and a graph knows their layout beforehand.
    return tuple(dy.new_empty(0) if g is None else g.contiguous() for g in grads)


@_op_backward.register_fake
def _(dy, z, weights, down, core, up, adapter_ids, basis, need_x, need_core):
    dx = dy.new_empty(dy.shape[0], down.shape[1]) if need_x else dy.new_empty(0)
    return dx, torch.empty_like(core) if need_core else dy.new_empty(0)


def _setup_context(ctx, inputs, output):
    _, weights, down, core, up, _, adapter_ids, basis = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.count = len(inputs[1]), len(inputs[5])
    z = output[1] if ctx.needs_input_grad[len(inputs[1]) + 2] else None  # here it is still flat: x, weights, down, core
    ctx.save_for_backward(z, down, core, up, adapter_ids, basis, *weights)


def _op_autograd(ctx, dy, _):
    refuse_second_order()
    z, down, core, up, adapter_ids, basis, *weights = ctx.saved_tensors
    need_x, need_core = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    dx, dcore = torch.ops.tinylora.adapted_linears_backward(
        dy, z, weights, down, core, up, adapter_ids, basis, need_x, need_core
    )
    weights, biases = ([None] * n for n in ctx.count)
    return dx if need_x else None, weights, None, dcore if need_core else None, None, biases, None, None


_op.register_autograd(_op_autograd, setup_context=_setup_context)
