"""Differentiable loops over JAX functions, in a memory budget stated in bytes."""

from longtape.jax.scan import scan, while_loop

__all__ = ["scan", "while_loop"]
