"""PyTorch: `scan`, a differentiable loop over steps in a fixed memory budget."""

from longtape.torch.scan import scan

__all__ = ["scan"]
