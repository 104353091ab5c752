"""What tells one run from another: hashes of bytes and of code.

No security: a fast checksum against mistakes, not against forgery.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

from xxhash import xxh3_128

from longtape.protocols import Bytes


def of_bytes(arrays: Iterable[Bytes]) -> str:
    """Of arrays of bytes, their number and lengths included."""
    digest = xxh3_128()
    for array in arrays:
        digest.update(array.nbytes.to_bytes(8, "little"))
        digest.update(array.data)
    return digest.hexdigest()


def of_code(*functions: Any) -> str:
    """Of what functions do, as far as Python can tell: their code, not what they close over."""
    digest = xxh3_128()
    for function in functions:
        _add_code(digest, _code(function))
    return digest.hexdigest()


def _code(function: Any) -> Any:
    function = getattr(function, "__func__", function)
    return getattr(function, "__code__", None)


def _add_code(digest: Any, code: Any) -> None:
    if not isinstance(code, types.CodeType):
        digest.update(b"not Python")
        return
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant)
        elif not isinstance(constant, frozenset):  # whose order is another one in every process
            digest.update(repr(constant).encode())
