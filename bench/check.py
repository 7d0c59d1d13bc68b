"""The gate: outputs and gradients against fp64 before anything is timed. Who is wrong gets no time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.providers import BARE, Factors, Provider, plain

ROWS = 64  # of y and dx, spread over all M: the rows are independent, and fp64 on all of them would take the longest


class WrongResult(Exception):
    """A provider's output or gradient is further from fp64 than the rule allows."""


def reason(error: Exception) -> str:
    """The note of a row that has no time because of this."""
    why = "wrong" if isinstance(error, WrongResult) else f"failed: {type(error).__name__}"
    return " ".join(f"{why}: {error}".split())[:200]


def why_not(error: Exception) -> str:
    """The same, but that what is not installed is not measured, and takes no earlier measurement's place."""
    return f"not measured: {error}" if isinstance(error, ImportError) else reason(error)


def some_rows(M: int, device: torch.device) -> Tensor:
    """The rows that are compared."""
    return torch.linspace(0, M - 1, min(ROWS, M), device=device).long()


def allowance(own: float, exact: Tensor, dtype: torch.dtype) -> float:
    """The error that the rule allows: twice PyTorch's own, plus one unit in the last place of the largest entry."""
    return 2 * own + torch.finfo(dtype).eps * exact.abs().max().item()


@dataclass
class Exact:
    """One layer in fp64: y and dx at some rows, dv over all, and the frozen layer's own y and dx.

    y = x Wᵀ + b + s Uᵀ with s = z Cᵀ, z = x Dᵀ; dx = dy W + (t C) D with t = dy U; dvᵢ = <Pᵢ, tᵀ z>.
    """

    y: Tensor
    dx: Tensor
    dv: Tensor
    bare_y: Tensor
    bare_dx: Tensor
    floor_dv: float  # dv sums M products that may cancel: even exact fp32 factors leave it this much of fp32's rounding

    @classmethod
    def of(cls, linear: nn.Linear, factors: Factors, x: Tensor, dy: Tensor, weight64: Tensor, rows: Tensor) -> "Exact":
        f = factors
        down, up, basis, v = (t.double() for t in (f.down, f.up, f.basis, f.v))
        core = torch.einsum("i,ijk->jk", v, basis)
        x64, dy64 = x.detach().double(), dy.double()
        z, t = x64 @ down.T, dy64 @ up
        y = x64[rows] @ weight64.T
        if linear.bias is not None:
            y += linear.bias.double()
        dx = dy64[rows] @ weight64
        delta_y, delta_dx = (z @ core.T @ up.T)[rows], (t @ core @ down)[rows]
        dv = torch.einsum("ijk,jk->i", basis, t.T @ z)
        eps = torch.finfo(torch.float32).eps
        floor = eps * torch.einsum("ijk,jk->i", basis.abs(), t.abs().T @ z.abs()).max().item()
        return cls(y + delta_y, dx + delta_dx, dv, y, dx, floor)


class Gate:
    """Error of y, dx and dv of one layer and one x: at most twice PyTorch's own (the three matmuls in the base's
    dtype) plus one unit in the last place of the largest entry."""

    def __init__(self, linear: nn.Linear, factors: Factors, x: Tensor, dy: Tensor, weight64: Tensor):
        self.x, self.dy = x, dy
        self.rows = some_rows(x.shape[0], x.device)
        exact = Exact.of(linear, factors, x, dy, weight64, self.rows)
        self.exact = {"y": exact.y, "dx": exact.dx, "dv": exact.dv}
        self.exact_bare = {"y": exact.bare_y, "dx": exact.bare_dx}
        self.floor_dv = exact.floor_dv

        f, leaf = factors, factors.v.float().requires_grad_()
        own = Provider("", lambda x: plain(x, linear.weight, linear.bias, f.down, f.up, f.basis.float(), leaf), leaf)
        self.own = self.errors(own)
        for name in ("y", "dx"):
            assert self.own[name] <= 0.1 * self.exact[name].abs().max().item(), f"PyTorch's own {name} is wrong"

    def errors(self, provider: Provider) -> dict[str, float]:
        """Largest error against fp64, by output."""
        y, dx, *dv = provider.gradients(self.x, self.dy)
        got = {"y": y[self.rows], "dx": dx[self.rows]} | ({"dv": dv[0].reshape(-1)} if dv else {})
        want = self.exact if provider.trains is not None else self.exact_bare
        return {name: (got[name].double() - want[name]).abs().max().item() for name in got}

    def admit(self, provider: Provider) -> None:
        """Raise WrongResult unless the provider's numbers are as good as PyTorch's own."""
        with torch.no_grad():
            y = provider.forward(self.x)[self.rows].double()
        want = (self.exact if provider.trains is not None else self.exact_bare)["y"]
        errors = {"y without gradients": (y - want).abs().max().item()} | self.errors(provider)
        for name, error in errors.items():
            key = name.split()[0]
            allowed = allowance(self.own[key], self.exact[key], self.x.dtype)
            allowed += self.floor_dv if key == "dv" else 0
            if not error <= allowed:  # NaN must not pass
                raise WrongResult(f"{name}: error {error:.1e}, allowed {allowed:.1e}")
        if provider.name != BARE and provider.trains is None:
            raise WrongResult("no adapter trains")
