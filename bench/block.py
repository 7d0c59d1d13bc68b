"""The seven linear layers of a transformer block, with the adapters of every provider, and their gate.

Nothing but the linear layers is in it: q, k and v read one tensor, gate and up another, o and down one each, which come
from outside, as do the gradients of the seven outputs. Norms, rotations, attention and SwiGLU, which are everybody's
alike, cost nothing here; what autograd does between siblings (adding up their dX) does, as in a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import providers as who
from bench import shapes
from bench.check import Exact, WrongResult, allowance, some_rows
from bench.providers import Factors

NAMES = tuple(name for group in shapes.SIBLINGS for name in group)
INPUTS = ("x of q, k, v", "x of o", "x of gate, up", "x of down")
PROVIDERS = (who.BARE, who.FUSED, who.PEFT, who.PEFT_SAME_DTYPE, who.ADDMM, who.COMPILED_ADDMM, who.ALONE, who.OURS)
WITHOUT = (who.BARE, who.FUSED)  # an adapter
FOUR_BIT_PROVIDERS = (who.BARE, who.OURS)  # PEFT's TinyLoRA does not take them, and siblings run alone


class Attention(nn.Module):
    def __init__(self, q_proj, k_proj, v_proj, o_proj):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = q_proj, k_proj, v_proj, o_proj

    def forward(self, x, mixed):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(mixed)


class MLP(nn.Module):
    def __init__(self, gate_proj, up_proj, down_proj):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x, gated):
        return self.gate_proj(x), self.up_proj(x), self.down_proj(gated)


class Block(nn.Module):
    """forward: the four inputs, [1, M, K] each -> the seven outputs, [1, M, N] each, in the order of NAMES."""

    def __init__(self, linears: dict[str, nn.Linear]):
        super().__init__()
        self.self_attn = Attention(*(linears[name] for name in NAMES[:4]))
        self.mlp = MLP(*(linears[name] for name in NAMES[4:]))

    def forward(self, x, mixed, normed, gated):
        return *self.self_attn(x, mixed), *self.mlp(normed, gated)

    def projection(self, name: str) -> nn.Module:
        return getattr(self.self_attn if hasattr(self.self_attn, name) else self.mlp, name)


@dataclass
class Provider:
    """One way to run the block. copies: (forward, the seven v or none) on the same numbers at other addresses."""

    name: str
    copies: list[tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]]

    @torch.no_grad()
    def forward(self, i: int, xs: list[Tensor]) -> tuple[Tensor, ...]:
        return self.copies[i][0](*xs)

    def gradients(self, i: int, xs: list[Tensor], dys: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the seven outputs, the gradients of the four inputs and of the v): the base is frozen, xs ask for theirs."""
        forward, trains = self.copies[i]
        ys = forward(*xs)
        return ys, torch.autograd.grad(ys, [*xs, *trains], dys)


# Bytes of a number in NF4, with a scale of eight bits for each 64 and one of 32 for each 256 of these.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


