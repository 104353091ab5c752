"""The example finds what it looks for, or at least comes nearer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import tsunami


def test_the_source_of_a_tsunami(scratch: Path, tmp_path: Path) -> None:
    found = tsunami.main(["--short", "--disk", str(scratch), "--picture", str(tmp_path / "tsunami.png")])
    assert found["history"][-1] < found["history"][0] / 5
    assert (tmp_path / "tsunami.png").stat().st_size > 10_000
