"""`while_loop`: a differentiable loop of unknown length, in a fixed memory budget.

Thin: a scan without inputs and outputs that ends where the condition says.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from longtape.compose import Hooks, Settings, refuse_lossy_verification
from longtape.errors import StepError, UsageError
from longtape.plan.choose import Choice
from longtape.protocols import Observer, Tier
from longtape.report import Report
from longtape.sizes import whole_number
from longtape.torch.autocast import Ambient
from longtape.torch.inputs import NoInputs, check_init
from longtape.torch.scan import CAPTURED_FROM, Call, Where
from longtape.torch.structure import Leaves, Structure, flatten, paths
from longtape.torch.transforms import graph_break, refuse_transforms


@graph_break
def while_loop(
    cond: Callable[[Any], Any],
    step: Callable[[Any], Any],
    init: Any,
    *,
    memory: int | str,
    host_memory: int | str | None = None,
    disk: str | os.PathLike[str] | None = None,
    disk_limit: int | str | None = None,
    max_steps: int | None = None,
    observers: Sequence[Observer] = (),
    tier: Tier | None = None,
    on_plan: Callable[[Choice], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
    capture: bool | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
    compress: str | None = None,
    compile: bool = False,
    independent: bool = False,
) -> Any:
    """Run ``carry = step(carry)`` while ``cond(carry)``, so that gradients fit in `memory`.

    The contract is that of ``jax.lax.while_loop``, with reverse-mode gradients: they reach `init`
    and every tensor the step closes over, as in `scan`.  Nothing about the number of steps is
    needed in advance; the report tells it.

    Args:
        cond: Takes the carry; returns a bool, or a tensor of one element.  Asked once before every
            step of the forward sweep, without gradients.  It must not change the carry or anything else, nor
            draw random numbers.
        step: Takes and returns the carry; under the same rules as in `scan`.
        init: The first carry; a pytree of tensors.  Never modified.
        memory: Most bytes held for snapshots, residuals and staging together; of the device's memory for a
            carry on a CUDA device.
        host_memory: As in `scan`: pinned memory of the host behind a CUDA device.
        disk: Directory for a private scratch file; None recomputes within memory.
        disk_limit: Most bytes of it.  When it is reached, what is stored is thinned.
        max_steps: Stop after so many steps even where `cond` still holds; None: never.
        observers: Objects with `on_action` and `on_transfer`.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        on_plan: Called with the chosen plan before the forward sweep.
        on_report: Called with the report of each reverse sweep; its `trace` tells what happened when.
        capture: As in `scan`; None captures the step unless `max_steps` is less than 256.
        verify: As in `scan`: compare states that are computed again, or fetched, with what they were.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is recomputed.
        compress: As in `scan`: codec for what goes to storage, used where it is predicted to pay.
        compile: As in `scan`: hand the captured graphs to PyTorch's compiler.
        independent: As in `scan`: the ranks are independent, no step communicates.

    Returns:
        The final carry; `init` as it is where `cond` does not hold for it.

    Raises:
        UsageError: An argument that cannot be honoured, or a transformation that would lose gradients.
        BudgetError: `memory` is less than one carry; or so much memory cannot be had of the device, or pinned.
        DeviceError: The device failed while the sweeps were running.
        StepError: The step breaks its contract, or `cond` does.
        ReplayError: As in `scan`.
        Exception: Whatever `step` or `cond` raises, with a note naming the step.
    """
    refuse_transforms("while_loop")
    leaves, carry = flatten(init)
    for position, leaf in enumerate(leaves):
        check_init(position, leaf)
    if max_steps is not None:
        most = whole_number(max_steps)
        if most is None or most < 0:
            raise UsageError(f"max_steps must be an integer of zero or more, or None, not {max_steps!r}")
        max_steps = most
    if verify:
        refuse_lossy_verification(compress)
    ends = _Ends(cond, carry, max_steps, Ambient(leaf.device.type for leaf in leaves))
    if ends(0, [leaf.detach() for leaf in leaves]):
        return init
    settings = Settings(
        memory,
        disk=disk,
        disk_limit=disk_limit,
        observers=tuple(observers),
        tier=tier,
        compress=compress,
        stuck_seconds=stuck_seconds,
        independent=independent,
    )
    where = Where.of(leaves, memory, host_memory, pipes=disk is not None or tier is not None)
    call = Call(_without_y(step), leaves, carry, NoInputs(), None, settings, Hooks(on_plan, on_report), where)
    call.title, call.ends, call.roots = "while_loop", ends, [step, cond]
    call.names = paths(init, "carry") if verify else None
    call.use_graphs(capture, compiles=compile, pays=max_steps is None or max_steps >= CAPTURED_FROM)
    return call.run()[0]


def _without_y(step: Callable[[Any], Any]) -> Callable[[Any, Any], tuple[Any, None]]:
    def scan_step(carry: Any, x: Any) -> tuple[Any, None]:
        return step(carry), None

    scan_step.users_step = step  # type: ignore[attr-defined]
    return scan_step


class _Ends:
    """Whether the loop ends before a step."""

    def __init__(self, cond: Callable[[Any], Any], carry: Structure, max_steps: int | None, ambient: Ambient) -> None:
        self._cond, self._carry, self._max_steps = cond, carry, max_steps
        self._ambient = ambient
        self._at_first: bool | None = None

    def __call__(self, step: int, carry: Leaves) -> bool:
        if step > 0 or self._at_first is None:
            ended = self._asked(step, carry)
            if step > 0:
                return ended
            self._at_first = ended
        return self._at_first

    def _asked(self, step: int, carry: Leaves) -> bool:
        if self._max_steps is not None and step >= self._max_steps:
            return True
        with torch.no_grad(), self._ambient():
            before = torch.get_rng_state() if step == 0 else None
            holds = self._cond(self._carry.build(carry))
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            raise StepError("cond draws random numbers, which would be others when the steps are run again")
        if isinstance(holds, torch.Tensor) and holds.numel() == 1:
            return not holds.item()
        if not isinstance(holds, bool):
            raise StepError(
                f"cond must return a bool or a tensor of one element, not {type(holds).__name__}: {holds!r:.80}"
            )
        return not holds
