"""What a function can reach: the values beside its arguments that decide what it computes.

Owns the walk through closures, defaults, the globals that code names, the helpers it
calls, and the attributes of the objects behind them; gives each value a path for people,
such as ``closure variable 'net'.dropout.p``.  Knows no framework: anything with a shape and
a dtype is an array.

What it does not see: the code and the state of installed packages and of the standard
library, attributes that no code within reach names, and whatever C code keeps to itself.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from xxhash import xxh3_128

from longtape.protocols import Bytes

MOST_PLACES = 100_000
"""Beyond so many the walk ends; a step that reaches a whole data set as Python objects is seen in part."""

_ALWAYS_NAMED = frozenset({"__call__", "forward", "training"})
"""What a framework calls or reads without the user's code naming it."""

_NEVER_CALLED = frozenset({"__init__", "__new__", "__repr__", "__str__", "__del__", "__init_subclass__"})

_OPAQUE = ("logging.", "threading.", "torch.amp.", "tqdm.")
"""Packages whose objects say what a program does, not what it computes; a logger leads to all others.

Blocks of autocast note in themselves what they put back.
"""

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, slice, range, type(Ellipsis), enum.Enum, np.generic, np.dtype,
    pathlib.PurePath,
)  # fmt: skip

Kind = Literal["plain", "array", "code", "object"]


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A binding, and what was bound there when it was looked at."""

    path: str
    kind: Kind
    """``plain``: compared by value; ``array``: by content; ``code``: a function's; ``object``: followed further."""
    value: Any
    owner: Any = None
    """A cell, a dict, or an object with attributes; None where the value cannot be bound anew."""
    key: Any = None

    def read(self) -> Any:
        """What is bound there now; raises `LookupError` where nothing is."""
        if isinstance(self.owner, types.CellType):
            try:
                return self.owner.cell_contents
            except ValueError:
                raise LookupError(self.path) from None
        if isinstance(self.owner, dict):
            return self.owner[self.key]
        if isinstance(self.owner, type):  # not what its descriptors give
            return vars(self.owner)[self.key]
        try:
            return getattr(self.owner, self.key)
        except AttributeError:
            raise LookupError(self.path) from None

    def write(self, value: Any) -> None:
        """Bind another value."""
        if isinstance(self.owner, types.CellType):
            self.owner.cell_contents = value
        elif isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


def places(*roots: Any) -> Iterator[Place]:
    """Every binding that the roots (functions, methods, callable objects, models) can reach, each once.

    Lists, sets and tuples of plain values count as one plain value.
    """
    names = set(_ALWAYS_NAMED)
    while True:  # code met late may name attributes of objects met before
        before = len(names)
        found = list(_Walk(names).run(roots))
        if len(names) == before:
            return iter(found)


def digests(roots: Iterable[Any], bytes_of: Callable[[Any], Bytes], *, but: Iterable[Any] = ()) -> dict[str, str]:
    """A short hash for each path that has a value.

    Args:
        roots: As in `places`.
        bytes_of: The elements of an array that is not NumPy's, in row-major order.
        but: Arrays that are left out.
    """
    found: dict[str, str] = {}
    left_out = {id(array) for array in but}
    for place in places(*roots):
        if id(place.value) in left_out:
            continue
        digest = xxh3_128(f"{place.kind} {_type_name(place.value)}".encode())
        if place.kind == "plain":
            digest.update(text_of(place.value).encode())
        elif place.kind == "code":
            add_code(digest, place.value)
        elif place.kind == "array":
            value = place.value
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            if value.dtype == object:  # whose bytes are addresses
                value = np.frombuffer(text_of(np.asarray(value).tolist()).encode(), np.uint8)
            own = isinstance(value, np.ndarray)
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8) if own else bytes_of(value)
            digest.update(data.data)
        path, count = place.path, 2
        while path in found:  # such as globals of one name in two files
            path, count = f"{place.path} ({count})", count + 1
        found[path] = digest.hexdigest()[:12]
    return found


