"""What every test must leave behind: nothing.

The autouse fixtures fail a test that leaves a thread, a file descriptor or a scratch
file.  Whatever a garbage collection cleans up is no leak.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

_PATIENCE_SECONDS = 2.0
"""How long a thread that is already on its way out may take."""

_NOT_OURS = ("/dev/", "/proc/", "anon_inode:", sys.prefix, sys.base_prefix)
"""Descriptors that belong to no test: devices, the kernel's own objects, fonts and the like of installed packages."""


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    """Fail a test after which Python threads run that did not run before."""
    before = set(threading.enumerate())
    yield
    left = _settle(lambda: [thread.name for thread in threading.enumerate() if thread not in before])
    assert not left, f"the test left threads running: {left}"


@pytest.fixture(autouse=True)
def no_leaked_descriptors() -> Iterator[None]:
    """Fail a test after which more files, pipes or sockets are open than before."""
    before = _open_files()
    yield
    left = _settle(lambda: [name for number, name in _open_files().items() if before.get(number) != name])
    assert not left, f"the test left open: {left}"


@pytest.fixture(autouse=True)
def no_leaked_scratch_files() -> Iterator[None]:
    """Fail a test that leaves a Longtape file in the default temporary directory."""
    before = _scratch_files()
    yield
    left = sorted(_scratch_files() - before)
    assert not left, f"the test left scratch files: {left}"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """An empty directory to use as `disk`; it must be empty again afterwards."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    yield directory
    left = _settle(lambda: sorted(str(path.relative_to(directory)) for path in directory.rglob("*")))
    assert not left, f"the test left files in its scratch directory: {left}"


def _settle(remaining: Callable[[], list[str]]) -> list[str]:
    """What remains once garbage is collected and everything that is ending has ended."""
    if not remaining():
        return []
    gc.collect()
    until = time.monotonic() + _PATIENCE_SECONDS
    while remaining() and time.monotonic() < until:
        time.sleep(0.01)
    return remaining()


def _open_files() -> dict[int, str]:
    """Open descriptors of files, pipes and sockets, without what libraries keep open for good."""
    named: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the listing's own descriptor
            continue
        if not name.startswith(_NOT_OURS):
            named[int(entry)] = name
    return named


def _scratch_files() -> set[str]:
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("longtape", ".longtape"))}
