"""The gate: outputs and gradients against fp64 before anything is timed. Who is wrong gets no time."""

import torch
from torch import Tensor, nn

from bench.providers import BARE, Factors, Provider, plain

ROWS = 64  # of y and dx, spread over all M: the rows are independent, and fp64 on all of them would take the longest


class WrongResult(Exception):
    """A provider's output or gradient is further from fp64 than the rule allows."""


class Gate:
    """Error of y, dx and dv of one layer and one x: at most twice PyTorch's own (the three matmuls in the base's
    dtype) plus one unit in the last place of the largest entry.

    y = x Wᵀ + b + s Uᵀ with s = z Cᵀ, z = x Dᵀ; dx = dy W + (t C) D with t = dy U; dvᵢ = <Pᵢ, tᵀ z>.
    """

    def __init__(self, linear: nn.Linear, factors: Factors, x: Tensor, dy: Tensor, weight64: Tensor):
        self.x, self.dy = x, dy
        self.rows = torch.linspace(0, x.shape[0] - 1, min(ROWS, x.shape[0]), device=x.device).long()
        f = factors
        down, up, basis, v = (t.double() for t in (f.down, f.up, f.basis, f.v))
        core = torch.einsum("i,ijk->jk", v, basis)
        x64, dy64 = x.detach().double(), dy.double()
        z, t = x64 @ down.T, dy64 @ up
        y = x64[self.rows] @ weight64.T
        if linear.bias is not None:
            y += linear.bias.double()
        dx = dy64[self.rows] @ weight64
        delta_y, delta_dx = (z @ core.T @ up.T)[self.rows], (t @ core @ down)[self.rows]
        dv = torch.einsum("ijk,jk->i", basis, t.T @ z)
        self.exact = {"y": y + delta_y, "dx": dx + delta_dx, "dv": dv}
        self.exact_bare = {"y": y, "dx": dx}
        # dv sums M products that may cancel: even exact fp32 factors leave it this much of fp32's rounding.
        eps = torch.finfo(torch.float32).eps
        self.floor_dv = eps * torch.einsum("ijk,jk->i", basis.abs(), t.abs().T @ z.abs()).max().item()

        leaf = f.v.float().requires_grad_()
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
            floor = torch.finfo(self.x.dtype).eps * self.exact[key].abs().max().item()
            allowed = 2 * self.own[key] + floor + (self.floor_dv if key == "dv" else 0)
            if not error <= allowed:  # NaN must not pass
                raise WrongResult(f"{name}: error {error:.1e}, allowed {allowed:.1e}")
        if provider.name != BARE and provider.trains is None:
            raise WrongResult("no adapter trains")
