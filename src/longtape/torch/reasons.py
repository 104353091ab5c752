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
    text = str(cause)
    said = next((words for sign, words in _PLAIN_WORDS.items() if sign in text or sign in type(cause).__name__), None)
    if said is None:
        explanation = re.search(r"Explanation: (.+)", text)
        first = next((line.strip() for line in text.splitlines() if line.strip()), "")
        said = f"{type(cause).__name__}: {explanation[1] if explanation else first}"
    frames = [f for f in re.findall(r'File "(.+?)", line (\d+)', str(error)) if not f[0].startswith(_HERE)]
    return said + (f" ({frames[-1][0]}:{frames[-1][1]})" if frames else "")


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
