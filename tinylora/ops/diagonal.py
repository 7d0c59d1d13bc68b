"""The operator with diagonals in place of the core, on a CPU: what LoRA, AdaLoRA and VeRA are.

    Y = X Wᵀ + bias + α · (((X Dᵀ) ∘ d) Uᵀ) ∘ b

    LoRA     d = b = 1, α = scaling                D and U train
    AdaLoRA  d = E, b = 1, α = scaling / rank      D, U and d train
    VeRA     d, b, α = 1                           d and b train

`adapted_linear` can do the same with diag(d) for a core and diag(b) U for U. Here a scale is a factor of a product
that is computed anyway, diagonals multiply what has r numbers a row or a column, and one autograd node has all the
gradients: at the sizes at which people train on CPUs, calls and passes over [M, N] are the price of an adapter.

With t = α (dY ∘ b) U and s = z ∘ d, in fp32 (fp64 if an operand is), all of them [r, M] in memory:
    dX = dY W + (t ∘ d) D,  dD = (t ∘ d)ᵀ X,  dd = Σ_m t ∘ z,  dU = α b ∘ dYᵀ s,  db = α Σ_j U ∘ dYᵀ s
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.ops.eager import BLOCK, SMALL, add_product, thin, thin_transposed

# Up to so many numbers in x Python costs as much as arithmetic, and without autograd the fewest calls are the best way.
FEW = {torch.float32: 1 << 20, torch.bfloat16: SMALL, torch.float16: SMALL}


def diagonal_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    d: Tensor | None,
    up: Tensor,
    b: Tensor | None,
    scale: float,
) -> Tensor:
    """Y = X Wᵀ + bias + scale · (((X Dᵀ) ∘ d) Uᵀ) ∘ b, for operands on a CPU that are known to fit: a layer's own.

    x:      [..., K], the dtype of weight; weight [N, K] and bias [N] or None are frozen
    down:   [r, K]; up: [N, r]
    d:      [r], or of any shape with r numbers, or None for 1
    b:      [N] or None for 1

    returns [..., N] in weight's dtype. Gradients for x, down, d, up and b, as far as they require them, each in its
    operand's dtype.
    """
    if not torch.is_grad_enabled():
        if x.numel() > FEW.get(x.dtype, 0) or down.dtype is not torch.float32 or up.dtype is not torch.float32:
            return _forward(x, weight, bias, down, d, up, b, scale)[0]
        # For a few rows calls cost more than numbers: as few of them as torch allows.
        y = F.linear(x, weight, bias)
        s = F.linear(x if x.dtype is torch.float32 else x.float(), down)
        if d is not None:
            s.mul_(d.view(-1))
        delta = F.linear(s, up)
        if b is not None:
            delta.mul_(b)
        return y.add_(delta, alpha=scale)
    if (
        x.requires_grad
        or down.requires_grad
        or up.requires_grad
        or (d is not None and d.requires_grad)
        or (b is not None and b.requires_grad)
    ):
        return _DiagonalLinear.apply(x, weight, bias, down, d, up, b, scale)
    return _forward(x, weight, bias, down, d, up, b, scale)[0]


def _column(d: Tensor, dtype: torch.dtype) -> Tensor:
    return d.to(dtype).view(-1, 1)


def _forward(x, weight, bias, down, d, up, b, scale) -> tuple[Tensor, Tensor]:
    """(Y, zᵀ [r, M])."""
    x2d = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = F.linear(x2d, weight, bias)
    z = thin(x2d, down).t()
    s = z if d is None else z * _column(d, z.dtype)
    factor = up if b is None else up * b[:, None]
    y.addmm_(s.t().to(y.dtype), factor.t().to(y.dtype), alpha=scale)
    if x.dim() != 2:  # not a view in autograd's books: it may be changed in place as any layer's output may
        y = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])
    return y, z


class _DiagonalLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, d, up, b, scale):
        y, z = _forward(x, weight, bias, down, d, up, b, scale)
        _, _, _, need_down, need_d, need_up, need_b, _ = ctx.needs_input_grad
        ctx.scale = scale
        ctx.save_for_backward(
            x if need_down else None, z if need_d or need_up or need_b else None, weight, down, d, up, b
        )
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        if torch._C._is_any_autocast_enabled():  # a backward called inside autocast; the context costs microseconds
            with torch.autocast("cpu", enabled=False):
                return _backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx, dy):
    x, z, weight, down, d, up, b = ctx.saved_tensors
    need_x, _, _, need_down, need_d, need_up, need_b, _ = ctx.needs_input_grad
    scale, shape = ctx.scale, dy.shape
    dx = ddown = dd = dup = db = None
    if len(shape) != 2:
        dy = dy.reshape(-1, shape[-1])
    wide = dy.float() if dy.element_size() == 2 and dy.numel() <= BLOCK else dy  # cast once, while it is in the cache
    if need_x or need_down or need_d:
        t = thin(wide, (up if b is None else up * b[:, None]).t()).t()
        if scale != 1:
            t.mul_(scale)
    if need_up or need_b:
        s = z if d is None else z * _column(d, z.dtype)
        h = thin_transposed(s.t(), wide).t()  # dYᵀ s, [N, r]
        if scale != 1:
            h.mul_(scale)
        if need_b:
            db = (up * h).sum(1).to(b.dtype)
        if need_up:
            dup = (h if b is None else h * b[:, None]).to(up.dtype).contiguous()
    if need_d:
        dd = (t * z).sum(1).to(d.dtype).view_as(d)
    if need_x or need_down:
        q = t if d is None else t.mul_(_column(d, t.dtype))
    if need_x:
        dx = torch.mm(dy, weight)
        add_product(dx, q.t(), down)
        if len(shape) != 2:
            dx = dx.view(*shape[:-1], dx.shape[-1])
    if need_down:
        ddown = thin_transposed(q.t(), x.reshape(-1, x.shape[-1])).to(down.dtype)
    return dx, None, None, ddown, dd, dup, db, None
