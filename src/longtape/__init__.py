"""Longtape differentiates sequences longer than memory.

The user states a memory budget and a scratch directory; states are stored and
fetched behind compute, and what lies between two stored states is recomputed by the
optimal schedule.  Front ends: `Sweep` here for NumPy buffers, `longtape.torch.scan`
for PyTorch, `longtape.devito.Sweep` for Devito, `longtape.pyrevolve` in pyrevolve's place.
"""

from longtape.compose import describe
from longtape.errors import (
    BudgetError,
    DamagedBlock,
    LongtapeError,
    PlanError,
    ReplayError,
    ResumeError,
    ScheduleError,
    StateError,
    StepError,
    StorageError,
    StorageFull,
    UsageError,
)
from longtape.plan.choose import Choice, choose
from longtape.plan.costs import Costs, Problem
from longtape.report import Report
from longtape.sweep import Model, Sweep

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Choice",
    "Costs",
    "DamagedBlock",
    "LongtapeError",
    "Model",
    "PlanError",
    "Problem",
    "ReplayError",
    "Report",
    "ResumeError",
    "ScheduleError",
    "StateError",
    "StepError",
    "StorageError",
    "StorageFull",
    "Sweep",
    "UsageError",
    "choose",
    "describe",
]
