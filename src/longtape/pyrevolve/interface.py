"""What pyrevolve's users derive from or hand over: operators, checkpoints, storages and a profiler."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from longtape.actions import Action, Advance, Restore, Reverse, Store, Turn
from longtape.errors import UsageError

Array = npt.NDArray[Any]

_NAMES: dict[type, str] = {Advance: "advance", Store: "takeshot", Restore: "restore", Reverse: "reverse"}
"""Actions as pyrevolve's profiler calls them."""


class Operator:
    """Base of forward and reverse operators."""

    def apply(self, **kwargs: Any) -> Any:
        """Run steps ``t_start … t_end - 1``, in either direction."""
        raise NotImplementedError(f"{type(self).__name__}.apply(t_start, t_end)")


class Checkpoint:
    """Base of what says where the live state is."""

    @property
    def dtype(self) -> Any:
        """Of all arrays; not relied on."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Entries of one state; not relied on."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of one state, from `size` and `dtype`; not relied on."""
        return int(self.size * np.dtype(self.dtype).itemsize)

    def get_data(self, timestep: int) -> Iterable[Array]:
        """The arrays that hold state `timestep`; they are read at once."""
        raise NotImplementedError

    def get_data_location(self, timestep: int) -> Iterable[Array]:
        """The live arrays that state `timestep` is to be put into."""
        return self.get_data(timestep)


class Profiler:
    """Milliseconds and calls of what a revolver did, by section and action, as pyrevolve reports them."""

    def __init__(self) -> None:
        self.timings: dict[str, dict[str, float]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self._section = "forward"

    def on_action(self, action: Action, began: float, ended: float) -> None:
        if isinstance(action, Turn):
            self._section = "reverse"
        elif name := _NAMES.get(type(action)):
            timings, counts = self.timings.setdefault(self._section, {}), self.counts.setdefault(self._section, {})
            timings[name] = timings.get(name, 0.0) + 1e3 * (ended - began)
            counts[name] = counts.get(name, 0) + 1

    def on_transfer(self, kind: str, key: Any, nbytes: int, began: float, ended: float) -> None:
        pass

    def summary(self) -> str:
        """For people."""
        lines = ["*" * 16]
        for section, actions in self.timings.items():
            lines.append(f"In section {section}:")
            lines += [f"\tAction {name}: {ms:f} ({self.counts[section][name]})" for name, ms in actions.items()]
        return "\n".join([*lines, "*" * 16])


class Storage:
    """A number of checkpoints that may be kept somewhere; holds nothing itself.

    Args:
        size_ckp: Entries of a checkpoint; what `get_data` returns is what counts.
        n_ckp: How many checkpoints.
        dtype: Of the entries.
        profiler: Ignored, as are `wd`, `rd` (costs are measured) and `name`.
        wd: Write cost.
        rd: Read cost.
        name: For people.
    """

    def __init__(
        self, size_ckp: int, n_ckp: int, dtype: Any, profiler: Any = None, wd: float = 0, rd: float = 0, name: str = ""
    ) -> None:
        self.size_ckp, self.n_ckp, self.dtype = size_ckp, n_ckp, dtype
        self.profiler, self.wd, self.rd, self.name = profiler, wd, rd, name


class NumpyStorage(Storage):
    """Checkpoints in memory."""


class BytesStorage(Storage):
    """Checkpoints in memory, uncompressed.

    Args:
        size_ckp: As for `Storage`.
        n_ckp: As for `Storage`.
        dtype: As for `Storage`.
        compression: Must be None.
        auto_pickle: Ignored: nothing is pickled.
        profiler: Ignored.
        wd: Ignored.
        rd: Ignored.
        name: For people.
    """

    def __init__(
        self,
        size_ckp: int,
        n_ckp: int,
        dtype: Any,
        compression: Any = None,
        auto_pickle: bool = False,
        profiler: Any = None,
        wd: float = 0,
        rd: float = 0,
        name: str = "ByteStorage",
    ) -> None:
        refuse_compression(compression)
        super().__init__(size_ckp, n_ckp, dtype, profiler, wd, rd, name)


class DiskStorage(Storage):
    """Checkpoints in one anonymous scratch file in `filedir`; `singlefile` and `keepfiles` change nothing."""

    def __init__(
        self,
        size_ckp: int,
        n_ckp: int,
        dtype: Any,
        profiler: Any = None,
        filedir: str | os.PathLike[str] | None = "./",
        singlefile: bool = True,
        wd: float = 0,
        rd: float = 0,
        name: str = "DiskStorage",
        keepfiles: bool = False,
    ) -> None:
        super().__init__(size_ckp, n_ckp, dtype, profiler, wd, rd, name)
        self.filedir = "./" if filedir is None else filedir


def refuse_compression(compression: Any) -> None:
    """Raise `UsageError` for anything but none."""
    if compression is not None and (not isinstance(compression, dict) or compression.get("scheme") is not None):
        raise UsageError(f"states are kept as they are: compression must be None, not {compression!r}")
