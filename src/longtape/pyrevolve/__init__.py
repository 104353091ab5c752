"""pyrevolve's interface, run by Longtape: import this in its place.

Thin: it lays the arrays of a user's `Checkpoint` out in a slot and back, turns numbers
of checkpoints into bytes, and hands the rest to a run.  Names, order of arguments and
the protocol of calls are those of pyrevolve 2.2.8 (Kukreja et al.,
https://github.com/devitocodes/pyrevolve); what is new is given by keyword.

The protocol, for N steps.  ``apply_forward`` runs every step once with
``fwd_operator.apply(t_start=…, t_end=…)``.  ``apply_reverse`` goes through the steps from
the last to the first; it calls ``fwd_operator.apply(t_start=k, t_end=k+1)`` and then
``rev_operator.apply(t_start=k, t_end=k+1)``, so that all levels of a cyclic time buffer
are there.  ``checkpoint.get_data(k)`` gives the arrays that make up state k, which
exists before step k, and ``checkpoint.get_data_location(k)`` where they go; with cyclic
buffers these depend on k.

``apply_forward`` calls the forward operator for each of the first two steps alone, to time
them unless costs are given; then for longer ranges.  It runs no step twice.  ``apply_reverse`` runs
steps again, so an operator that adds up a misfit or counts its calls must do so in
``apply_forward`` only.  Three states are held beside the stated memory until the first
two steps have been stored.

What differs from pyrevolve: the state is what `get_data` returns, in any number of
arrays and dtypes, and `Checkpoint.size` is not relied on; which states are kept, and
where, is chosen from measured costs; storage that fails costs time and not the gradient.
"""

from __future__ import annotations

import sys

from longtape.errors import StateError
from longtape.pyrevolve.interface import (
    BytesStorage,
    Checkpoint,
    DiskStorage,
    NumpyStorage,
    Operator,
    Profiler,
)
from longtape.pyrevolve.revolvers import (
    BaseRevolver,
    DiskRevolver,
    MemoryRevolver,
    MultiLevelRevolver,
    Revolver,
    SingleLevelRevolver,
    adjust,
)

__all__ = [
    "BaseRevolver",
    "BytesStorage",
    "Checkpoint",
    "DiskRevolver",
    "DiskStorage",
    "MemoryRevolver",
    "MultiLevelRevolver",
    "NumpyStorage",
    "Operator",
    "Profiler",
    "Revolver",
    "SingleLevelRevolver",
    "adjust",
    "install",
]

__version__ = "2.2.8"
"""The version of pyrevolve whose interface this is."""


def install() -> None:
    """Have ``import pyrevolve`` give this module, here and in libraries such as Devito.

    Raises:
        StateError: pyrevolve, or Devito, was imported before: what they hold on to would not change.
    """
    here = sys.modules[__name__]
    if sys.modules.get("pyrevolve") is here:
        return
    for name in ("pyrevolve", "devito"):
        if name in sys.modules:
            raise StateError(f"{name} is imported already; call longtape.pyrevolve.install() before it is")
    sys.modules["pyrevolve"] = here
