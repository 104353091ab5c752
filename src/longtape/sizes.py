"""Reads and writes amounts of bytes and seconds as people write them.

Owns the parsing and the wording; knows nothing else of Longtape but its errors.
Pure functions: any thread may call them.

Invariant: `parse_bytes` never guesses; what it does not understand it refuses.
"""

from __future__ import annotations

import operator
import re
from decimal import Decimal

from longtape.errors import UsageError

_AMOUNT = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,2})?)\s*(?P<unit>[a-z]*)", re.IGNORECASE | re.ASCII)
_PREFIXES = "kmgtpe"
_UNITS: dict[str, int] = {"": 1, "b": 1, "byte": 1, "bytes": 1}
for _power, _prefix in enumerate(_PREFIXES, start=1):
    _UNITS |= {_prefix: 1000**_power, f"{_prefix}b": 1000**_power}
    _UNITS |= {f"{_prefix}i": 1024**_power, f"{_prefix}ib": 1024**_power}
_LARGEST = 2**63 - 1


def parse_bytes(value: float | str) -> int:
    """The number of bytes that `value` means.

    ``"2GiB"`` is 2·1024³ and ``"2GB"`` is 2·1000³; the ``B`` may be left out, the case
    does not matter, and a space or underscores may help the reader: ``"64 MiB"``,
    ``"1.5G"``, ``"1_000"``, ``"1e9"``.  In text a fraction of a byte is dropped; a float must be whole.

    Raises:
        UsageError: `value` is negative, too large for a file offset, or not an amount of bytes.
    """
    if isinstance(value, str):
        nbytes = _parse_text(value)
    elif isinstance(value, bool):
        raise _not_understood(value)
    else:
        whole = whole_number(int(value) if isinstance(value, float) and value.is_integer() else value)
        if whole is None:
            raise _not_understood(value)
        nbytes = whole
    if nbytes < 0:
        raise UsageError(f"an amount of bytes cannot be negative, but {value!r} is")
    if nbytes > _LARGEST:
        raise UsageError(f"{value!r} is more than the {_LARGEST} bytes that a file can hold; give less")
    return nbytes


def whole_number(value: object) -> int | None:
    """The integer that `value` is, of Python or of a framework; None if it is none (True is none)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _parse_text(text: str) -> int:
    if text.strip().startswith("-"):
        raise UsageError(f"an amount of bytes cannot be negative, but {text!r} is")
    match = _AMOUNT.fullmatch(text.strip())
    factor = None if match is None else _UNITS.get(match["unit"].lower())
    if match is None or factor is None:
        raise _not_understood(text)
    return int(Decimal(match["number"].replace("_", "")) * factor)


def _not_understood(value: object) -> UsageError:
    return UsageError(
        f"{value!r} is not an amount of bytes; write a whole number, or text such as '2GiB', '500 MB' or '1.5G'"
    )


def format_bytes(nbytes: float) -> str:
    """An amount of bytes for people, in binary units: ``format_bytes(1536)`` is ``"1.5 KiB"``."""
    if nbytes < 0:
        return "-" + format_bytes(-nbytes)
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    amount, unit = float(nbytes), "B"
    for prefix in _PREFIXES.upper():
        amount, unit = amount / 1024, f"{prefix}iB"
        if amount < 999.5:  # 1000 MiB reads better as 0.977 GiB
            break
    return f"{_three_digits(amount)} {unit}"


def format_seconds(seconds: float) -> str:
    """A time for people: ``"850 ns"``, ``"12.3 ms"``, ``"4.56 s"``, ``"2 min 05 s"``, ``"3 h 04 min"``."""
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 59.95:
        return _short_time(seconds)
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _short_time(seconds: float) -> str:
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{_three_digits(seconds * scale)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(amount: float) -> str:
    """Three significant digits without trailing zeros: 1.5, 64, 0.977, 123."""
    if amount >= 99.95:
        return f"{amount:.0f}"
    text = f"{amount:.1f}" if amount >= 9.995 else f"{amount:.2f}" if amount >= 0.9995 else f"{amount:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text else text
