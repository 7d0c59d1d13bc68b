"""What the operator means, in a few lines of torch. Tests hold every other path against it in fp64."""

from torch import Tensor


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    core: Tensor | None,
    up: Tensor,
    bias: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    basis: Tensor | None = None,
) -> Tensor:
    """Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ, in the dtype of its inputs; shapes as in `tinylora.ops.adapted_linear`."""
    if basis is not None:  # TinyLoRA: core is v, and C = Σᵢ vᵢ Pᵢ
        core = (core[..., None, None] * basis).sum(-3)
    z = x @ down.T
    if adapter_ids is not None:  # one core per row; -1 is no adapter
        rows = core[adapter_ids.reshape(x.shape[:-1]).clamp(min=0)]
        s = (rows @ z.unsqueeze(-1)).squeeze(-1)
        s = s.masked_fill((adapter_ids.reshape(x.shape[:-1]) < 0).unsqueeze(-1), 0)
    else:
        s = z if core is None else z * core if core.dim() == 1 else z @ core.T
    y = x @ weight.T + s @ up.T
    return y if bias is None else y + bias