def text_of(value: Any) -> str:
    """A plain value as text: the same in every process, and another for another value."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({', '.join(sorted(map(text_of, value)))})"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(map(text_of, value))})"
    return repr(value)


def add_code(digest: Any, code: Any) -> None:
    """Add what a function does, as far as Python can tell: its code, not what it closes over."""
    if not isinstance(code, types.CodeType):
        digest.update(b"not Python")
        return
    digest.update(code.co_code)
    digest.update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            add_code(digest, constant)
        else:
            digest.update(text_of(constant).encode())


class _Walk:
    """One pass; adds the names that code mentions to `names`, and follows the attributes that it names already."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._seen: dict[int, Any] = {}  # which keeps what is made on the way, so that identities last
        self._pending: list[tuple[Place, bool]] = []

    def run(self, roots: Iterable[Any]) -> Iterator[Place]:
        for root in roots:
            self._add(_root_name(root), root)
        count = 0
        while self._pending and count < MOST_PLACES:
            place, follow = self._pending.pop()
            count += 1
            yield place
            if follow:
                self._follow(place.path, place.value)

    def _add(self, path: str, value: Any, owner: Any = None, key: Any = None) -> None:
        kind = _kind_of(value)
        follow = kind == "object" and id(value) not in self._seen
        if follow:
            self._seen[id(value)] = value
        self._pending.append((Place(path, kind, value, owner, key), follow))

    def _follow(self, path: str, value: Any) -> None:
        match value:
            case types.MethodType():
                self._names.add(value.__name__)
                self._add(path, value.__func__)
                self._add(f"{path}.self" if path.startswith("step") else f"{path} → self", value.__self__)
            case types.FunctionType():
                self._function(path, value)
            case functools.partial():
                self._add(path, value.func)
                for name, part in (("args", value.args), ("keywords", value.keywords)):
                    self._add(f"{path}.{name}", part)
            case list() | tuple() | set() | frozenset():
                for number, item in enumerate(value):
                    self._add(f"{path}[{number}]", item)
            case dict():
                for key, item in list(value.items()):
                    self._add(f"{path}[{key!r}]", item, value, key)
            case types.ModuleType():
                if not _is_library(getattr(value, "__file__", None)):
                    self._named(path, value.__dict__)
            case type():
                self._class(path, value)
            case property() | classmethod() | staticmethod() | functools.cached_property():
                inner = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", None)
                self._add(path, inner)
            case _:
                self._object(path, value)

    def _function(self, path: str, function: types.FunctionType) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._add(f"{path} → wrapped", wrapped)
        code = function.__code__
        if _is_library(code.co_filename):
            return
        self._pending.append((Place(f"the code of {path}", "code", code, function, "__code__"), False))
        mentioned = _names_in(code)
        self._names |= mentioned
        start = "" if path == "step" else f"{path} → "
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it may not be bound yet
                self._add(f"{start}closure variable {name!r}", cell.cell_contents, cell)
        for name in sorted(mentioned & function.__globals__.keys()):
            self._add(f"global {name!r}", function.__globals__[name], function.__globals__, name)
        self._defaults(start, function)
        self._named(path, function.__dict__)

    def _defaults(self, start: str, function: types.FunctionType) -> None:
        for attribute in ("__defaults__", "__kwdefaults__"):
            given = getattr(function, attribute)
            if given:
                self._add(f"{start}defaults of {function.__name__}", given, function, attribute)

    def _named(self, path: str, attributes: dict[str, Any]) -> None:
        """Those attributes that code within reach names."""
        for name in sorted(self._names & attributes.keys()):
            self._add(f"{path}.{name}", attributes[name], attributes, name)

    def _class(self, path: str, kind: type) -> None:
        if _is_library_class(kind):
            return
        for name, value in list(vars(kind).items()):
            dunder = name.startswith("__") and callable(value) and name not in _NEVER_CALLED
            if (name in self._names and not name.startswith("__")) or dunder or name in _ALWAYS_NAMED:
                self._add(f"{path}.{name}", value, kind, name)
        for base in kind.__bases__:
            if not _is_library_class(base):
                self._add(f"{path} → {base.__name__}", base)

    def _object(self, path: str, value: Any) -> None:
        if f"{type(value).__module__}.".startswith(_OPAQUE):
            return
        kind, attributes = type(value), getattr(value, "__dict__", None)
        for name in ("__wrapped__", "py_func"):  # compiled by JAX, Numba and others
            if name in (attributes or ()) or any(name in vars(base) for base in kind.__mro__):
                self._add(f"{path} → function", getattr(value, name, None))
        is_library = _is_library_class(kind)
        if not is_library:
            self._add(f"class {kind.__qualname__}", kind)
        if isinstance(attributes, dict):
            for name in ("_parameters", "_buffers", "_modules"):  # of a PyTorch module
                for key, part in list(attributes.get(name, {}).items()):
                    self._add(f"{path}.{key}", part, attributes[name], key)
            if is_library:
                for name in [name for name in attributes if not name.startswith("_")]:
                    self._add(f"{path}.{name}", attributes[name], attributes, name)
            else:
                self._named(path, attributes)
        for base in kind.__mro__:
            slots = getattr(base, "__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                is_open = _is_library_class(base) and not name.startswith("_")
                if (is_open or name in self._names) and hasattr(value, name):
                    self._add(f"{path}.{name}", getattr(value, name), value, name)


def _kind_of(value: Any) -> Kind:
    if isinstance(value, _PLAIN) or _type_name(value) in ("torch.dtype", "torch.device"):
        return "plain"
    if isinstance(value, types.CodeType):
        return "code"
    if not isinstance(value, type) and hasattr(type(value), "shape") and hasattr(type(value), "dtype"):
        return "array"
    if isinstance(value, (tuple, list, set, frozenset)) and all(_kind_of(item) == "plain" for item in value):
        return "plain"
    return "object"


def _root_name(root: Any) -> str:
    if isinstance(root, (types.FunctionType, types.MethodType, functools.partial)) or callable(root):
        return "step"
    return "model"


@lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """What code names: globals and attributes, and strings that could be such names."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names_in(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
    return frozenset(found)


@lru_cache(maxsize=4096)
def _is_library(path: str | None) -> bool:
    """Whether a file belongs to Python, to an installed package or to Longtape itself; no file: built in."""
    if path is None or path.startswith("<frozen"):
        return True
    return path.startswith(_library_directories())


@lru_cache(maxsize=1)
def _library_directories() -> tuple[str, ...]:
    known = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return (*(f"{directory}/" for directory in known if directory), f"{pathlib.Path(__file__).parent}/")


def _is_library_class(kind: type) -> bool:
    if kind.__module__ == "builtins":
        return True
    module = sys.modules.get(kind.__module__)
    return module is not None and module.__name__ != "__main__" and _is_library(getattr(module, "__file__", None))


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
