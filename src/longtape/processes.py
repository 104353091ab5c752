"""Whether this process is one of several that compute together.

Owns the ways in which that shows: MPI, `torch.distributed`, JAX's processes.  Looks only at what
is loaded already: it imports no framework and starts no backend.

Until ranks agree on what they do next, each of them times, plans and recovers by itself.  They
then run a step a different number of times, or in another order, and a collective in the step
waits for a rank that never comes, or is answered with the data of another step.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

from longtape.errors import UsageError

_RANKS_OF_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which launchers of MPI say how many ranks they started."""


def require_independent(independent: bool) -> None:
    """Refuse to run beside other ranks, unless the caller says that they are independent.

    Raises:
        UsageError: There are several, and nobody said so.
    """
    if independent:
        return
    found = _company()
    if found is not None:
        raise UsageError(
            f"{found}, and each of them would time its steps, choose its plan and recover from faults by itself: a "
            "step that communicates (a halo exchange, an all-reduce) would wait for ranks that run another step, or "
            "compute with their data, so the run would hang or the gradient be wrong. If no step communicates, say so "
            "with independent=True; if one does, run it in a single process"
        )


def _company() -> str | None:
    """What shows that there are several processes, in words; None: nothing does."""
    for look in (_mpi4py, _devito, _libmpi, _torch, _jax):
        found = look()
        if found is not None:
            return found
    return None


def _mpi4py() -> str | None:
    ranks = _ranks_of_mpi4py()
    return f"MPI runs {ranks} ranks" if ranks is not None and ranks > 1 else None


def _ranks_of_mpi4py() -> int | None:
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return None
    return int(mpi.COMM_WORLD.Get_size())


def _devito() -> str | None:
    devito = sys.modules.get("devito")
    configuration: Any = getattr(devito, "configuration", None)
    if configuration is None or not configuration["mpi"] or _ranks_of_mpi4py() == 1:
        return None
    return "Devito's MPI is on (DEVITO_MPI, or configuration['mpi']), so its operators exchange halos between ranks"


def _libmpi() -> str | None:
    """MPI that was initialised without mpi4py, by a library in C or Fortran."""
    ranks = max((int(text) for name in _RANKS_OF_LAUNCHERS if (text := os.environ.get(name, "")).isdigit()), default=1)
    if ranks < 2 or _ranks_of_mpi4py() is not None:
        return None
    return f"MPI runs {ranks} ranks" if any(map(_is_initialized, _loaded_libraries())) else None


def _loaded_libraries() -> set[str]:
    """Paths of the MPI libraries in this process."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.rstrip().rpartition(" ")[2] for line in maps if "libmpi" in line}
    except OSError:
        return set()
    return {path for path in paths if os.path.basename(path).startswith(("libmpi.", "libmpi_abi.", "libmpich."))}


def _is_initialized(path: str) -> bool:
    flag = ctypes.c_int(0)
    try:
        ctypes.CDLL(path).MPI_Initialized(ctypes.byref(flag))  # it is loaded, and may be asked at any time
    except (OSError, AttributeError):
        return False
    return bool(flag.value)


def _torch() -> str | None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    ranks = int(distributed.get_world_size())
    return f"torch.distributed runs {ranks} ranks" if ranks > 1 else None


def _jax() -> str | None:
    jax = sys.modules.get("jax")
    bridge = sys.modules.get("jax._src.xla_bridge")
    is_initialized: Callable[[], bool] | None = getattr(bridge, "backends_are_initialized", None)
    if jax is None or is_initialized is None or not is_initialized():
        return None
    ranks = int(jax.process_count())
    return f"JAX runs {ranks} processes" if ranks > 1 else None
