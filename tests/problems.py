"""The one list of operator problems that every path is held to, and the one rule of what is exact enough."""

from dataclasses import dataclass, replace

import torch

from tinylora.ops import eager, reference

NAMES = ("x", "weight", "down", "core", "up", "bias")


@dataclass(frozen=True)
class Problem:
    """Sizes and dtypes of one adapted linear; `operands()` makes them, the same ones every time."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype = torch.float32
    factors: torch.dtype | None = None  # dtype of down and up; None is `dtype`
    core: str = "dense"  # dense | diagonal | none | rows | mixed | mixed-rows: the last two are v with a basis P
    bias: bool = True
    adapters: int = 3
    u: int = 5
    groups: int = 1  # with more, C has so many blocks on its diagonal and the basis holds these alone

    @property
    def id(self) -> str:
        short = {torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
        factors = "" if self.factors is None else f"-{short[self.factors]}"
        bias = "-bias" if self.bias else ""
        groups = f"-{self.groups}-blocks" if self.groups > 1 else ""
        return f"{self.M}x{self.N}x{self.K}-r{self.r}-{short[self.dtype]}{factors}-{self.core}{groups}{bias}"

    def with_(self, **changes) -> "Problem":
        return replace(self, **changes)

    def operands(self, seed: int = 0, device: str = "cpu"):
        """(x, weight, down, core, up, bias), adapter_ids, basis; base and correction weigh about the same."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype, scale=1.0):
            return (torch.randn(*shape, generator=g) * scale).to(device=device, dtype=dtype)

        factors = self.factors or self.dtype
        core_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        mixed = self.core.startswith("mixed")
        one = (self.u,) if mixed else (self.r,) if self.core == "diagonal" else (self.r, self.r)
        spread = 1.0 if self.core == "diagonal" else self.r**-0.5
        per_row = self.core.endswith("rows")
        core = None if self.core == "none" else (self.adapters, *one) if per_row else one
        operands = (
            normal(self.M, self.K, dtype=self.dtype),
            normal(self.N, self.K, dtype=self.dtype, scale=self.K**-0.5),
            normal(self.r, self.K, dtype=factors, scale=self.K**-0.5),
            None if core is None else normal(*core, dtype=core_dtype, scale=spread),
            normal(self.N, self.r, dtype=factors, scale=self.r**-0.5),
            normal(self.N, dtype=self.dtype) if self.bias else None,
        )
        ids = torch.randint(-1, self.adapters, (self.M,), generator=g).to(device) if per_row else None
        block = self.r // self.groups
        shape = (self.groups, self.u // self.groups, block, block) if self.groups > 1 else (self.u, self.r, self.r)
        basis = normal(*shape, dtype=core_dtype, scale=self.r**-0.5) if mixed else None
        return operands, ids, basis


def with_zeros(basis):
    """P [u, r, r] of blocks [G, u / G, r / G, r / G], the rest being zero."""
    if basis is None or basis.dim() == 3:
        return basis
    zero = torch.zeros_like(basis[0, 0])
    blocks = range(len(basis))
    return torch.stack([torch.block_diag(*(P if g == h else zero for h in blocks)) for g in blocks for P in basis[g]])


def grads(function, operands, ids, basis, dy):
    """Y and the gradient of every operand, by name."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in operands]
    y = function(*leaves, ids, basis=basis)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}


def exact(operands, ids, basis, dy):
    """The reference in fp64 on the operands as they are, rounded already."""
    wide = [None if t is None else t.double() for t in operands]
    basis = None if basis is None else with_zeros(basis.double())
    return grads(reference.adapted_linear, wide, ids, basis, dy.double())


def torch_own(operands, ids, basis, dy):
    """The reference in the operands' own dtype: PyTorch's error, which sets the measure."""
    dtype = operands[0].dtype
    *operands, basis = (None if t is None else t.to(dtype) for t in (*operands, basis))
    return grads(reference.adapted_linear, operands, ids, with_zeros(basis), dy)


def packed(weight, nested=True, kind="nf4", block=64):
    """The weight in four bits: as the operator takes it, and what it means, as bitsandbytes says."""
    import bitsandbytes as bnb

    from tinylora.ops.four_bit import FourBit

    codes, state = bnb.functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
    parameter = bnb.nn.Params4bit(codes, quant_state=state, bnb_quantized=True, blocksize=block, quant_type=kind)
    return FourBit.of(parameter), bnb.functional.dequantize_4bit(codes, state)


def assert_as_good_as_torch(name, ours, exact, torch_own, factor=2.0):
    """Our error against the exact answer may be at most `factor` times PyTorch's own in the same dtype.

    torch_own: several results, where the largest error counts: of a few numbers that are long sums, one is luck.
    """
    if exact.numel() == 0:
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        return
    ours_err = (ours.double() - exact).abs().max().item()
    several = torch_own if isinstance(torch_own, list) else [torch_own]
    torch_err = max((one.double() - exact).abs().max().item() for one in several)
    floor = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert ours_err <= factor * torch_err + floor, (
        f"{name}: error {ours_err:.3e}, PyTorch's own {torch_err:.3e}, allowed {factor}x + {floor:.1e}"
    )


class BoundByTorch:
    """What `bound.Bound` promises, without a launch: the operands' memory as it lay then, read anew at every call."""

    def __init__(self, calls: list, weight, down, core, up, bias, basis):
        self.calls, self.known = calls, set()
        self.operands = [None if t is None else t.detach() for t in (weight, down, core, up, bias)]
        self.basis = None if basis is None else basis.detach()

    def forward(self, x, want_z):
        if (x.shape, want_z) not in self.known:
            return None
        self.calls.append("forward")
        y, z = eager.forward(x.detach(), *self.operands, None, self.basis)
        return y, z if want_z else None

    def backward(self, dys, z):
        if tuple(dy.shape for dy in dys) not in self.known:
            return None
        self.calls.append("backward")
        weight, down, core, up, _ = self.operands
        weights = weight.split([dy.shape[1] for dy in dys])
        return eager.backward_of_parts(dys, z, weights, down, core, up, None, self.basis, True, True)

    def learn(self, x, want_z):
        self.known.add((x.shape, want_z))

    def learn_backward(self, dys, z):
        self.known.add(tuple(dy.shape for dy in dys))
