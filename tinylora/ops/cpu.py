"""The operator with one core, for layers so small that calls and passes are its price: what PEFT's run on a CPU.

    Y = X Wᵀ + bias + scale · ((X Dᵀ) Cᵀ) Uᵀ

    PEFT's    U              C            scale             trains
    LoRA      B              1            scaling           A, B
    AdaLoRA   B ∘ E          1            scaling / rank    A, B, E
    VeRA      b ∘ B ∘ d      1            1                 d, b
    TinyLoRA  B              Σᵢ vᵢ Pᵢ     1                 v

What D, C and U are made of is a few numbers: torch makes them, and its autograd takes their gradients on. With
z = X Dᵀ, t = dY U and q = t C, [M, r] in fp32 (fp64 if an operand is), and h = zᵀ dY, [r, N]:
    dX = dY W + scale · q D,  dD = scale · qᵀ X,  dC = scale · tᵀ z = scale · (h U)ᵀ,  dU = scale · (C h)ᵀ

`adapted_linear` gives the same numbers. Here a scale is a factor of a product that is computed anyway, one autograd
node has all the gradients, and a small fp32 layer is folded: W' = W + scale · U C D is made anew in every call, which
leaves one product for Y and one for dX. Where x is small, too, even that node is too much: X W'ᵀ goes to torch with all
of dW', in fp32 also for 16-bit operands.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.ops.backward import first_order
from tinylora.ops.eager import SMALL, add_product, at_once, in_rows, like_rows, thin, thin_transposed

# Up to so many numbers in x Python costs as much as arithmetic, and without autograd the fewest calls are the best way.
FEW = {torch.float32: 1 << 20, torch.bfloat16: SMALL, torch.float16: SMALL}

# Up to this many products, [N, r] by [r, K], making W' takes less time than a second pass over Y, whatever M is.
FOLD = 1 << 17

# Up to this many products M N K for each of r + 2 all of dW' takes less time than a node of our own, which costs
# as much as a rank of 2 before it computes anything.
WHOLE = 1 << 20


def linear_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Y = X Wᵀ + bias + scale · ((X Dᵀ) Cᵀ) Uᵀ, for operands on a CPU that are known to fit: a layer's own.

    x:    [..., K], the dtype of weight; weight [N, K] is frozen; bias: [N] or None
    down: [r, K]; core: [r, r] or None for 1; up: [N, r], all fp32, or fp64 as x

    returns [..., N] in weight's dtype. Gradients for x, bias, down, core and up, as far as they require them. With a
    zero core or up the result is F.linear's, bit for bit; of few rows in 16 bits and a small layer, but for 1 of 40,000
    numbers.
    """
    if _whole(x, weight, down):
        dtype = x.dtype
        if dtype is not down.dtype:
            # Exact in fp32, and a fourth of oneDNN's time, most of which is preparation. Y is rounded where it rounds.
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        return F.linear(x, _folded(weight, down, core, up, scale), bias).to(dtype)
    if not torch.is_grad_enabled():
        if _folds(x, weight, down):
            return F.linear(x, _folded(weight, down, core, up, scale), bias)
        if x.numel() <= FEW.get(x.dtype, 0) and down.dtype is torch.float32:
            z = F.linear(x if x.dtype is torch.float32 else x.float(), down)
            s = F.linear(z if core is None else F.linear(z, core), up)
            return F.linear(x, weight, bias).add_(s, alpha=scale)
    elif (
        x.requires_grad
        or down.requires_grad
        or up.requires_grad
        or (core is not None and core.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _LinearOnCPU.apply(x, weight, bias, down, core, up, scale)
    return _forward(x, weight, bias, down, core, up, scale)[0]


def _whole(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether all of dW' is the cheapest way to the gradients, or without them to Y."""
    if x.numel() * weight.shape[0] > (2 + down.shape[0]) * WHOLE:
        return False
    return _folds(x, weight, down) or (x.element_size() == 2 and weight.numel() <= SMALL)


def _folds(x: Tensor, weight: Tensor, down: Tensor) -> bool:
    """Whether W' = W + U C D is the faster way to Y, and as exact: not in 16 bits, which lose so small an update."""
    return weight.numel() * down.shape[0] <= FOLD and x.dtype is down.dtype


def _folded(weight, down, core, up, scale) -> Tensor:
    return torch.addmm(weight, up if core is None else torch.mm(up, core), down, alpha=scale)


def _forward(x, weight, bias, down, core, up, scale) -> tuple[Tensor, Tensor]:
    """(Y, z)."""
    rows = in_rows(x)
    z = thin(rows, down)
    y = _product(rows, weight.t(), bias, z, up.t() if core is None else torch.mm(core.t(), up.t()), scale)
    return like_rows(y, x), z


def _product(a: Tensor, b: Tensor, bias: Tensor | None, s: Tensor, factor: Tensor, scale: float) -> Tensor:
    """A B + bias + scale · s F, a new tensor in A's dtype."""
    if bias is None and a.dtype is torch.bfloat16 and factor.dtype is torch.float32:
        # The smaller product first: the larger one adds to it before it rounds. A bias would round it too early.
        factor = (factor if scale == 1 else factor * scale).to(a.dtype, memory_format=torch.contiguous_format)
        return torch.mm(s.to(a.dtype, memory_format=torch.contiguous_format), factor).addmm_(a, b)
    y = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    if y.element_size() == 2 and y.numel() <= 4 * SMALL and factor.dtype is s.dtype:
        y.copy_(y.to(s.dtype).addmm_(s, factor, alpha=scale))  # rounded as PEFT's sum of 16 bits and fp32 is
    else:
        add_product(y, s, factor, scale)
    return y


def _gradients(ctx, dy):
    x, z, weight, down, core, up = ctx.saved_tensors  # weight is W' where it is folded
    need_x, _, need_bias, need_down, need_core, need_up, _ = ctx.needs_input_grad
    scale = ctx.scale
    dx = dbias = ddown = dcore = dup = t = None
    given, dy = dy, in_rows(dy)
    wide = dy.float() if dy.element_size() == 2 and at_once(dy) else dy  # cast once
    if need_down or (need_x and not ctx.folded):
        t = thin(wide, up.t())  # without scale: a factor of what it is made for
    if need_x:
        if ctx.folded:
            dx = torch.matmul(given, weight)
        else:
            dx = _product(dy, weight, None, t, down if core is None else torch.mm(core, down), scale)
            dx = like_rows(dx, given)
    if need_down:
        ddown = thin_transposed(t, in_rows(x))
        ddown = _times(ddown if core is None else torch.mm(core.t(), ddown), scale)
    if need_up or (need_core and t is None):
        h = thin_transposed(z, wide)
    if need_core:
        dcore = _times(torch.mm(up.t(), h.t()) if t is None else torch.mm(t.t(), z), scale)
    if need_up:
        dup = _times(h if core is None else torch.mm(core, h), scale).t().contiguous()
    if need_bias:
        dbias = dy.sum(0)
    return dx, None, dbias, ddown, dcore, dup, None


class _LinearOnCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, core, up, scale):
        _, _, _, need_down, need_core, need_up, _ = ctx.needs_input_grad
        z, ctx.folded, ctx.scale = None, _folds(x, weight, down), scale
        if ctx.folded:
            weight = _folded(weight, down, core, up, scale)
            rows = in_rows(x)
            y = like_rows(F.linear(rows, weight, bias), x)
            if need_core or need_up:
                z = thin(rows, down)
        else:
            y, z = _forward(x, weight, bias, down, core, up, scale)
        ctx.save_for_backward(x if need_down else None, z if need_core or need_up else None, weight, down, core, up)
        return y

    backward = first_order(_gradients)


def _times(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1 else t.mul_(scale)
