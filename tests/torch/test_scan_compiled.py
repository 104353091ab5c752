"""`scan` with its graphs through PyTorch's compiler: the same results and gradients, up to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_steps import assert_same, dropout, gather_scatter, lstm, plain

from longtape.errors import UsageError
from longtape.torch import scan

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
@pytest.mark.parametrize("make", [lstm, dropout, gather_scatter])
def test_compiled_graphs_give_the_gradients_of_the_plain_loop(make: Any, scratch: Path) -> None:
    torch.manual_seed(0)
    case, reports = make(), list[Any]()
    for memory, disk in ((1 << 24, None), (60_000, scratch)):
        got = case.outcome(scan, memory=memory, disk=disk, compile=True, on_report=reports.append)
        assert_same(got, case.outcome(plain))
        assert all("last bits" in note for note in reports[-1].notes)
        assert reports[-1].measured.peak_memory_bytes <= memory
    assert reports[0].steps_recorded


@needs_compiler
def test_cotangents_that_are_not_there_count_as_none(scratch: Path) -> None:
    torch.manual_seed(0)
    case = lstm()

    def last_only(run: Any, **options: Any) -> Any:
        carry, _ = run(case.step, case.init, case.xs, None, **options)
        return torch.autograd.grad(carry[1].sum(), case.wanted())

    for ours, theirs in zip(last_only(scan, memory=1 << 24, compile=True), last_only(plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)


def test_there_is_nothing_to_compile_without_capture() -> None:
    with pytest.raises(UsageError, match="capture=False"):
        scan(
            lambda h, _: (h, None),
            torch.zeros(2, requires_grad=True),
            None,
            3,
            memory=1000,
            capture=False,
            compile=True,
        )
