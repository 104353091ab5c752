"""Something is edited between two processes of a resumable run: it is refused by name, whatever it was."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaigns import edits

ROOT = Path(__file__).parents[2]
SLOW = ("captured", "jax")
"""Of these every edit takes seconds of compiling, and fewer are tried."""


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def cases():
    for front, program in edits.FRONTS.items():
        names = list(program.values)
        chosen = random.Random(front).sample(names, 4) if front in SLOW else names
        yield from ((front, name) for name in chosen)


@pytest.mark.parametrize(("front", "name"), list(cases()))
def test_an_edit_is_refused_by_name(front, name):
    program, chance = edits.FRONTS[front], random.Random(f"{front} {name}")
    values = program.draw(chance)
    changed = dict(values)
    while repr(changed[name]) == repr(values[name]):
        changed[name] = program.values[name](chance)
    found = None
    for after in (30, 15, 8):
        found = found or edits.attempt(program, values, changed, [name], after)
    harmless = {"xs_wanted": values.get("lazy"), "odd_x": False}.get(name, False)
    assert found == "refused by name" or (harmless and found.startswith("the right bits"))


@pytest.mark.parametrize("front", ["sweep", "eager"])
def test_without_an_edit_a_run_goes_on(front):
    program = edits.FRONTS[front]
    values = program.draw(random.Random(front))
    assert edits.attempt(program, values, values, [], 20) == "the right bits, gone on with"


PROGRAM = """
import random, sys
from benchmarks.campaigns import edits
program = edits.FRONTS[sys.argv[1]]
values = program.draw(random.Random(3))
stop = sys.argv[3] == "stop"
try:
    bits, report = program.run(values, sys.argv[2], edits.Stopper(20 if stop else None))
    print(report.resumed_from)
except edits.Stop:
    print("stopped")
"""


@pytest.mark.parametrize("front", ["sweep", "eager"])
def test_a_run_goes_on_in_a_process_with_other_hashes_and_addresses(tmp_path, front):
    said = []
    for seed, what in (("1", "stop"), ("2", "end")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        command = [sys.executable, "-c", PROGRAM, front, str(tmp_path), what]
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert said[0] == "stopped"
    assert said[1] not in ("None", "")
