"""What every benchmark shares: the machine in words, fair repetition, and one JSON file a benchmark.

A figure means something only beside another one taken in the same run, so cases are
interleaved (A B C A B C …) and compared by their medians.  Cases whose memory matters
run in processes of their own.

Importing this file asks for one compute thread here and in the processes it starts.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("longtape", "numpy", "numba", "torch", "jax", "devito", "pyrevolve", "checkpoint-schedules")


def use_one_thread() -> None:
    """One compute thread, also for a PyTorch that was imported before this file."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def machine() -> dict[str, Any]:
    """Where the figures were taken: hardware, kernel, versions and the commit."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg()[0],
    }


def write(name: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json``, print it, and return its path."""
    document = {"benchmark": name, "machine": machine(), "settings": dict(settings), "results": dict(results)}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps(document, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
    return path


def sources() -> str:
    """What the package's files are, by Git; where some differ from it, by nothing but this moment."""
    changed = _git("status", "--porcelain", "--", "../../src")
    return f"changed {time.time()}" if changed else _git("rev-parse", "HEAD:src")


def earlier(name: str) -> dict[str, Any]:
    """The document of a benchmark, if the same sources gave it: runs in slices join."""
    path = RESULTS / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return document if document.get("settings", {}).get("sources") == sources() else {}


def interleave(cases: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds that each case took, `repeats` times, taken in turn in this process."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-warm_up, repeats):
        for name, case in cases.items():
            gc.collect()
            began = time.perf_counter()
            case()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def interleave_apart(
    cases: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]], *, repeats: int
) -> dict[str, list[Any]]:
    """What each case returned from `apart`, `repeats` times, taken in turn."""
    outcomes: dict[str, list[Any]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, (function, arguments) in cases.items():
            outcomes[name].append(apart(function, *arguments))
    return outcomes


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module-level function returns when it is called in a fresh process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}") from None
    finally:
        here.close()
        process.join()


def _call(pipe: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    use_one_thread()
    pipe.send(function(*arguments))
    pipe.close()


class Meter:
    """Measures memory from when it is made, and time from when it is started."""

    def __init__(self) -> None:
        self._before = reset_peak()
        self._began = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """Seconds since `start`, and how far resident memory rose since the meter was made."""
        seconds = time.perf_counter() - self._began
        return {"seconds": seconds, "peak_bytes": peak() - self._before}


def reset_peak() -> int:
    """Forget the highest resident size so far; return the present one.  Bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _kibibytes("VmRSS")


def peak() -> int:
    """Highest resident size since `reset_peak`.  Bytes."""
    return _kibibytes("VmHWM")


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and count."""
    return {
        "median": statistics.median(samples),
        "lowest": min(samples),
        "highest": max(samples),
        "repeats": len(samples),
    }


def _kibibytes(name: str) -> int:
    return 1024 * int(_field("/proc/self/status", name).split()[0])


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with a plus sign where files differ from it."""
    return _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "--", "../../src") else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=False)
    return done.stdout.strip()
