"""Devito operators: a forward operator, a reverse operator, wavefields and a budget in, the gradient out."""

from longtape.devito.sweep import Sweep

__all__ = ["Sweep"]
