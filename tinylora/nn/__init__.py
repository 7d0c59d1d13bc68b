from tinylora.nn.linear import Linear

__all__ = ["Linear"]
