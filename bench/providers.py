"""Who is measured: ways to run one adapted linear layer, all with the same frozen weight and the same factors."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BARE, PEFT, PEFT_SAME_DTYPE, PLAIN, COMPILED, OURS = NAMES = (
    "bare",  # the frozen linear layer without an adapter: the floor
    "peft",  # PEFT's TinyLoRA layer as get_peft_model makes it: fp32 adapter, whatever the base
    "peft-same-dtype",  # the same with autocast_adapter_dtype=False
    "plain",  # three matmuls in the base's dtype
    "compiled",  # torch.compile of `plain`
    "ours",  # tinylora.Linear
)

INVARIANT = f"{OURS}, batch_invariant"  # the same layer with rows that do not depend on each other; on request alone
# Where a whole block of layers is measured (`bench layer`), also:
FUSED, ADDMM, COMPILED_ADDMM, ALONE = (
    "bare, fused",  # q, k and v as one bare layer, gate and up as another: what siblings are to be held to
    "addmm",  # a careful user's own autograd function: one in-place addmm in each direction
    "compiled addmm",  # torch.compile of it
    "ours, no siblings",  # tinylora.apply(..., siblings=False): every layer by itself
)


FIRST = ("q_proj", "k_proj", "v_proj", "query", "key", "value")


@contextlib.contextmanager
def first_outputs(model: nn.Module, trains: list[Tensor]) -> Iterator[list[Tensor]]:
    """What a bare model's step takes gradients of, as it trains nothing: what its first q, k and v give, where a step
    that trains adapters ends as well. Filled as the model runs; nothing where something trains."""
    asked: list[Tensor] = []

    def ask(layer, inputs, output):
        asked.append(output.requires_grad_())

    first: dict[str, nn.Module] = {}
    for name, layer in model.named_modules() if not trains else ():
        if name.rpartition(".")[2] in FIRST:
            first.setdefault(name.rpartition(".")[2], layer)
    hooks = [layer.register_forward_hook(ask) for layer in first.values()]
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Factors:
    """TinyLoRA's numbers for one layer: Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ with C = Σᵢ vᵢ Pᵢ.

    down: [r, K], up: [N, r], basis (P): [u, r, r], v: [u]
    """

    down: Tensor
    up: Tensor
    basis: Tensor
    v: Tensor

    @classmethod
    def random(cls, N: int, K: int, r: int, u: int, like: Tensor, seed: int = 0) -> "Factors":
        """Numbers that make base and adapter weigh about the same, rounded to the base's dtype: so every provider
        holds exactly the same ones, in whatever dtype it keeps them."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, scale):
            return (torch.randn(*shape, generator=g) * scale).to(like.dtype).to(like.device)

        return cls(
            normal(r, K, scale=K**-0.5),
            normal(N, r, scale=r**-0.5),
            normal(u, r, r, scale=r**-0.5),
            normal(u, scale=u**-0.5),
        )


@dataclass
class Provider:
    """forward: x [M, K] -> y [M, N]. trains: the adapter's v, or None for the bare layer."""

    name: str
    forward: Callable[[Tensor], Tensor]
    trains: Tensor | None

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """One forward and backward as inside a model: x asks for a gradient, the base is frozen, v trains.

        Returns (y, dx) or (y, dx, dv).
        """
        y = self.forward(x)
        return y.detach(), *torch.autograd.grad(y, [x] if self.trains is None else [x, self.trains], dy)


def plain(x, weight, bias, down, up, basis, v) -> Tensor:
    """Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ as one would write it by hand."""
    core = torch.einsum("i,ijk->jk", v, basis).to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(F.linear(x, down), core), up)


class Addmm(torch.autograd.Function):
    """Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ for x of [M, K] as a careful user writes it, all in the base's dtype: Y and dX are
    touched twice, by the frozen matmul and by one addmm in place; z = X Dᵀ is kept, and X is not."""

    @staticmethod
    def forward(ctx, x, weight, bias, down, core, up):
        z = torch.mm(x, down.t())
        ctx.save_for_backward(z, weight, down, core, up)
        return F.linear(x, weight, bias).addmm_(torch.mm(z, core.t()), up.t())

    @staticmethod
    def backward(ctx, dy):
        z, weight, down, core, up = ctx.saved_tensors
        t = torch.mm(dy, up)
        dx = torch.mm(dy, weight).addmm_(torch.mm(t, core), down)
        return dx, None, None, None, torch.mm(t.t(), z), None


def addmm(x, weight, bias, down, up, basis, v) -> Tensor:
    """`plain`'s operands and result, by `Addmm`."""
    core = torch.einsum("i,ijk->jk", v, basis).to(x.dtype)
    y = Addmm.apply(x.reshape(-1, x.shape[-1]), weight, bias, down, core, up)
    return y.view(*x.shape[:-1], weight.shape[0])


