"""(Y, z) through the kernels: the thin pass where there is one, then the frozen matmul with the correction.

Both directions of the operator are this one function: dX = dY W + ((dY U) C) D is Y on (Wᵀ, Uᵀ, Cᵀ, Dᵀ).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylora.kernels import tiles
from tinylora.kernels.core import Core
from tinylora.kernels.decode import plan_decode
from tinylora.kernels.gemm import fits_descriptors, plan_gemm
from tinylora.kernels.thin import plan_thin
from tinylora.ops.dispatch import triton_version
from tinylora.ops.ways import fp32_setting, kernel_capability, kind, kind_of_core, known, precision, remembered

# The kernels' steps along what is summed are int32: up to 256 numbers, this far apart.
FAR = 1 << 23

Operand = Tensor | Sequence[Tensor]


class Way(NamedTuple):
    """How operands of one kind are computed.

    run:  a function of (x, w, down, core, up, bias, want_z, use_z), as `linear`
    bind: a function of (w, down, core, up, bias), which stay, that gives a function of (x, want_z, use_z), or None
          where they cannot be bound; that function gives None where it could not launch
    """

    run: Callable[..., tuple[Tensor, Tensor | None]]
    bind: Callable[..., Callable | None] = lambda *_: None


def linear(
    x: Operand,
    w: Tensor,
    down: Tensor,
    core: Core,
    up: Tensor,
    bias: Tensor | None,
    choice: tiles.Choice | None = None,
    pin: bool = False,
    want_z: bool = True,
    use_z: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(Y, z) with Y = X Wᵀ + s Uᵀ + b, z = X Dᵀ in fp32, s = z Cᵀ, for x of [..., K]; z is None unless wanted.

    core.transposed: the same with (Wᵀ, Dᵀ, Uᵀ) for (W, D, U), which are given as they lie: views cost microseconds.
    choice: forces what `tiles.choose` would decide. pin: one choice for every M, and for every layout of x.
    x may come in column blocks; then there is no bias.
    use_z: is given z as soon as its launch is queued: what it launches then runs beside the matmul.
    """
    way = way_of(x, w, down, core, up, bias, choice, pin)
    return way.run(x, w, down, core, up, bias, want_z, use_z)


def way_of(
    x: Operand, w: Tensor, down: Tensor, core: Core, up: Tensor, bias: Tensor | None, choice=None, pin=False
) -> Way:
    """How `linear` computes these operands: found once for each kind of them."""
    first = x if isinstance(x, Tensor) else x[0]
    # Whatever the way depends on, and whatever Triton's compiler specialises on, stands here (kernels/launch.py).
    key = (
        (first.shape, first.stride(), first.dtype, first.device, first.data_ptr() % 16 == 0)
        if first is x
        else tuple([(*kind(t), t.data_ptr() % 16 == 0) for t in x]),
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        w.data_ptr() % 16 == 0,
        down.shape,
        down.stride(),
        down.dtype,
        down.device,
        up.stride(),
        up.dtype,
        up.device,
        kind_of_core(core),
        None if bias is None else (bias.dtype, bias.device),
        fp32_setting(),
        choice,
        pin,
    )
    way = known.get(key)
    if way is None:
        way = remembered(key, first.device, lambda: _find(x, w, down, core, up, bias, choice, pin))
    return way


def _find(x, w, down, core, up, bias, choice, pin) -> Way:
    if core.transposed:
        w, down, up = w.T, down.T, up.T
    first = x if isinstance(x, Tensor) else x[0]
    if max(t.stride(-1) for t in (first, w, down)) >= FAR:
        return _nearer(choice, pin)
    if first.shape[:-1].numel() == 0:
        return _nothing((*first.shape[:-1], w.shape[0]), len(down))
    found = _Launches(x, w, down, core, up, bias, choice, pin)
    return Way(found.run) if found.copies else Way(found.run, found.bind)


def _nearer(choice: tiles.Choice | None, pin: bool) -> Way:
    """The way of operands whose numbers lie too far apart: copies."""

    def run(x, w, down, core, up, bias, want_z, use_z):
        x = x.contiguous() if isinstance(x, Tensor) else [t.contiguous() for t in x]
        return linear(x, w.contiguous(), down.contiguous(), core, up, bias, choice, pin, want_z, use_z)

    return Way(run)


def _nothing(shape: tuple[int, ...], r: int) -> Way:
    """The way of no rows."""

    def run(x, w, down, core, up, bias, want_z, use_z):
        y = (x if isinstance(x, Tensor) else x[0]).new_empty(shape)
        z = torch.empty(0, r, dtype=torch.float32, device=y.device)
        if use_z is not None:
            use_z(z)
        return y, z

    return Way(run)


