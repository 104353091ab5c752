"""Around steps: autocast and PyTorch's defaults as at the call, whenever a step runs, and no cast that outlives it.

Autocast keeps the casts of weights until its block ends, in one table for the whole process.  A cast
that a step has made without gradients would stand for the weight from then on, in the reverse
sweep and in the user's own code, and the weight would lose its gradient without a word; one that
the user's code has made stands for it in the step.  So steps run with the table switched off, and
it is emptied around them: a step may enter an autocast of its own, which switches it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from longtape.torch.defaults import Defaults

without_autocast: Callable[[], AbstractContextManager[None]] = torch._C._DisableAutocast
"""Around a backward pass, whose operators have their dtypes already."""


class Ambient:
    """Autocast and PyTorch's defaults at the time of the call, to be the same whenever a step runs again.

    Args:
        devices: Types of the devices that steps may run on.
    """

    def __init__(self, devices: Iterable[str]) -> None:
        self._settings = [
            (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
            for device in sorted(set(devices))
        ]
        self.defaults = Defaults()
        self.is_trivial = not any(enabled for _, _, enabled in self._settings)

    def __str__(self) -> str:
        return str([] if self.is_trivial else self._settings)

    def __call__(self) -> ExitStack:
        """Enter it around a step, or around a sweep whose graphs hold the casts."""
        stack = self.defaults.restored()
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        if not self.is_trivial or self._is_on():
            for device, dtype, enabled in self._settings:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        return stack

    @contextmanager
    def off(self) -> Iterator[None]:
        """No autocast, which may be on where backward is called: operators of a backward pass have their dtypes."""
        with ExitStack() as stack:
            if self._is_on():
                for device, _, _ in self._settings:
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def _is_on(self) -> bool:
        return any(torch.is_autocast_enabled(device) for device, _, _ in self._settings)
