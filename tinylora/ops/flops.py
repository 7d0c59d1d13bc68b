"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: a product [M, K] by [K, N] is 2 M N K."""

import torch

from tinylora.ops import linear, siblings  # noqa: F401  # which define them


def _forward(x, weights, down, core, up, biases, adapter_ids, basis, *_, **__) -> int:
    (M, K), (N, r) = x, up
    return 2 * M * (N * K + r * (N + K) + _at_rank(core, basis, r))


def _backward(dy, x, z, weight, down, core, up, adapter_ids, basis, need, *_, **__) -> int:
    M, (N, r), K = dy[0], up, down[1]
    need_x, need_weight, need_down, need_core, need_up, _ = need
    products = (need_x + need_weight) * N * K + (need_x or need_down or need_core) * N * r
    at_rank = ((need_x or need_down) + need_core) * _at_rank(core, basis, r)
    return 2 * M * (products + (need_x + need_down) * r * K + at_rank + need_up * N * r)


def _backward_of_siblings(dy, z, weights, down, core, up, adapter_ids, basis, need_x, need_core, *_, **__) -> int:
    need = need_x, False, False, need_core, False, False
    return _backward(dy, None, z, None, down, core, up, adapter_ids, basis, need)


def _at_rank(core, basis, r: int) -> int:
    """Of z Cᵀ, t C or tᵀ z; no diagonal and no identity is a product."""
    return r * r if core is not None and (len(core) > 1 or basis is not None) else 0


def register() -> None:
    """Have torch's counter know the operators. It counts nothing of an operator that it does not know, and says so
    nowhere. Not on import: the counter imports Triton, a fifth of a second.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    ours = torch.ops.tinylora
    formulas = {
        ours.adapted_linear: _forward,
        ours.adapted_linears: _forward,
        ours.adapted_linear_backward: _backward,
        ours.adapted_linears_backward: _backward_of_siblings,
    }
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