def make(name: str, linear: nn.Linear, factors: Factors) -> Provider:
    """The provider of that name around `linear`, whose weight is frozen and shared by all of them."""
    if name == BARE:
        return Provider(name, linear, None)
    if name in (PEFT, PEFT_SAME_DTYPE):
        return _peft(name, linear, factors)
    if name in (PLAIN, COMPILED):
        return _plain(name, linear, factors)
    if name in (OURS, INVARIANT):
        return _ours(name, linear, factors)
    raise ValueError(f"provider {name!r} is unknown, expected one of {', '.join((*NAMES, INVARIANT))}")


def _plain(name, linear, f) -> Provider:
    function, v = plain, f.v.float().requires_grad_()
    if name == COMPILED:
        # Dynamic shapes, and room for every case that still specialises (M = 1, N = K, bias or not, v asking for a
        # gradient or not): compiled once each for all shapes, not once per shape, which would cost minutes.
        torch._dynamo.config.recompile_limit = 256
        torch._dynamo.config.accumulated_recompile_limit = 4096
        function = torch.compile(plain, dynamic=True)
    basis = f.basis.float()

    def forward(x):
        return function(x, linear.weight, linear.bias, f.down, f.up, basis, v)

    return Provider(name, forward, v)


def _peft(name, linear, f) -> Provider:
    """PEFT's own layer, made by get_peft_model. Only its start is cut short: the full SVD (seconds at 3584 x 3584, see
    `python -m bench svd`) is replaced by the shared factors, with singular values of one, so that PEFT itself stores
    them as A and B in the dtypes it chooses; P and v are then overwritten in place."""
    from peft import TinyLoraConfig, get_peft_model  # an ImportError, too, where PEFT is too old to have it

    config = TinyLoraConfig(r=f.down.shape[0], u=f.v.shape[0], target_modules=["proj"])
    shared = f.up.float(), f.up.new_ones(f.down.shape[0], dtype=torch.float32), f.down.float()
    with mock.patch("torch.linalg.svd", lambda *_, **__: shared):
        model = nn.ModuleDict({"proj": linear})
        model = get_peft_model(model, config, autocast_adapter_dtype=name == PEFT)
    layer = model.base_model.model["proj"]
    (v,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        v.copy_(f.v)
        layer.tinylora_P["default"].copy_(f.basis)
    return Provider(name, layer, v)


def _ours(name, linear, f) -> Provider:
    """The layer that users get. As with PEFT, its SVD is replaced by the shared factors (singular values of one), and
    P and v are overwritten in place."""
    import tinylora

    shared = f.up.float(), f.up.new_ones(f.down.shape[0], dtype=torch.float32), f.down.float()
    config = tinylora.TinyLoraConfig(r=f.down.shape[0], u=f.v.shape[0])
    with mock.patch("tinylora.adapters.lora_xs.cached_svd", lambda *_: shared):
        layer = tinylora.Linear.from_linear(linear, config)
    layer.batch_invariant = name == INVARIANT
    (v,) = tinylora.adapter_parameters(layer)
    with torch.no_grad():
        v.copy_(f.v)
        layer.adapters["default"].P.copy_(f.basis)
    return Provider(name, layer, v)


class Case:
    """One frozen linear layer, the providers around it, and the operands that calls on it rotate through."""

    def __init__(self, N: int, K: int, bias: bool, dtype: torch.dtype, device: torch.device, r: int, u: int):
        g = torch.Generator(device).manual_seed(0)
        weight = torch.empty(N, K, dtype=dtype, device=device).normal_(0, K**-0.5, generator=g)
        with torch.device("meta"):
            self.linear = nn.Linear(K, N, bias=bias, dtype=dtype)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            b = torch.empty(N, dtype=dtype, device=device).normal_(generator=g)
            self.linear.bias = nn.Parameter(b, requires_grad=False)
        self.factors = Factors.random(N, K, r, u, like=weight)
        self.weights = [weight]

    def operands(self, M: int, buffers: int) -> tuple[list[Tensor], list[Tensor]]:
        """`buffers` copies of x [M, K] and dy [M, N], and of the weight: the same numbers at other addresses."""
        weight = self.weights[0]
        N, K = weight.shape
        g = torch.Generator(weight.device).manual_seed(M)
        x, dy = (weight.new_empty(M, width).normal_(generator=g) for width in (K, N))
        while len(self.weights) < buffers:
            self.weights.append(weight.clone())
        xs = [x.clone().requires_grad_() for _ in range(buffers)]
        return xs, [dy.clone() for _ in range(buffers)]

    @contextlib.contextmanager
    def rotating(self, xs: list[Tensor], dys: list[Tensor]) -> Iterator["Rotation"]:
        """All providers hold this one Linear, so pointing its weight elsewhere moves them all."""
        rotation = Rotation(self.linear, self.weights, xs, dys)
        try:
            yield rotation
        finally:
            rotation(0)


class Rotation:
    """Call with i: the weight's i-th copy is in place, and x and dy are the i-th ones."""

    def __init__(self, linear, weights, xs, dys):
        self.linear, self.weights, self.xs, self.dys = linear, weights, xs, dys
        self(0)

    def __call__(self, i: int) -> None:
        self.linear.weight.data = self.weights[i]
        self.x, self.dy = self.xs[i], self.dys[i]
