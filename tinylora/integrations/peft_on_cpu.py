"""PEFT's layers on a CPU: the operator with one core, for layers so small that calls and passes are its price.

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
node has all the gradients, and a layer that is small, or small beside its rows, is folded: W' = W + scale · U C D is
made anew in every call, in fp32 also for 16-bit operands where x is small, too, which leaves one product for Y and one
for dX. Where even a node is too much, X W'ᵀ goes to torch with all of dW'; few rows without gradients go to torch as
they come.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.ops.backward import first_order
from tinylora.ops.eager import AMX, PANELS, SMALL, add_product, at_once, in_rows, like_rows, mix, thin, thin_transposed

# Up to this many numbers in a 16-bit W, and four times as many products, an fp32 copy of it in every call takes less
# time than oneDNN's preparation of 16 bits. Elsewhere than with AMX it is not measured: a fourth of it.
COPY = 1 << 18 if AMX else 1 << 16

# Up to this many products, [N, r] by [r, K], making W' takes less time than a second pass over Y, whatever M is; of few
# rows without gradients, where no pass is long, only if W has no more than FOLD_FEW numbers. A larger W' is worth it
# from as many rows on as the harmonic mean of N and K, up to MANY numbers: above, it gained nothing without gradients,
# and with them autograd keeps it.
FOLD, FOLD_FEW, MANY = 1 << 17, 1 << 14, 1 << 18

# Up to so many products M N K all of dW' takes less time than a node of our own: where both D and U train this many for
# each of r + 2, as a node costs as much as a rank of 2 before it computes anything; where one of them does, ONE.
BOTH, ONE = (1 << 22, 1 << 23) if AMX else (1 << 20, 1 << 18)

# Above so many W' is not made for a core: with AMX z and t, which give dC, take less time than W' and dD.
CORE = 1 << 23 if AMX else 1 << 62

HALVES = (torch.bfloat16, torch.float16)


def linear_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    scale: float = 1.0,
    basis: Tensor | None = None,
    diagonals: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Y = X Wᵀ + bias + scale · ((X Dᵀ) Cᵀ) Uᵀ, for operands on a CPU that are known to fit: a layer's own.

    x:         [..., K], the dtype of weight; weight [N, K] is frozen; bias: [N] or None
    down:      [r, K]; core: [r, r] or None for 1; up: [N, r], all fp32, or fp64 as x
    basis:     P [u, r, r] where core is v [u], for C = Σᵢ vᵢ Pᵢ; else None
    diagonals: (b [N], d [r]) for U = b ∘ up ∘ d; else None

    returns [..., N] in weight's dtype. Gradients for x, bias, down, core, up, b and d, as far as they require them.
    With a zero core or up the result is F.linear's of a contiguous x, bit for bit; of few rows in 16 bits and a small
    layer, but for 1 of 40,000 numbers.
    """
    (N, K), r, dtype = weight.shape, down.shape[0], x.dtype
    numel, wide, grads = x.numel(), dtype is down.dtype, torch.is_grad_enabled()
    products = numel * N
    short = not grads and numel <= SMALL and products <= 4 * SMALL * K  # few rows, and few numbers in Y
    both, one = products <= (2 + r) * BOTH, products <= ONE
    if not wide:  # W' in 16 bits would lose so small an update, and large products in fp32 are slow
        folded = both and N * K <= SMALL and dtype in HALVES
    elif N * K * r <= FOLD and (not short or N * K <= FOLD_FEW) and (core is None or products <= CORE):
        folded = True
    else:
        folded = N * K <= MANY and numel * (N + K) >= 2 * N * K * K and (core is None or not grads)
        both = one = False
    if folded:
        if core is not None:
            down = _mixed(core, basis, down, N)
        need_down, need_up = down.requires_grad, up.requires_grad
        if diagonals is not None:
            b, d = diagonals
            if grads and not one and (b.requires_grad or d.requires_grad) and not (need_down or need_up):
                return _folded(x, weight, bias, down, up, scale, b, d)
            up = _scaled(up, b, d)
            need_up = up.requires_grad
        if grads and (not one if need_down is not need_up else (need_down and not both)):
            return _folded(x, weight, bias, down, up, scale, None, None)
        if wide:
            y = F.linear(x, torch.addmm(weight, up, down, alpha=scale), bias)
            return y if grads else y.data  # as in `_in_few_calls`
        # Exact in fp32, and a fourth of oneDNN's time, most of which is preparation. Y is rounded where it rounds.
        weight = weight.float().addmm_(up, down, alpha=scale)  # in place: a second copy takes as long as the product
        return F.linear(x.float(), weight, None if bias is None else bias.float()).to(dtype)
    if short and dtype is not torch.float64:
        return _in_few_calls(x, weight, bias, down, core, up, scale, basis, diagonals)
    core = mix(core, basis)
    if diagonals is not None:
        up = _scaled(up, *diagonals)
    if grads and (
        x.requires_grad
        or down.requires_grad
        or up.requires_grad
        or (core is not None and core.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _apart(x, weight, bias, down, core, up, scale)
    return _forward(x, weight, bias, down, core, up, scale)[0]


_ZERO = torch.zeros((), dtype=torch.float32)


def _scaled(up: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """b ∘ U ∘ d. b dᵀ and its gradients are one node where a zero is added to it."""
    return up * torch.addr(_ZERO, b, d) if torch.is_grad_enabled() else torch.outer(b, d).mul_(up)


def _in_few_calls(x, weight, bias, down, core, up, scale, basis, diagonals) -> Tensor:
    """As torch calls them, on x as it comes: its calls and Python's are what few rows cost."""
    dtype, wide = x.dtype, x
    if dtype is not torch.float32:
        wide = x.float()
        if weight.numel() <= COPY and x.numel() * weight.shape[0] <= 4 * COPY:
            x, weight, bias = wide, weight.float(), None if bias is None else bias.float()
    z = F.linear(wide, down)
    if core is not None:
        z = F.linear(z, mix(core, basis))
    if diagonals is None:
        s = F.linear(z, up)
    else:
        b, d = diagonals
        s = F.linear(z.mul_(d), up).mul_(b)
    y = F.linear(x, weight, bias).add_(s, alpha=scale)  # rounded as PEFT's sum of 16 bits and fp32 is
    # F.linear's is a view, which made without gradients may not be changed in place with them; PEFT's is none.
    return y.data if y.dtype is dtype else y.to(dtype)


def _mixed(core: Tensor, basis: Tensor | None, down: Tensor, N: int) -> Tensor:
    """C D, [r, K]."""
    if basis is not None:
        u, r, _ = basis.shape
        if u * r <= N:
            # Σᵢ vᵢ (Pᵢ D): no more products than W' takes, and one node less for autograd than (Σᵢ vᵢ Pᵢ) D.
            return torch.mv(torch.mm(basis.reshape(u * r, r), down).view(u, -1).t(), core).view(r, -1)
        core = mix(core, basis)
    return torch.mm(core, down)


def _folded_gradients(ctx, dy):
    weight, z, x, up, b, d = ctx.saved_tensors  # W' in fp32; X where D trains, z where U or what scales it does
    need_x, _, need_bias, *_ = ctx.needs_input_grad
    scale = ctx.scale
    dx = dbias = ddown = dup = db = dd = None
    if need_bias:
        dbias = in_rows(dy).sum(0)
    if dy.dtype is not up.dtype:
        dy = dy.to(up.dtype)
    rows = in_rows(dy)
    # Where `thin` and `thin_transposed` end in one product they are spared: their questions take 2 of its 9 us.
    few = rows.numel() < PANELS
    if need_x:
        dx = torch.matmul(dy, weight)  # autograd rounds it to x's dtype
    if z is not None:
        h = torch.mm(z.t(), rows) if few else thin_transposed(z, rows)  # dUᵀ
        if scale != 1:
            h.mul_(scale)
        if b is not None:
            h.mul_(up.t())
            db, dd = torch.mv(h.t(), d), torch.mv(h, b)
        else:
            dup = h.t().contiguous()  # torch's fused optimizers read a gradient as it lies
    if x is not None:
        columns = up.t().contiguous()  # BLAS takes up to three times as long on U's own layout
        t = torch.mm(rows, columns.t()) if few else thin(rows, columns)
        ddown = torch.mm(t.t(), x) if few else thin_transposed(t, x)
        if scale != 1:
            ddown.mul_(scale)
    return dx, None, dbias, ddown, dup, None, db, dd


class _Folded(torch.autograd.Function):
    """Y = X W'ᵀ + bias with W' = W + scale · U D: dX = dY W', dD = scale · (dY U)ᵀ X, dU = scale · dYᵀ (X Dᵀ).

    With b and d, U = b ∘ up ∘ d, and neither D nor up trains: db = (dU ∘ up) d, dd = (dU ∘ up)ᵀ b.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scale, b, d):
        need_x, _, _, need_down, need_up, _, _, _ = ctx.needs_input_grad
        rows, dtype, z = in_rows(x), x.dtype, None
        factor = up if b is None else torch.outer(b, d).mul_(up)
        if dtype is down.dtype:
            weight = torch.addmm(weight, factor, down, alpha=scale)
        else:
            rows, bias = rows.float(), None if bias is None else bias.float()
            weight = weight.float().addmm_(factor, down, alpha=scale)
        y = F.linear(rows, weight, bias)
        if need_up or b is not None:
            z = torch.mm(rows, down.t()) if rows.numel() < PANELS else thin(rows, down)
        ctx.scale = scale
        ctx.save_for_backward(weight if need_x else None, z, rows if need_down else None, up, b, d)
        if dtype is not y.dtype:
            y = y.to(dtype)
        return like_rows(y, x)

    backward = first_order(_folded_gradients)


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


def _apart_gradients(ctx, dy):
    x, z, weight, down, core, up = ctx.saved_tensors
    need_x, _, need_bias, need_down, need_core, need_up, _ = ctx.needs_input_grad
    scale = ctx.scale
    dx = dbias = ddown = dcore = dup = t = None
    given, dy = dy, in_rows(dy)
    wide = dy.float() if dy.element_size() == 2 and at_once(dy) else dy  # cast once
    if need_down or need_x:
        t = thin(wide, up.t())  # without scale: a factor of what it is made for
    if need_x:
        dx = _product(dy, weight, None, t, down if core is None else torch.mm(core, down), scale)
        dx = dx if given.dim() == 2 else dx.view(*given.shape[:-1], dx.shape[1])  # under vmap nothing is resized
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


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, core, up, scale):
        _, _, _, need_down, need_core, need_up, _ = ctx.needs_input_grad
        y, z = _forward(x, weight, bias, down, core, up, scale)
        ctx.scale = scale
        ctx.save_for_backward(x if need_down else None, z if need_core or need_up else None, weight, down, core, up)
        return y

    backward = first_order(_apart_gradients)


# Function.apply asks in Python, of every argument, what only torch.func makes: it is not here (`integrations.peft`).
_folded, _apart = (super(torch.autograd.Function, node).apply for node in (_Folded, _Apart))


def _times(t: Tensor, scale: float) -> Tensor:
    return t if scale == 1 else t.mul_(scale)
