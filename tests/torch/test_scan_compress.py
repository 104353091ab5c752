"""`scan` with compressed storage: the same bits, or numbers within the stated bound and all else untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scan_steps import Case, assert_same, dropout, exact_cases, gather_scatter, lstm, plain

from longtape.errors import UsageError
from longtape.testing.tiers import ThrottledTier
from longtape.tiers.disk import DiskTier
from longtape.torch import scan


def slow(scratch: Path) -> ThrottledTier:
    """Storage so slow that whatever makes items smaller pays."""
    return ThrottledTier(DiskTier(scratch), write_bytes_per_second=2e6, read_bytes_per_second=2e6)


def outcome(case: Case, scratch: Path, compress: str, capture: bool, *, memory: int = 40_000) -> tuple[list[Any], Any]:
    reports: list[Any] = []
    got = case.outcome(
        scan,
        memory=memory,
        tier=slow(scratch),
        compress=compress,
        capture=capture,
        on_report=reports.append,
    )
    return got, reports[0]


@pytest.fixture(autouse=True)
def handed_over_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps here are so short that storing would not pay if transfers cost them anything."""
    monkeypatch.setattr("longtape.measure._rising", lambda sizes, seconds: (0.0, 0.0))


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("make", [lstm, dropout, gather_scatter])
def test_lossless_codecs_change_nothing(make: Any, capture: bool, scratch: Path) -> None:
    torch.manual_seed(0)
    case = make()
    got, report = outcome(case, scratch, "bitshuffle+zstd", capture)
    assert_same(got, case.outcome(plain))
    assert report.lossy_bound is None


@pytest.mark.parametrize("capture", [True, False])
def test_a_lossy_codec_rounds_numbers_within_its_bound_and_says_so(capture: bool, scratch: Path, monkeypatch) -> None:
    monkeypatch.setattr("longtape.compose.LEAST_CODEC_GAIN", -9.0)  # use it, whatever is predicted
    torch.manual_seed(0)
    case = exact_cases(torch.float64, 16)["residual chain"]()
    got, report = outcome(case, scratch, "relative:1e-6+bitshuffle+zstd", capture, memory=40_000 if capture else 4_000)
    expected = case.outcome(plain)
    assert report.reads
    assert "LOSSY" in str(report)
    assert report.lossy_bound == 1e-6
    assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max().clamp(min=1e-12)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("make", [gather_scatter, dropout])
def test_integers_flags_and_random_states_are_never_rounded(
    make: Any, capture: bool, scratch: Path, monkeypatch
) -> None:
    monkeypatch.setattr("longtape.compose.LEAST_CODEC_GAIN", -9.0)
    torch.manual_seed(0)
    case = make()
    got, _ = outcome(case, scratch, "relative:1e-9+bitshuffle+zstd", capture)
    for ours, theirs in zip(got, case.outcome(plain), strict=True):
        assert torch.allclose(ours.to(torch.complex128), theirs.to(torch.complex128), rtol=1e-6, atol=1e-6)


def test_a_step_with_several_graphs_keeps_its_residuals_exact(scratch: Path, monkeypatch) -> None:
    """Where its numbers lie in a block depends on the path a step took: none of them may be taken for another's."""
    monkeypatch.setattr("longtape.compose.LEAST_CODEC_GAIN", -9.0)
    flag, weight = [0], torch.randn(16, dtype=torch.float64, requires_grad=True)

    class Inputs:
        def __len__(self) -> int:
            return 60

        def __getitem__(self, k: int) -> torch.Tensor:
            flag[0] = k // 20 % 2
            return torch.full((16,), 0.01 * k, dtype=torch.float64)

    def step(carry: Any, x: torch.Tensor) -> Any:
        h, index = carry
        h = torch.sin(h * weight)[index] + x if flag[0] else torch.tanh(h + weight * x)
        return (h, (index + 1) % 16), None

    h0 = torch.randn(16, dtype=torch.float64, requires_grad=True)

    def gradients(compress: str | None) -> tuple[torch.Tensor, ...]:
        (h, _), _ = scan(
            step, (h0, torch.arange(16)), Inputs(), memory=20_000, disk=scratch, capture=True, compress=compress
        )
        return torch.autograd.grad(h.sum(), [h0, weight])

    for ours, theirs in zip(gradients("relative:1e-9+lz4"), gradients(None), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)


def test_what_is_no_codec_is_refused(scratch: Path) -> None:
    h = torch.zeros(3, requires_grad=True)
    with pytest.raises(UsageError, match="compress="):
        scan(lambda h, _: (h * 2, None), h, None, 5, memory=1000, disk=scratch, compress="gzip")
