"""What the edge tests of the PyTorch front end need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, one seed, and no progress bars of PyTorch's own, which would start a thread."""
    torch = pytest.importorskip("torch")
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
