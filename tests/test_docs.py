"""The documents tell the truth: links resolve, excerpts are in the code, snippets run, tables can be recomputed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtape.foresee import Foresight, replay
from longtape.plan.asynchronous import EXACT, Layout
from longtape.plan.binomial import advances, repetitions
from longtape.plan.choose import choose
from longtape.plan.costs import Costs, Device, Problem
from longtape.plan.predict import Footprint, best_tail, pace, spaced
from longtape.plan.simulate import Speeds, simulate

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def visible(document: Path) -> str:
    """What a reader sees: without comments."""
    return re.sub(r"<!--.*?-->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The names that a Markdown reader gives to headings."""
    headings = re.findall(r"^#+ (.*)$", visible(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(visible(document)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = document if not name else (document.parent / name).resolve()
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_nothing_is_left_to_do(document: Path) -> None:
    assert "TODO" not in visible(document)


# The tour ---------------------------------------------------------------------------------------


def excerpts() -> Iterator[tuple[str, list[Path], str]]:
    """Heading, linked source files and code of every stage after the first, which shows the user's own."""
    tour = ROOT / "docs" / "tour.md"
    for section in visible(tour).split("\n## ")[2:]:
        files = [(tour.parent / link).resolve() for link in LINK.findall(section) if link.endswith(".py")]
        for code in PYTHON.findall(section):
            yield section.splitlines()[0], files, code


def stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize(
    ("stage", "files", "code"), list(excerpts()), ids=lambda value: value if type(value) is str else ""
)
def test_the_tour_quotes_the_code(stage: str, files: list[Path], code: str) -> None:
    sources = [stripped(path.read_text(encoding="utf-8")) for path in files]
    assert any("\n" + stripped(code) in source for source in sources), f"{stage}: not in the code any more"


# Snippets ---------------------------------------------------------------------------------------


def snippets() -> list[str]:
    return PYTHON.findall(visible(ROOT / "README.md"))


@pytest.mark.parametrize("index", range(len(snippets())))
def test_the_readme_runs_as_pasted(index: int, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = snippets()[index]
    for package in "torch", "numba", "jax", "checkpoint_schedules":
        if re.search(rf"^(import|from) {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(scratch)  # an empty directory, which is empty again afterwards
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)
    found = [names.get("gradient"), *(names[name].grad for name in ("weight",) if name in names)]
    if "cell" in names:
        found.append(names["cell"].weight_hh.grad)
    if "model" in names:
        found.append(np.asarray(names["model"].adjoint))
    assert any(gradient is not None and bool((gradient != 0).any()) for gradient in found)


# The table of overheads -------------------------------------------------------------------------

STEPS, ADJOINT = 10_000, 2.0


def rows() -> list[list[str]]:
    """Cells of the table of overheads."""
    _, _, table = visible(ROOT / "docs" / "theory.md").partition("## Overhead, simulated")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def overhead(seconds: float) -> float:
    return seconds / (STEPS * (1.0 + ADJOINT))


def synchronous(slots: int, r: float) -> float:
    """Every I-th state written and read while compute waits; the best I and tail."""
    spacings = [*range(1, 300), *range(300, STEPS, 97)]
    best = STEPS * ADJOINT + advances(STEPS, slots)
    for spacing in spacings:
        per_step = 1.0 + (2 * r + advances(spacing, slots)) / spacing
        for tail in range(spacing, STEPS, 100):
            best = min(best, (STEPS - tail) * per_step + advances(tail, slots) + STEPS * ADJOINT)
    return overhead(best)


def simulated(slots: int, r: float, fixed: int | None) -> float:
    """Longtape's own plan in the event model, with the tail that the planner takes."""
    problem = Problem(STEPS, 1, slots, has_disk=True)
    costs = Costs(1.0, ADJOINT, write_bytes_per_second=1 / r, read_bytes_per_second=1 / r)
    job = pace(problem, costs, Footprint(1, slots))
    tail = best_tail(job, slots, spaced(job, slots, fixed=fixed))
    layout = Layout(tail=tail, fixed_spacing=fixed, final_state=False)
    return overhead(
        simulate(STEPS, slots, Speeds(1.0, ADJOINT, lambda _: r, lambda _: r), layout=layout, rules=EXACT).seconds
    )


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"s{row[0]}-r{row[1]}")
def test_the_table_of_overheads(row: list[str]) -> None:
    slots, r = int(row[0]), float(row[1])
    again = max(0, STEPS - slots - 1 - floor((STEPS - 1) / r))
    published = 1.0 + advances(ceil(r), slots - 1) / ceil(r) + ADJOINT
    expected = [
        overhead(STEPS - 1 + STEPS * ADJOINT + again),
        overhead(advances(STEPS, slots) + STEPS * ADJOINT),
        synchronous(slots, r),
        overhead(STEPS * published),
        simulated(slots, r, None if row[7] == "r" else int(row[7])),
    ]
    assert [float(cell) for cell in row[2:7]] == pytest.approx(expected, abs=1.1e-3)


# The table of three tiers -----------------------------------------------------------------------


def tiers() -> list[list[str]]:
    """Cells of the table of three tiers."""
    _, _, section = visible(ROOT / "docs" / "theory.md").partition("## Three tiers")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize("row", tiers(), ids=lambda row: "-".join(row[:4]))
def test_the_table_of_three_tiers(row: list[str]) -> None:
    inner, slots, link = int(row[0]), int(row[1]), float(row[2])
    problem = Problem(STEPS, 1000, slots * 1000, device=Device((inner + 4) * 1000))
    costs = Costs(1.0, ADJOINT, out_bytes_per_second=1000 / link, in_bytes_per_second=1000 / link)
    alone = advances(STEPS, inner + 4) + repetitions(STEPS + 1, inner + 4) + STEPS * ADJOINT
    expected = [f"{overhead(alone):.3f}", "–", "–"]
    if row[3] != "–":
        speed, shortest, longest = 1000 / float(row[3]), ceil(link), ceil(float(row[3]))
        problem, costs = replace(problem, has_disk=True), replace(costs, write_bytes_per_second=speed)
        costs = replace(costs, read_bytes_per_second=speed)
        nested = []
        for length in range(shortest, longest + 1):
            count = ceil(longest / length)
            nested.append(1 + advances(count, slots - 2) / count + advances(length, inner) / length + ADJOINT)
        pipe = 1 + advances(longest, inner) / longest + ADJOINT
        expected[1:] = [f"{overhead(STEPS * pipe):.3f}", f"{overhead(STEPS * min(nested)):.3f}"]
    assert row[4:7] == expected
    choice = choose(problem, costs)
    seconds = replay(Foresight(problem, costs, choice, ()), replace(EXACT, deep=True)).seconds
    assert float(row[7]) == pytest.approx(overhead(seconds), abs=1.1e-3)
    assert int(row[8]) == choice.window


def test_the_tables_are_found() -> None:
    assert len(rows()) >= 9
    assert len(tiers()) >= 8
    assert len(list(excerpts())) >= 10
