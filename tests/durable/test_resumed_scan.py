"""Scans that are killed in a training step, and found again by their name."""

import gc
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import longtape
from longtape.actions import Turn
from longtape.torch import scan
from tests.durable import scans

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(kind, directory, out):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    program = [sys.executable, "-m", "tests.durable.scans", kind, str(directory), "0.05", str(out)]
    return subprocess.Popen(program, cwd=ROOT, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["eager", "random", "captured"])
def test_killed_once_in_each_sweep(tmp_path, kind):
    """In fresh processes, killed while the journal says that they are in one sweep or the other."""
    out, journal = tmp_path / "out", tmp_path / "run" / "scan.longtape-journal"
    journal.parent.mkdir()
    for size in (1, 12_000):
        running = start(kind, tmp_path / "run", out)
        while running.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.002)
        time.sleep(0.05)
        running.kill()
        running.wait()
    if not out.exists():
        assert start(kind, tmp_path / "run", out).wait() == 0
    expected, _ = scans.gradient(kind, None, 1.0, 0.0)
    assert out.read_bytes() == expected, Path(f"{out}.txt").read_text()
    assert not os.listdir(tmp_path / "run")


class Stop(Exception):
    pass


class Stopper:
    """An observer that stops the run after so many actions."""

    def __init__(self, after):
        self.after = after

    def on_action(self, action, began, ended):
        time.sleep(2e-4)
        self.after -= 1
        if self.after == 0:
            raise Stop

    def on_transfer(self, *_):
        pass


@pytest.mark.parametrize("kind", ["eager", "random", "captured"])
def test_stopped_anywhere(tmp_path, kind):
    expected, _ = scans.gradient(kind, None, 1.0, 0.0)
    chance = random.Random(kind)
    options = scans.options(kind, 0.0)
    planned = options.pop("costs")
    for _ in range(2):
        stops = [chance.randrange(1, 500) for _ in range(3)] + [0]
        for after in stops:
            options["observers"] = [Stopper(after)]

            def scanned(step, init, xs):
                with scans._planned(planned):
                    return scan(step, init, xs, resume=tmp_path, resume_seconds=0.01, **options)

            try:
                found = scans.Problem(dropout=kind == "random").run(scanned)
            except Stop:
                continue
            break
        assert found == expected
        assert not os.listdir(tmp_path)


class StopsAfterTheTurn:
    """An observer that stops the run so many actions after it has turned."""

    def __init__(self, left):
        self.left, self.turned = left, False

    def on_action(self, action, began, ended):
        time.sleep(2e-3)
        self.turned = self.turned or isinstance(action, Turn)
        self.left -= self.turned
        if self.left < 0:
            raise Stop

    def on_transfer(self, *_):
        pass


def test_a_last_window_that_is_short_is_not_skipped(tmp_path):
    """An adjoint that is durable before any step was reversed is that of step N, where no whole window need end."""
    resumed, plans = [], []
    for steps in (40, 41):
        expected, _ = scans.gradient("random", None, 1.0, 0.0, steps=steps)
        for left in range(1, 7):
            with pytest.raises(Stop):
                scans.gradient("random", tmp_path, 1e-6, 0.0, steps=steps, observers=[StopsAfterTheTurn(left)])
            gc.collect()
            found, report = scans.gradient("random", tmp_path, 60.0, 0.0, steps=steps)
            assert found == expected, (left, report.resumed_from)
            resumed.append(report.resumed_from)
            plans.append(report.window)
    assert set(resumed) & {"the adjoint of step 40", "the adjoint of step 41"}
    assert min(plans) > 1


def half_way(directory, problem, **options):
    """A scan whose forward sweep has ended, and that is then given up."""
    carry, ys = scan(problem.step, problem.init, problem.xs, memory="1MiB", capture=False, resume=directory, **options)
    return carry, ys


def test_the_forward_sweep_is_not_run_again(tmp_path):
    problem = scans.Problem()
    first = half_way(tmp_path, problem)
    expected = [t.detach().clone() for t in first]
    del first
    again = half_way(tmp_path, scans.Problem())
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("parameters", lambda p: p.cell.weight_ih.data.mul_(2)),
        ("initial carry", lambda p: p.init.data.add_(1)),
        ("xs", lambda p: p.xs.data[7].add_(1)),
        ("number of steps", lambda p: setattr(p, "xs", p.xs.detach()[:-1].requires_grad_())),
    ],
)
def test_another_scan_is_refused(tmp_path, what, change):
    half_way(tmp_path, scans.Problem())
    problem = scans.Problem()
    change(problem)
    with pytest.raises(longtape.ResumeError, match=what):
        half_way(tmp_path, problem)


def test_a_resumed_scan_is_verified(tmp_path):
    half_way(tmp_path, scans.Problem(), verify=True)
    problem, reports = scans.Problem(), []
    carry, ys = half_way(tmp_path, problem, verify=True, on_report=reports.append)
    (carry.sum() + ys.sum()).backward()
    assert reports[0].states_verified is not None
    assert reports[0].resumed_from == "the turn"


def test_a_resumable_scan_is_not_compressed(tmp_path):
    with pytest.raises(longtape.UsageError, match="compress"):
        half_way(tmp_path, scans.Problem(), compress="lz4")
    assert not os.listdir(tmp_path)


def test_two_scans_share_a_directory(tmp_path):
    problem = scans.Problem()
    one = half_way(tmp_path, problem, name="one")
    two = half_way(tmp_path, problem, name="two")
    (one[0].sum() + two[0].sum()).backward()
    assert not os.listdir(tmp_path)
