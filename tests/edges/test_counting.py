"""Steps that count, log, or switch over after some calls: refused, with the place that changes."""

import collections
import random

import numpy as np
import pytest
import torch

import longtape.torch as lt
from longtape.errors import StepError

STEPS = 12
CALLS = 0


def scanned(step, init, xs=None, length=STEPS, capture=False):
    return lt.scan(step, init, xs, None if xs is not None else length, memory="64KiB", capture=capture)


def start(wants=True):
    return torch.linspace(0.1, 0.9, 4, dtype=torch.float64).requires_grad_(wants)


class Warmup:
    """Doubles in its first calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, h, _):
        self.calls += 1
        return torch.sin(h) * (2.0 if self.calls <= 3 else 1.0), None


class OnlyTheFirst:
    first = True

    def __call__(self, h, _):
        factor, self.first = (2.0 if self.first else 1.0), False
        return torch.sin(h) * factor, None


def with_a_global(h, _):
    global CALLS
    CALLS += 1
    return torch.sin(h) * (2.0 if CALLS <= 3 else 1.0), None


def with_a_nonlocal():
    calls = 0

    def step(h, _):
        nonlocal calls
        calls += 1
        return torch.sin(h) * (2.0 if calls <= 3 else 1.0), None

    return step


def with_a_list():
    log = []

    def step(h, _):
        log.append(1)
        return torch.sin(h) * (2.0 if len(log) <= 3 else 1.0), None

    return step


def with_a_set():
    seen = set()

    def step(h, _):
        seen.add(len(seen))
        return torch.sin(h) * (2.0 if len(seen) <= 3 else 1.0), None

    return step


def with_a_deque():
    recent = collections.deque([0, 0, 0], maxlen=3)

    def step(h, _):
        recent.append(recent[-1] + 1)
        return torch.sin(h) * (2.0 if recent[-1] <= 3 else 1.0), None

    return step


def with_a_dict():
    counts = {"calls": 0}

    def step(h, _):
        counts["calls"] += 1
        return torch.sin(h) * (2.0 if counts["calls"] <= 3 else 1.0), None

    return step


def with_an_array():
    counts = np.zeros(1)

    def step(h, _):
        counts[0] += 1
        return torch.sin(h) * (2.0 if counts[0] <= 3 else 1.0), None

    return step


def with_a_tensor():
    kept = {"calls": torch.zeros(())}

    def step(h, _):
        kept["calls"] = kept["calls"] + 1
        return torch.sin(h) * (2.0 if kept["calls"] <= 3 else 1.0), None

    return step


def with_a_helper():
    warmup = Warmup()
    return lambda h, x: warmup(h, x)


def with_numpys_generator(h, _):
    return torch.sin(h) * float(np.random.rand()), None


def with_pythons_generator(h, _):
    return torch.sin(h) * random.random(), None


def with_a_generator():
    rng = np.random.default_rng(0)
    return lambda h, _: (torch.sin(h) * rng.random(), None)


COUNTERS = {
    "attribute": (Warmup, r"step\.calls from 1 to 2"),
    "the first call": (OnlyTheFirst, r"first"),
    "global": (lambda: with_a_global, r"global 'CALLS' from \d+ to"),
    "nonlocal": (with_a_nonlocal, "closure variable 'calls' from 1 to 2"),
    "list": (with_a_list, "closure variable 'log', from 1 to 2 items"),
    "set": (with_a_set, "closure variable 'seen', from 1 to 2 items"),
    "deque": (with_a_deque, "closure variable 'recent', at"),
    "dict": (with_a_dict, r"closure variable 'counts'.*from 1 to 2"),
    "array": (with_an_array, "the numbers in closure variable 'counts'"),
    "tensor": (with_a_tensor, r"the tensor closure variable 'kept'\['calls'\]"),
    "helper": (with_a_helper, r"closure variable 'warmup'\.calls from 1 to 2"),
    "numpy.random": (lambda: with_numpys_generator, "NumPy's global random generator"),
    "random": (lambda: with_pythons_generator, "Python's global random generator"),
    "default_rng": (with_a_generator, "closure variable 'rng'"),
}


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("counter", COUNTERS)
def test_a_step_that_counts_is_refused_by_the_place(counter, capture):
    make, path = COUNTERS[counter]
    with pytest.raises(StepError, match=path):
        scanned(make(), start(), capture=capture)


@pytest.mark.parametrize("at", [3, STEPS - 1])
def test_what_only_a_later_step_changes_is_found_when_the_sweep_has_run(at):
    flags = {"late": False}

    def step(h, k):
        if k == at:
            flags["late"] = True
        return torch.sin(h) * (2.0 if flags["late"] else 1.0), None

    with pytest.raises(StepError, match=r"'flags'\['late'\] from False to True"):
        scanned(step, start(), torch.arange(STEPS))


def test_inputs_that_are_read_lazily_may_keep_what_they_like():
    position = [0]

    class Inputs:
        def __len__(self):
            return STEPS

        def __getitem__(self, k):
            position[0] = k
            return torch.full((4,), 0.1 * k, dtype=torch.float64)

    def step(h, x):
        return torch.sin(h * position[0] + x), None

    h0, other = start(), start()
    h, _ = scanned(step, h0, Inputs())
    h.sum().backward()
    inputs, g = Inputs(), other
    for k in range(STEPS):
        g, _ = step(g, inputs[k])
    g.sum().backward()
    torch.testing.assert_close(h0.grad, other.grad)


@pytest.mark.parametrize("make", [Warmup, with_a_nonlocal, with_a_list, with_a_dict])
def test_without_a_gradient_a_step_may_count(make):
    h, expected, step = start(wants=False), start(wants=False), make()
    h, _ = scanned(make(), h)
    for _ in range(STEPS):
        expected, _ = step(expected, None)
    torch.testing.assert_close(h, expected)


def test_a_count_is_set_back_where_the_sweeps_begin():
    """Step 0 is run before a parameter that requires a gradient is met; what it changed shows all the same."""
    weight, counts = torch.ones((), dtype=torch.float64, requires_grad=True), {"calls": 0}

    def step(h, k):
        if k < 4:
            return torch.sin(h), None
        if k == 5:
            counts["calls"] += 1
        return torch.sin(h) * weight, None

    with pytest.raises(StepError, match=r"'counts'\['calls'\] from 0 to 1"):
        scanned(step, start(wants=False), torch.arange(STEPS))


def test_a_flag_that_changes_nothing_may_be_set_once():
    class Ready:
        ready = False

        def __call__(self, h, _):
            if not self.ready:
                self.ready, self.table = True, torch.arange(4.0, dtype=torch.float64)
            return torch.sin(h + self.table), None

    h0, other = start(), start()
    h, _ = scanned(Ready(), h0)
    h.sum().backward()
    step = Ready()
    for _ in range(STEPS):
        other, _ = step(other, None)
    torch.testing.assert_close(h, other)


def test_a_condition_that_counts_is_refused():
    asked = [0]

    def cond(h):
        asked[0] += 1
        return asked[0] < 5

    h0 = start()
    with pytest.raises(StepError, match="closure variable 'asked'"):
        lt.while_loop(cond, torch.sin, h0, memory="64KiB")
