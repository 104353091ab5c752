"""PyTorch: `scan` and `while_loop`, differentiable loops over steps in a fixed memory budget."""

from longtape.torch.loop import while_loop
from longtape.torch.scan import scan

__all__ = ["scan", "while_loop"]