class Case:
    """The weights, factors and operands that all providers share, `buffers` times at other addresses.

    shape: {projection: (N, K, bias)}; nf4: the weights are bitsandbytes', of four bits a number, `dtype` is computed in
    """

    def __init__(
        self,
        shape: dict,
        dtype: torch.dtype,
        device: torch.device,
        r: int,
        u: int,
        buffers: Callable[[int], int],
        nf4: bool = False,
    ):
        g = torch.Generator(device).manual_seed(0)
        self.shape, self.dtype, self.device, self.generator = shape, dtype, device, g
        self.buffers = buffers(int(sum(N * K for N, K, _ in shape.values()) * (NF4_BYTES if nf4 else dtype.itemsize)))
        self.weights: list[dict[str, Tensor]] = [{}]
        self.biases: dict[str, Tensor | None] = {}
        self.factors: dict[str, Factors] = {}
        for seed, (name, (N, K, bias)) in enumerate(shape.items()):
            self.weights[0][name] = self._normal(N, K, scale=K**-0.5)
            self.biases[name] = self._normal(N) if bias else None
            self.factors[name] = Factors.random(N, K, r, u, like=self.weights[0][name], seed=seed)
        self.packed: list[dict[str, nn.Parameter]] = []
        if nf4:
            self.packed = [{n: _packed(w) for n, w in self.weights[0].items()} for _ in range(self.buffers)]
            self.weights = [{n: _unpacked(w) for n, w in self.packed[0].items()}]  # the numbers they stand for
        else:
            for _ in range(1, self.buffers):
                self.weights.append({name: weight.clone() for name, weight in self.weights[0].items()})

    def _normal(self, *size, scale: float = 1.0) -> Tensor:
        return torch.empty(*size, dtype=self.dtype, device=self.device).normal_(0, scale, generator=self.generator)

    def operands(self, M: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """`buffers` times (the four inputs, the seven outputs' gradients), the same numbers at other addresses."""
        xs = [self._normal(1, M, self.shape[group[0]][1]) for group in shapes.SIBLINGS]
        dys = [self._normal(1, M, self.shape[name][0]) for name in NAMES]
        copies = range(self.buffers)
        return [[x.clone().requires_grad_() for x in xs] for _ in copies], [[dy.clone() for dy in dys] for _ in copies]

    def block(self, i: int) -> Block:
        """Frozen layers of this provider's own around the shared weights' i-th copy."""
        linears = {}
        for name, (N, K, bias) in self.shape.items():
            make = _linear_4bit if self.packed else nn.Linear
            with torch.device("meta"):
                linear = linears[name] = make(K, N, bias=bias, dtype=self.dtype)
            linear.weight = self.packed[i][name] if self.packed else nn.Parameter(self.weights[i][name], False)
            if bias:
                linear.bias = nn.Parameter(self.biases[name], requires_grad=False)
        return Block(linears)

    def provider(self, name: str) -> Provider:
        if self.packed and name not in FOUR_BIT_PROVIDERS:
            raise ValueError(f"provider is {name!r}, expected one of {', '.join(FOUR_BIT_PROVIDERS)} on four bits")
        if name in (who.ADDMM, who.COMPILED_ADDMM):
            return _addmm(name, self)
        if name == who.FUSED:
            return _fused(self)
        make = {who.BARE: _bare, who.PEFT: _peft, who.PEFT_SAME_DTYPE: _peft, who.ALONE: _ours, who.OURS: _ours}
        return Provider(name, [make[name](name, self, self.block(i)) for i in range(self.buffers)])


def _packed(weight: Tensor) -> nn.Parameter:
    """In NF4 with double quantisation, QLoRA's."""
    from bitsandbytes.nn import Params4bit

    return Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(weight.device)


def _unpacked(weight: nn.Parameter) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _linear_4bit(K: int, N: int, bias: bool, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit

    return Linear4bit(K, N, bias, compute_dtype=dtype, quant_type="nf4")


def _bare(name, case, block):
    return block, []


def _fused(case: Case) -> Provider:
    """Siblings' weights below each other: four products, and the seven outputs as views of theirs."""

    def copy(i):
        wide = []
        for group in shapes.SIBLINGS:
            bias = [case.biases[name] for name in group]
            weight = torch.cat([case.weights[i][name] for name in group])
            wide.append((weight, None if bias[0] is None else torch.cat(bias), [case.shape[name][0] for name in group]))

        def forward(*xs):
            found = zip(xs, wide, strict=True)
            return tuple(y for x, (W, b, Ns) in found for y in F.linear(x, W, b).split(Ns, -1))

        return forward, []

    return Provider(who.FUSED, [copy(i) for i in range(case.buffers)])


def _peft(name, case, block):
    """PEFT's own layers, as in `providers._peft`: its SVDs are cut short and its numbers overwritten in place."""
    from peft import TinyLoraConfig, get_peft_model  # an ImportError, too, where PEFT is too old to have it

    first = case.factors[NAMES[0]]
    config = TinyLoraConfig(r=first.down.shape[0], u=first.v.shape[0], target_modules=list(NAMES))

    def svd(W, **_):
        r = config.r
        return W.new_zeros(W.shape[0], r), W.new_zeros(r), W.new_zeros(r, W.shape[1])

    with mock.patch("torch.linalg.svd", svd):
        model = get_peft_model(block, config, autocast_adapter_dtype=name == who.PEFT)
    vs = []
    with torch.no_grad():
        for projection in NAMES:
            layer, f = block.projection(projection), case.factors[projection]
            if hasattr(layer, "_tinylora_v_key"):
                v = layer.tinylora_v["default"][layer._tinylora_v_key["default"]]
            else:  # PEFT 0.21.0
                v = layer._tinylora_v_ref["default"]
            v.copy_(f.v)
            layer.tinylora_A["default"].copy_(f.down)
            layer.tinylora_B["default"].copy_(f.up)
            layer.tinylora_P["default"].copy_(f.basis)
            vs.append(v)
    assert len({id(v) for v in vs}) == len(NAMES)
    return model.base_model.model, vs


def _ours(name, case, block):
    """What users get from `tinylora.apply`; its SVD gives the shared factors, and P and v are overwritten in place."""
    import tinylora

    first = case.factors[NAMES[0]]
    config = tinylora.TinyLoraConfig(r=first.down.shape[0], u=first.v.shape[0], target_modules=list(NAMES))

    def svd(weight, r, path, *_):
        f = case.factors[path.rsplit(".", 1)[-1]]
        return f.up.float(), f.up.new_ones(r, dtype=torch.float32), f.down.float()

    with mock.patch("tinylora.adapters.lora_xs.cached_svd", svd):
        tinylora.apply(block, config, siblings=name == who.OURS)
    vs = []
    with torch.no_grad():
        for projection in NAMES:
            adapter, f = block.projection(projection).adapters["default"], case.factors[projection]
            adapter.P.copy_(f.basis)
            adapter.v.copy_(f.v)
            vs.append(adapter.v)
    return block, vs


def _seven(xs, weights, biases, downs, ups, bases, vs):
    """The block by `providers.addmm`."""
    read_by = [x for x, group in zip(xs, shapes.SIBLINGS, strict=True) for _ in group]
    return tuple(map(who.addmm, read_by, weights, biases, downs, ups, bases, vs))


def _addmm(name: str, case: Case) -> Provider:
    function = _seven
    if name == who.COMPILED_ADDMM:
        torch._dynamo.reset()  # of another dtype's or model's graphs
        function = torch.compile(_seven, dynamic=True)
    fs = [case.factors[projection] for projection in NAMES]
    biases = [case.biases[projection] for projection in NAMES]
    downs, ups, bases = [f.down for f in fs], [f.up for f in fs], [f.basis.float() for f in fs]

    def copy(i):
        weights = [case.weights[i][projection] for projection in NAMES]
        vs = [f.v.float().requires_grad_() for f in fs]
        return lambda *xs: function(xs, weights, biases, downs, ups, bases, vs), vs

    return Provider(name, [copy(i) for i in range(case.buffers)])


class Gate:
    """Error of the seven y, the four dx and the seven dv: `check.Gate`'s rule for each; PyTorch's own are `plain`'s."""

    def __init__(self, case: Case, xs: list[Tensor], dys: list[Tensor], weights64: dict[str, Tensor]):
        self.xs, self.dys = xs, dys
        self.rows = some_rows(xs[0].shape[1], xs[0].device)
        self.exact: dict[str, Tensor] = {}
        self.bare: dict[str, Tensor] = {}
        self.floors: dict[str, float] = {}
        gradients = dict(zip(NAMES, dys, strict=True))
        plain = case.block(0)
        for place, (x, group) in enumerate(zip(xs, shapes.SIBLINGS, strict=True)):
            for name in group:
                linear, f = plain.projection(name), case.factors[name]
                e = Exact.of(linear, f, x[0], gradients[name][0], weights64[name], self.rows)
                self.exact |= {f"y of {name}": e.y, f"dv of {name}": e.dv}
                self.bare[f"y of {name}"] = e.bare_y
                self.floors[f"dv of {name}"] = e.floor_dv
                key = f"d{INPUTS[place]}"
                self.exact[key] = self.exact.get(key, 0) + e.dx
                self.bare[key] = self.bare.get(key, 0) + e.bare_dx

        def by_hand(*xs):
            read_by = [x for x, group in zip(xs, shapes.SIBLINGS, strict=True) for _ in group]
            return tuple(
                who.plain(x, case.weights[0][n], case.biases[n], f.down, f.up, f.basis.float(), v)
                for x, n, f, v in zip(read_by, NAMES, (case.factors[n] for n in NAMES), vs, strict=True)
            )

        vs = [case.factors[name].v.float().requires_grad_() for name in NAMES]
        self.own = self.errors(Provider("", [(by_hand, vs)]), 0)
        for name, exact in self.exact.items():
            assert name.startswith("dv") or self.own[name] <= 0.1 * exact.abs().max(), f"PyTorch's own {name} is wrong"

    def errors(self, provider: Provider, i: int) -> dict[str, float]:
        """Largest error against fp64, by output."""
        ys, grads = provider.gradients(i, self.xs, self.dys)
        got = {f"y of {name}": y[0, self.rows] for name, y in zip(NAMES, ys, strict=True)}
        got |= {f"d{name}": dx[0, self.rows] for name, dx in zip(INPUTS, grads, strict=False)}
        dvs = grads[len(INPUTS) :]
        got |= {f"dv of {name}": dv.reshape(-1) for name, dv in zip(NAMES, dvs, strict=False)}
        return self._against(got, self.exact if dvs else self.bare)

    def _against(self, got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
        return {name: (t.detach().double() - want[name]).abs().max().item() for name, t in got.items()}

    def admit(self, provider: Provider) -> None:
        """Raise WrongResult unless every copy's numbers are as good as PyTorch's own."""
        for i, (_, trains) in enumerate(provider.copies):
            if provider.name not in WITHOUT and len(trains) != len(NAMES):
                raise WrongResult(f"{len(trains)} of {len(NAMES)} adapters train")
            ys = provider.forward(i, self.xs)
            quiet = {f"y of {name}": y[0, self.rows] for name, y in zip(NAMES, ys, strict=True)}
            for errors in (self._against(quiet, self.exact if trains else self.bare), self.errors(provider, i)):
                for name, error in errors.items():
                    allowed = allowance(self.own[name], self.exact[name], self.xs[0].dtype) + self.floors.get(name, 0.0)
                    if not error <= allowed:  # NaN must not pass
                        raise WrongResult(f"{name}: error {error:.1e}, allowed {allowed:.1e}")
