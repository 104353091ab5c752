"""Numbers that schedules made by Longtape are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import longtape

pytest.importorskip("checkpoint_schedules")
from longtape.schedules import AsyncMultistage, Revolve


def test_numpy_numbers() -> None:
    plain = AsyncMultistage(40, 4, 9, forward=0.1, reverse=0.2, write=0.5, read=0.3)
    given = AsyncMultistage(
        np.int64(40), np.int32(4), np.uint8(9), forward=np.float64(0.1), reverse=0.2, write=np.float64(0.5), read=0.3
    )
    assert repr(list(plain)) == repr(list(given))
    assert Revolve(np.int64(30), np.int16(3)).steps_run == Revolve(30, 3).steps_run


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), "1", True, 0.0, None])
def test_seconds_that_make_no_sense(seconds: Any) -> None:
    with pytest.raises(longtape.UsageError, match="write must be a positive number of seconds"):
        AsyncMultistage(10, 3, write=seconds)
