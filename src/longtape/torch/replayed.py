"""The last step's results in small, to be compared when it is run again for its adjoint.

The first window of the reverse sweep ends in a state that is known.  A step that draws from
generators of its own, counts its calls where nobody sees it, or reads a clock, comes out
elsewhere.  Sums in another order, as of parallel sums, are no difference.
"""

from __future__ import annotations

import math

import torch

from longtape.errors import ReplayError
from longtape.torch.structure import Leaves

MOST_NUMBERS = 4096
"""Of a leaf with more elements, the sums over so many parts are kept."""


class LastResults:
    """What the forward sweep ended with.

    Args:
        step: The last step.
        carry: Leaves that it returned.
        y: Leaves that it returned beside the carry.
    """

    def __init__(self, step: int, carry: Leaves, y: Leaves) -> None:
        self.step = step
        self._carry, self._y = [_Sums(leaf) for leaf in carry], [_Sums(leaf) for leaf in y]

    def difference(self, other: LastResults) -> str | None:
        """The first leaf that is another one, beyond rounding."""
        for name, ours, theirs in (("carry", self._carry, other._carry), ("y", self._y, other._y)):
            for position, (one, another) in enumerate(zip(ours, theirs, strict=True)):
                if not one.agrees_with(another):
                    return f"leaf {position} of the {name}"
        return None

    def check(self, carry: Leaves, y: Leaves) -> None:
        """Compare with what came out when the step was run again, from where its window began.

        Raises:
            ReplayError: A leaf differs.
        """
        leaf = self.difference(LastResults(self.step, carry, y))
        if leaf is not None:
            raise ReplayError(
                f"step {self.step}, or one shortly before it, gave another {leaf} when it was run again for its "
                "adjoint. The gradient would be that of steps that were never run. Likely causes: random numbers that "
                "are not PyTorch's, a count of calls, the time, or memory that was written to since; pass such things "
                "in xs or in the carry. verify=True finds the first step that differs",
                step=self.step,
                leaf=leaf,
            )


class _Sums:
    """A leaf, or sums over parts of it that miss no element."""

    def __init__(self, leaf: torch.Tensor) -> None:
        self._dtype = leaf.dtype
        self._sums = _sums(leaf)

    def agrees_with(self, other: _Sums) -> bool:
        ours, theirs, dtype = self._sums, other._sums, self._dtype
        if ours is None or theirs is None or torch.equal(ours, theirs):
            return True
        if not (dtype.is_floating_point or dtype.is_complex):
            return False
        tolerance = 3.0 * math.sqrt(torch.finfo(dtype).eps)
        size = float(torch.nan_to_num(ours).abs().max())
        return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def _sums(leaf: torch.Tensor) -> torch.Tensor | None:
    if leaf.layout is not torch.strided or leaf.is_quantized:
        return None
    with torch.no_grad():
        flat = leaf.detach().reshape(-1)
        wide = torch.complex128 if leaf.is_complex() else torch.float64 if leaf.is_floating_point() else torch.int64
        if flat.numel() <= MOST_NUMBERS:
            return flat.to(wide, copy=True)
        each = flat.numel() // MOST_NUMBERS
        whole = flat[: each * MOST_NUMBERS].view(MOST_NUMBERS, each).sum(1, dtype=wide)
        return torch.cat([whole, flat[each * MOST_NUMBERS :].sum(dtype=wide).reshape(1)])