class _Launches:
    """`linear` on operands of one kind that there are rows of: what is launched, planned once.

    w, down and up come turned where the core is transposed; calls come with them as they lie.
    """

    def __init__(self, x, w, down, core: Core, up, bias, choice: tiles.Choice | None, pin: bool):
        xs = [x.reshape(-1, x.shape[-1])] if isinstance(x, Tensor) else list(x)
        first = xs[0]
        self.M, (N, K), self.r = len(first), w.shape, len(down)
        self.K = K
        self.shape = (*x.shape[:-1], N) if isinstance(x, Tensor) else (self.M, N)  # Y's
        self.device, capability, fp32 = first.device, kernel_capability(first.device), precision()
        # x lies so that no view of it is in rows: its rows are copied in every call.
        self.copies = isinstance(x, Tensor) and first.data_ptr() != x.data_ptr()
        self.pin = pin
        if pin:
            # A view of x that bulk copies refuse must not take another path than its rows do elsewhere.
            self.copies = self.copies or first.stride() != (K, 1) or first.data_ptr() % 16
            if self.copies:
                xs = [first.new_empty(self.M, K)]
        rows = xs[0] if len(xs) == 1 else xs
        bulk, turned = fits_descriptors(rows, w), w.stride(1) != 1
        if pin:
            choice = tiles.pinned(N, K, self.r, first.dtype, capability, bulk, turned)
        elif choice is None:
            choice = tiles.choose(self.M, N, K, self.r, first.dtype, capability, bulk, turned, len(xs))
        self.parts, self.transposed = len(xs), core.transposed
        self.few, self.library = isinstance(choice.main, tiles.Decode), choice.main is None
        self.descriptors = not (self.few or self.library) and choice.main.descriptors
        # Few rows: a copy of them is nothing beside W.
        self.joined = len(xs) > 1 and (self.few or (self.descriptors and _one_loop_only(capability)))
        self.thin, width = None, None
        if choice.thin is not None:
            self.thin, width = plan_thin(rows, down, core, choice.thin, fp32, want_s=True), choice.thin.width
        whole = first.new_empty(self.M, K) if self.joined else rows  # what it will look like
        if self.few:
            self.main = plan_decode(whole, w, down, core, up, bias, width, choice.main, fp32)
        else:
            y = torch.empty(self.M, N, dtype=first.dtype, device=self.device)
            if self.library:
                self.main = plan_gemm(None, None, y, width, up, None, choice.expand, fp32)
            else:
                self.main = plan_gemm(whole, w, y, width, up, bias, choice.main, fp32)

    def run(self, x, w, down, core, up, bias, want_z, use_z) -> tuple[Tensor, Tensor | None]:
        if self.copies:
            x = x.reshape(self.M, self.K)
            x = x.clone(memory_format=torch.contiguous_format) if self.pin else x
        # Before the thin pass: what comes after it may start with it, but for s, so all that it reads must be there.
        whole = torch.cat(tuple(x), 1) if self.joined else x
        y = _by_library(x, w.T if self.transposed else w, bias) if self.library else None
        z = s = None
        if self.thin is not None:
            z, s = self.thin.run(x, down, core, want_z)
            if use_z is not None:
                use_z(z)
        elif want_z:
            z = self._new_z()
        if self.library:
            self.main.run(None, None, y, s, up, None)
            return y.resize_(self.shape) if self.copies else y, z
        y = (x if isinstance(x, Tensor) else x[0]).new_empty(self.shape)
        if self.few:
            self.main.run(whole, w, down, core, up, bias, y, z, s)
            if use_z is not None and self.thin is None:
                use_z(z)
        else:
            self.main.run(whole, w, y, s, up, bias)
        return y, z

    def bind(self, w, down, core, up, bias) -> Callable | None:
        """`run` on operands that stay, as `Way` says."""
        few, library, joined, shape = self.few, self.library, self.joined, self.shape
        main = self.main.bind(w, down, core, up, bias) if few else self.main.bind(w, up, None if library else bias)
        thin = None if self.thin is None else self.thin.bind(down, core)
        if main is None or (self.thin is not None and thin is None):
            return None
        if joined and not (few and thin is None):  # one of the two launches would read x whole, the other in parts
            return None
        by_library = (w.T if self.transposed else w), bias
        alone, descriptors, new_z = self.parts == 1, self.descriptors, self._new_z

        def bound(x, want_z, use_z):
            xs = (x,) if alone else (torch.cat(tuple(x), 1),) if joined else tuple(x)
            places = [t.data_ptr() for t in xs]
            for at in places:
                if at % 16:
                    return None
            places += [0] * (3 - len(places))
            y = _by_library(x, *by_library) if library else None
            z, s, at_s = None, None, 0
            if thin is not None:
                found = thin(*places, want_z)
                if found is None:
                    return None
                z, s = found
                at_s = s.data_ptr()
                if use_z is not None:
                    use_z(z)
            elif want_z:
                z = new_z()
            if y is None:
                y = xs[0].new_empty(shape)
            if few:
                done = main(places[0], y.data_ptr(), 0 if z is None else z.data_ptr(), at_s)
            elif descriptors:
                done = main(*(*xs, 0, 0)[:3], y, at_s)
            else:
                done = main(*places, y.data_ptr(), at_s)
            if not done:
                return None
            if use_z is not None and thin is None:
                use_z(z)
            return y, z

        return bound

    def _new_z(self) -> Tensor:
        return torch.empty((self.M, self.r), dtype=torch.float32, device=self.device)


def _one_loop_only(capability: tuple[int, int] | None) -> bool:
    """Whether the long kernel must not take column blocks: of three loops in a row Triton 3.6 makes an empty kernel for
    10.0. 3.9 does not; the versions between were not looked at."""
    return capability is not None and capability[0] == 10 and triton_version() < (3, 9)


def _by_library(x: Operand, w: Tensor, bias: Tensor | None) -> Tensor:
    """X Wᵀ + b by torch."""
    if isinstance(x, Tensor):
        return F.linear(x, w, bias)
    parts = w.split([t.shape[1] for t in x], 1)
    y = torch.mm(x[0], parts[0].T)
    for t, part in zip(x[1:], parts[1:], strict=True):
        y.addmm_(t, part.T)
    return y
