"""Every test here leaves as many descriptors and threads as it found."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest


def descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the one that lists the directory
            continue
    return found


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    yield
    gc.collect()
    assert descriptors() <= before
    assert threading.active_count() == threads
