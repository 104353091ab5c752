"""Steps that call ``torch.compile``, or operators that compile what they are given, while they are watched.

TorchDynamo refuses to trace where a dispatch mode watches, and remembers the refusal for
the rest of the process: what was compiled inside a watched step could never be compiled
again, nor could ``torch.cond`` and its like be used.  So nothing is compiled there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside it ``torch.compile`` does nothing; everywhere in the process, so hold it briefly."""
    from torch._dynamo import eval_frame

    before = eval_frame._set_stance(eval_frame.DynamoStance("force_eager"))
    try:
        yield
    finally:
        eval_frame._set_stance(before)
