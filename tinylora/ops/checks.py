"""What can be wrong with the operands of `adapted_linear`, said where a user can still see which one it was."""

import math

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CAST = FLOATS[1:]  # what autocast casts


# Asked once: in a graph torch 2.11 cannot.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(d))


def autocasts(device: str) -> bool:
    """Whether autocast acts on this device; torch's own question is an error where there is none (meta)."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def check(x, weight, down, core, up, bias, adapter_ids, basis) -> None:
    """ValueError, naming the operand, what came and what was expected, unless everything fits together."""
    try:
        good = fits(x, weight, down, core, up, bias, adapter_ids, basis)
    except (AttributeError, TypeError):  # something that is no tensor
        good = False
    if not good:
        explain(x, weight, down, core, up, bias, adapter_ids, basis)


def fits(x, weight, down, core, up, bias, adapter_ids, basis) -> bool:
    """Whether the common case holds, in two microseconds; False only sends the operands to `explain`."""
    if adapter_ids is not None or weight.dim() != 2 or down.dim() != 2:
        return False
    (N, K), (r, _), dtype, device = weight.shape, down.shape, weight.dtype, weight.device
    if basis is None:
        core_fits = core is None or core.shape == (r, r) or core.shape == (r,)
    else:
        core_fits = core is not None and core.dim() == 1 and basis.shape == (*core.shape, r, r) and len(core) > 0
        core_fits = core_fits and basis.dtype in FLOATS and basis.device == device and not basis.requires_grad
    return (
        core_fits
        and r > 0
        and x.shape[-1:] == (K,)
        and down.shape[1] == K
        and up.shape == (N, r)
        and x.dtype == dtype
        and dtype in FLOATS
        and down.dtype in FLOATS
        and up.dtype in FLOATS
        and x.device == device
        and down.device == device
        and up.device == device
        and (core is None or (core.dtype in FLOATS and core.device == device))
        and (bias is None or (bias.shape == (N,) and bias.dtype == dtype and bias.device == device))
    )


def explain(x, weight, down, core, up, bias, adapter_ids, basis) -> None:
    """The whole check: the first thing that does not fit is a ValueError."""
    operands = {"x": x, "weight": weight, "down": down, "up": up}
    operands |= {"core": core, "bias": bias, "adapter_ids": adapter_ids, "basis": basis}
    for name, t in operands.items():
        if not (hasattr(t, "dtype") and hasattr(t, "dim")) and (t is not None or name in ("x", "weight", "down", "up")):
            raise ValueError(f"{name} is a {type(t).__name__}, expected a tensor")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected two dimensions (N, K)")
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., {K}): weight is {(N, K)} (N, K)")
    if down.dim() != 2 or down.shape[1] != K or down.shape[0] < 1:
        raise ValueError(f"down has shape {tuple(down.shape)}, expected (r, {K}): weight is {(N, K)} (N, K)")
    r = down.shape[0]

    def wants(name, t, shape, because):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {shape}: {because}")

    wants("up", up, (N, r), f"weight is {(N, K)} (N, K) and down is {(r, K)} (r, K)")
    if bias is not None:
        wants("bias", bias, (N,), f"weight is {(N, K)} (N, K)")
    if basis is None:
        one, why = (r, r), f"down is {(r, K)} (r, K)"
    else:
        if core is None:
            raise ValueError("basis came without a core, expected core of shape (u,): the v of Σ v_i P_i")
        if basis.requires_grad:
            raise ValueError("basis requires a gradient, expected a frozen one: only v trains")
        if basis.dim() != 3 or basis.shape[1:] != (r, r) or basis.shape[0] < 1:
            raise ValueError(f"basis has shape {tuple(basis.shape)}, expected (u, {r}, {r}): down is {(r, K)} (r, K)")
        one, why = (basis.shape[0],), f"basis is {tuple(basis.shape)} (u, r, r)"
    if adapter_ids is None:
        if core is not None and (basis is not None or core.shape != (r,)):  # [r] is the diagonal of one
            diagonal = "" if basis is not None else f"; {(r,)} is a diagonal one"
            wants("core", core, one, f"{why}{diagonal}; a core per row, {('A', *one)}, needs adapter_ids")
    else:
        if core is None:
            raise ValueError(f"adapter_ids came without a core, expected core of shape {('A', *one)}")
        if core.dim() != len(one) + 1 or core.shape[1:] != one or core.shape[0] < 1:
            raise ValueError(f"core has shape {tuple(core.shape)}, expected {('A', *one)} with adapter_ids: {why}")
        if adapter_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"adapter_ids has dtype {adapter_ids.dtype}, expected torch.int64 or torch.int32")
        if tuple(adapter_ids.shape) not in (tuple(x.shape[:-1]), (math.prod(x.shape[:-1]),)):
            raise ValueError(
                f"adapter_ids has shape {tuple(adapter_ids.shape)}, expected {tuple(x.shape[:-1])}: one per row of x"
            )

    autocast = autocasts(x.device.type)
    named = {"weight": weight, "x": x, "bias": bias, "down": down, "core": core, "up": up, "basis": basis}
    for name, t in named.items():
        if t is None:
            continue
        if t.dtype not in FLOATS:
            raise ValueError(f"{name} has dtype {t.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if name in ("x", "bias") and t.dtype != weight.dtype and not autocast:
            raise ValueError(f"{name} has dtype {t.dtype}, expected weight's {weight.dtype}")
        if t.device != weight.device:
            raise ValueError(f"{name} is on {t.device}, expected weight's device {weight.device}")
    if adapter_ids is not None and adapter_ids.device != weight.device:
        raise ValueError(f"adapter_ids is on {adapter_ids.device}, expected weight's device {weight.device}")
