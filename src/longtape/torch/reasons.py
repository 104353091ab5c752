"""Why a capture failed, in one line, and nothing besides it on the user's screen.

This file owns the words for TorchDynamo's refusals, and keeps PyTorch's own remarks on
them out of the log: `CaptureFailed` says it.
"""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

from longtape.torch.graphs import CaptureFailed

_HERE = str(Path(__file__).parent)

_PLAIN_WORDS = {
    "Detected data-dependent branching": "the step branches on the values of a tensor",
    "does not support input mutations": "the step changes an argument or a closed-over tensor in place",
    "leaf Variable that requires grad": "the step changes an argument in place",
    "certain side effects": "the step changes Python objects from outside it",
    "recompile_limit": "the step takes another path, or meets other shapes or Python values, again and again",
}


def reason(error: BaseException) -> str:
    """One line that says why a capture failed, and where in the user's code."""
    cause: BaseException = error
    while not isinstance(cause, CaptureFailed):
        inner = getattr(cause, "inner_exception", None) or cause.__cause__
        if inner is None or type(cause).__name__ == "Unsupported":
            break
        cause = inner
    if isinstance(cause, CaptureFailed):
        return str(cause)
    text, said = str(cause), _in_plain_words(cause)
    if said is None:
        explanation = re.search(r"Explanation: (.+)", text)
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        said = f"{type(cause).__name__}: {explanation[1] if explanation else first}"
    frames = [f for f in re.findall(r'File "(.+?)", line (\d+)', str(error)) if not f[0].startswith(_HERE)]
    return said + (f" ({frames[-1][0]}:{frames[-1][1]})" if frames else "")


def _in_plain_words(cause: BaseException) -> str | None:
    return next((words for sign, words in _PLAIN_WORDS.items() if sign in f"{type(cause).__name__} {cause}"), None)


_OF_THE_MOMENT = {"MemoryError", "OutOfMemoryError", "InvalidCxxCompiler", "TorchRuntimeError", "RecursionError"}
"""Failures that say nothing of the step: too little memory, no compiler, data that an operator refuses."""


def is_lasting(error: BaseException) -> bool:
    """Whether the next call of the step would fail for the same reason, so that it need not be tried."""
    from torch._dynamo.exc import TorchDynamoException

    cause: BaseException | None = error
    known = False
    while cause is not None:
        if _in_plain_words(cause) is not None:
            return True
        names = {kind.__name__ for kind in type(cause).__mro__}
        if not names.isdisjoint(_OF_THE_MOMENT) or isinstance(cause, OSError) or "Observed exception" in str(cause):
            return False
        known = known or isinstance(cause, TorchDynamoException | CaptureFailed)
        cause = getattr(cause, "inner_exception", None) or cause.__cause__
    return known


class _Silence(logging.Filter):
    """Drops what PyTorch logs in a thread while that thread captures: `CaptureFailed` says it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not this_thread.capturing


class _Thread(threading.local):
    capturing = False


this_thread = _Thread()
_silence = _Silence()


def silence_loggers() -> None:
    """Put the filter on PyTorch's loggers; changing their levels around each sweep would cost more than many steps."""
    import torch._functorch.aot_autograd  # noqa: F401  its loggers must exist

    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.addFilter(_silence)
