"""The ways that the benchmark compares take the same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("jax")

from benchmarks import jax_scan


def test_all_ways_agree(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "")  # which the benchmark sets in a process of its own
    ways = ("lax.scan", "longtape", "equinox")
    found = [jax_scan.run("lorenz96", way, 300, 16_000, str(scratch))["check"] for way in ways]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
