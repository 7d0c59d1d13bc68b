from tinylora.ops.linear import adapted_linear

__all__ = ["adapted_linear"]
