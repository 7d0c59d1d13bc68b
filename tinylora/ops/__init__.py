"""The operator under every adapter, Y = X Wᵀ + b + ((X Dᵀ) Cᵀ) Uᵀ, and its paths: see `adapted_linear`."""

from tinylora.ops.linear import adapted_linear

__all__ = ["adapted_linear"]
