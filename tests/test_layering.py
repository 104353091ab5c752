"""Imports point one way.  The finer rules are contracts in pyproject.toml, run by lint-imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import longtape

PACKAGE = Path(longtape.__file__).parent
HOMES = {
    "torch": "torch/",
    "jax": "jax/",
    "devito": "devito/",
    "checkpoint_schedules": "schedules.py",
    "matplotlib": "plots.py",
    "tqdm": "progress.py",
}
"""The only place from which each optional package is imported."""


def _sources() -> Iterator[tuple[str, str]]:
    """Every source file of the package: its path within the package, and its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def _imports(source: str) -> Iterator[str]:
    """Every module a source file imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def _loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `statement`."""
    program = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_no_framework() -> None:
    loaded = _loaded_by("import longtape")
    assert "longtape" in loaded
    assert not loaded & {"torch", "jax", "jaxlib", "matplotlib", "tqdm", "numba", "scipy", "checkpoint_schedules"}


@pytest.mark.parametrize("module", ["longtape.progress", "longtape.plots"])
def test_observers_load_their_package_only_when_they_draw(module: str) -> None:
    assert not _loaded_by(f"import {module}") & {"torch", "jax", "matplotlib", "tqdm"}


def test_each_optional_package_has_one_home() -> None:
    strays = [
        (path, name)
        for path, source in _sources()
        for name in _imports(source)
        if name.split(".")[0] in HOMES and not path.startswith(HOMES[name.split(".")[0]])
    ]
    assert not strays


def test_only_the_workers_start_threads() -> None:
    starts = re.compile(r"\bThread\(|\bThreadPool\w*\(|\bTimer\(|start_new_thread|\bProcess\w*\(")
    found = [path for path, source in _sources() if starts.search(source)]
    assert [path for path in found if not path.startswith("testing/")] == ["engine/workers.py"]


def test_the_plan_imports_only_the_standard_library_and_the_vocabulary() -> None:
    allowed = {"longtape.actions", "longtape.errors", "longtape.sizes", *sys.stdlib_module_names}
    strays = [
        (path, name)
        for path, source in _sources()
        if path.startswith("plan/")
        for name in _imports(source)
        if not name.startswith("longtape.plan") and not {name, name.split(".")[0]} & allowed
    ]
    assert not strays
