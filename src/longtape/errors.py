"""Every error Longtape raises, in one tree.

::

    LongtapeError
    ├── UsageError (ValueError)        what was asked cannot be done as asked
    │   ├── BudgetError                too little memory; says the least that would do
    │   ├── StepError                  a step broke its contract
    │   │   └── ReplayError            run again, a step gave something else
    │   ├── ResumeError                the files of a resumable run are not of the run that was asked for
    │   └── ScheduleError              a schedule made elsewhere broke its own rules; names the action and the step
    ├── StorageError (OSError)         a tier could not do what was asked
    │   ├── StorageFull                no space left, or the stated limit is reached
    │   └── DamagedBlock               a block that was read is not what was written
    ├── DeviceError (RuntimeError)     an accelerator failed; nothing of the sweep can be trusted
    ├── StateError (RuntimeError)      a call out of order, such as reverse() before forward()
    └── PlanError (AssertionError)     a plan broke its own rules: a defect in Longtape

`longtape.torch` adds two for its own use, `CaptureFailed` and `RoomExceeded`, which lead to
a step being run as it is and do not reach the user.

A message has four parts: what was asked, which limit it met, at which step, tier
or path, and what to do about it.  An exception raised by the user's own step
keeps its type and gains a note that says where in the sweep it happened.
"""

from __future__ import annotations


class LongtapeError(Exception):
    """Base of everything Longtape raises on its own behalf."""


class UsageError(LongtapeError, ValueError):
    """An argument, or a combination of arguments, that cannot be honoured."""


class BudgetError(UsageError):
    """The memory budget cannot hold what even the slowest plan needs."""


class StepError(UsageError):
    """The user's step changed shape, dtype or structure, or broke another part of its contract."""


class ReplayError(StepError):
    """A state that was computed again, or fetched, is not what it was the first time.

    ``verify=True`` compares all of them; a `Sweep` always compares a few, a scan in PyTorch its last step.

    Args:
        message: What is wrong.
        step: The step that gave another result; for a snapshot that has changed, its number.
        leaf: What differs: ``state[i]`` of a `Sweep`, or the path of the leaf in the carry of a scan.
    """

    def __init__(self, message: str, *, step: int, leaf: str) -> None:
        super().__init__(message)
        self.step = step
        self.leaf = leaf


class ResumeError(UsageError):
    """What is in the resume directory cannot be gone on with: another run's, or held by another process."""


class ScheduleError(UsageError):
    """A checkpointing schedule made elsewhere broke its own rules, or ended before its work was done."""


class StorageError(LongtapeError, OSError):
    """A storage tier failed; carries `errno` where the system gave one."""


class StorageFull(StorageError):
    """No space left on the device, or the disk limit the user stated is reached."""


class DamagedBlock(StorageError):
    """The bytes read back are not those that were written: torn, flipped, swapped or truncated."""


class DeviceError(LongtapeError, RuntimeError):
    """An accelerator did not do what it was asked to: lost, or out of order in a way that is not its caller's."""


class StateError(LongtapeError, RuntimeError):
    """A call that is out of order."""


class PlanError(LongtapeError, AssertionError):
    """A plan asked for something illegal.  This is a defect in the plan, never in the user's data."""
