"""What makes items smaller on their way to storage, and back.

Owns the names of codecs and what each does to bytes; must not know files, threads or
plans.  Workers call `encode` and `decode`, which let other threads run meanwhile.

Invariants: what `decode` gives is what `encode` was given, byte for byte, but for the
numbers that a stated bound allows to be rounded; only floating-point numbers that the
front end has named are ever rounded, never integers, flags or the state of a random
number generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from longtape.errors import UsageError
from longtape.protocols import Bytes, Floats

LOSSLESS = ("lz4", "zstd", "bitshuffle+lz4", "bitshuffle+zstd")
_RELATIVE = "relative:"
_MANTISSA = {4: 23, 8: 52}
_HEADER_NBYTES = 16
LARGEST_NBYTES = (1 << 31) - (1 << 20)
"""More than this, and no codec takes it in one piece."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to make items smaller.

    Args:
        name: As the user wrote it.
        bound: Largest relative error of a rounded number; None: nothing is rounded.
    """

    name: str
    bound: float | None
    _packer: Any
    """The library's codec."""

    def encode(self, data: Bytes, floats: Sequence[Floats] = ()) -> Bytes:
        """The bytes to store in place of `data`, which is left as it is.

        Args:
            data: One item.
            floats: Where in it floating-point numbers lie, all that may be rounded.
        """
        width = floats[0].itemsize if floats else 4
        if self.bound is not None and floats:
            data = _rounded(data, floats, self.bound)
        packed: bytes = self._packer.encode(_as_numbers(data, width))
        return np.frombuffer(packed, np.uint8)

    def decode(self, packed: Bytes, out: Bytes) -> None:
        """Fill `out` with the item that was encoded.

        Raises:
            ValueError: `packed` is not an item of this length.
        """
        # Blosc's header says in its second word how much there is: less would leave part of `out` as it was.
        holds = int.from_bytes(packed[4:8].tobytes(), "little")
        if packed.nbytes < _HEADER_NBYTES or holds != out.nbytes:
            raise ValueError(f"it holds {holds} bytes, not {out.nbytes}")
        try:
            self._packer.decode(packed, out=out)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


def parse_codec(name: str) -> Codec:
    """The codec that a user's `compress` names.

    ``"lz4"``, ``"zstd"``, ``"bitshuffle+lz4"`` and ``"bitshuffle+zstd"`` keep every byte.
    ``"relative:1e-4+bitshuffle+zstd"`` first rounds each floating-point number of 4 or 8 bytes
    so that it is off by at most a ten-thousandth of its size.

    Raises:
        UsageError: There is no such codec, its bound makes no sense, or the library is missing.
    """
    bound, rest = None, name if isinstance(name, str) else ""
    if rest.startswith(_RELATIVE):
        text, _, rest = rest.removeprefix(_RELATIVE).partition("+")
        bound = _parse_bound(text, name)
    if rest not in LOSSLESS:
        raise UsageError(
            f"compress={name!r} is no codec; choose one of {', '.join(map(repr, LOSSLESS))}, or put a bound on the "
            "relative error of floating-point numbers before it, as in 'relative:1e-4+bitshuffle+zstd'"
        )
    try:
        import numcodecs
    except ImportError as error:
        raise UsageError(f"compress={name!r} needs numcodecs; pip install 'longtape[compress]'") from error
    shuffle = numcodecs.Blosc.BITSHUFFLE if rest.startswith("bitshuffle") else numcodecs.Blosc.NOSHUFFLE
    # Level 1: storage is to be outrun, not spared.  The library takes the width of numbers from the array.
    blosc = numcodecs.Blosc(rest.removeprefix("bitshuffle+"), clevel=1, shuffle=shuffle)
    return Codec(name, bound, blosc)


def _parse_bound(text: str, name: str) -> float:
    try:
        bound = float(text)
    except ValueError:
        bound = 0.0
    if not 2.0**-52 <= bound < 1.0:
        raise UsageError(f"compress={name!r}: the bound must be a number from 2.3e-16 to below 1, such as 1e-4")
    return bound


def _as_numbers(data: Bytes, width: int) -> npt.NDArray[Any]:
    """The bytes as numbers of a width, where they are a whole number of them: shuffling wants to know."""
    return data.view(f"u{width}") if data.nbytes % width == 0 else data


def _rounded(data: Bytes, floats: Sequence[Floats], bound: float) -> Bytes:
    """A copy whose floating-point numbers are rounded to the fewest mantissa bits that keep the bound.

    Rounded to k bits of mantissa, to nearest, a normal number is off by at most 2^-(k+1) of its size.
    Numbers too small to be normal are off by at most that share of the smallest normal one.
    """
    from numcodecs import BitRound

    kept = max(0, ceil(-log2(bound)) - 1)
    copy = data.copy()
    for run in floats:
        numbers = copy[run.start : min(run.stop, copy.nbytes)].view(f"f{run.itemsize}")
        if kept >= _MANTISSA[run.itemsize]:
            continue
        with np.errstate(invalid="ignore"):
            rounded = BitRound(kept).encode(numbers).view(numbers.dtype)
            # Rounding the bits of inf or NaN, or the largest numbers upwards, would make other values of them.
            if np.isfinite(rounded).all() and np.isfinite(numbers).all():
                numbers[:] = rounded
    return copy
