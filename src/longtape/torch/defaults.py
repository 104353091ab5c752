"""PyTorch's defaults at the time of the call, to be the same whenever a step runs again."""

from __future__ import annotations

from contextlib import ExitStack

import torch


class Defaults:
    """The default dtype and device, and whether operators must be deterministic."""

    def __init__(self) -> None:
        self._dtype, self._device = torch.get_default_dtype(), torch.get_default_device()
        self._deterministic = _deterministic()

    def restored(self) -> ExitStack:
        """A context with these defaults; costs little where they are as they were."""
        stack = ExitStack()
        if (dtype := torch.get_default_dtype()) is not self._dtype:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(self._dtype)
        if torch.get_default_device() != self._device:
            stack.enter_context(self._device)
        if (flags := _deterministic()) != self._deterministic:
            stack.callback(_set_deterministic, flags)
            _set_deterministic(self._deterministic)
        return stack


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(flags: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
