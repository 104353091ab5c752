"""What changes between a scan and its backward: the gradient is the plain loop's, or a refusal names the change."""

import itertools
import random
import types

import numpy as np
import pytest
import torch
from torch import nn

import longtape.torch as lt
from longtape.errors import StepError, UsageError

STEPS = 6
GAIN = 1.0
TABLE = {"gain": 1.0}

captures = pytest.mark.parametrize("capture", [False, True])


def plain(step, init, xs=None, length=STEPS, **_):
    carry, ys = init, []
    for k in range(length):
        carry, y = step(carry, None if xs is None else xs[k])
        ys.append(y)
    return carry, None if ys[0] is None else torch.stack(ys)


def scanned(step, init, xs=None, length=STEPS, capture=False):
    return lt.scan(step, init, xs, None if xs is not None else length, memory="64KiB", capture=capture)


def start():
    return torch.linspace(0.1, 0.9, 4, dtype=torch.float64).requires_grad_()


def same(make, capture=False):
    """What `make(run)` returns is what it returns with the plain loop."""
    theirs, ours = make(plain), make(lambda *args, **kwargs: scanned(*args, capture=capture, **kwargs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@captures
@pytest.mark.parametrize("kind", ["number", "mask", "layer"])
def test_scans_in_a_python_loop_whose_closure_is_bound_late(capture, kind):
    torch.manual_seed(1)
    layers = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(3)]
    values = {"number": [0.5, 1.0, 2.0], "mask": [torch.rand(4, dtype=torch.float64) for _ in range(3)]}

    def make(run):
        h = h0 = start()
        for k in range(3):
            if kind == "layer":
                layer = layers[k]

                def step(h, _):
                    return torch.tanh(layer(h)), None  # noqa: B023
            else:
                value = values[kind][k]

                def step(h, _):
                    return torch.sin(h * value), None  # noqa: B023

            h, _ = run(step, h)
        wanted = [h0, *(p for layer in layers for p in layer.parameters())] if kind == "layer" else [h0]
        return torch.autograd.grad(h.sum(), wanted)

    same(make, capture)


class Cell(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("mask", torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=torch.float64))
        self.scale, self.settings, self.weights = 1.0, {"gain": 1.0}, [1.0, 2.0]
        self.table = np.array([1.0, 2.0, 3.0])
        self.large = np.ones(1 << 20)

    def forward(self, h, _):
        sign = 1.0 if self.training else -1.0
        scale = self.scale * self.settings["gain"] * self.weights[0] * type(self).factor * GAIN * TABLE["gain"]
        extra = getattr(self, "extra", 0.0)
        return torch.tanh(sign * scale * self.linear(h) * self.mask + extra), None


def replace_weight(cell):
    cell.linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))


def put_gain(cell):
    cell.settings["gain"] = 3.0


def rebind_settings(cell):
    cell.settings = {"gain": 3.0}


def put_weight(cell):
    cell.weights[0] = 5.0


def clear_weights(cell):
    cell.weights.clear()


def put_global(cell):
    global GAIN
    GAIN = 7.0


CHANGES = {
    "training": nn.Module.eval,
    "attribute": lambda cell: setattr(cell, "scale", 2.0),
    "new attribute": lambda cell: setattr(cell, "extra", 0.5),
    "shadowed class attribute": lambda cell: setattr(cell, "factor", 0.5),
    "class attribute": lambda cell: setattr(Cell, "factor", 2.0),
    "buffer": lambda cell: setattr(cell, "mask", torch.zeros(4, dtype=torch.float64)),
    "method": lambda cell: setattr(cell.linear, "forward", lambda h: 0.0 * h),
    "parameter": replace_weight,
    "dict entry": put_gain,
    "dict": rebind_settings,
    "list item": put_weight,
    "list": clear_weights,
    "global": put_global,
    "global dict": lambda cell: TABLE.update(gain=0.5),
}


@captures
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_bound_anew_before_backward(change, capture):
    global GAIN

    def make(run):
        global GAIN
        GAIN, Cell.factor, TABLE["gain"] = 1.0, 1.0, 1.0
        cell, h0 = Cell(), start()
        parameters = list(cell.parameters())
        h, _ = run(cell, h0)
        CHANGES[change](cell)
        before = {name: repr(value) for name, value in vars(cell).items()}
        found = torch.autograd.grad(h.sum(), [h0, *parameters])
        assert before == {name: repr(value) for name, value in vars(cell).items()}
        return found

    same(make, capture)
    if change == "global":
        assert GAIN == 7.0
    GAIN, Cell.factor, TABLE["gain"] = 1.0, 1.0, 1.0


def put_data(cell):
    cell.linear.weight.data = torch.zeros(4, 4, dtype=torch.float64)


IN_PLACE = {
    ".data =": (put_data, "linear.weight"),
    ".data.copy_": (lambda cell: cell.linear.weight.data.zero_(), "linear.weight"),
    "optimizer": (lambda cell: torch.optim.SGD(cell.parameters(), 0.1).step(), "linear"),
    "buffer": (lambda cell: cell.mask.mul_(0.5), "mask"),
    "buffer.data": (lambda cell: cell.mask.data.mul_(0.5), "mask"),
}


@captures
@pytest.mark.parametrize("change", IN_PLACE)
def test_what_is_written_to_before_backward_is_refused_by_name(change, capture):
    cell, h0 = Cell(), start()
    h, _ = scanned(cell, h0, capture=capture)
    write, name = IN_PLACE[change]
    for parameter in cell.parameters():
        parameter.grad = torch.ones_like(parameter)
    write(cell)
    with pytest.raises(UsageError, match=f"{name}.*between the forward sweep and backward"):
        h.sum().backward()


@captures
@pytest.mark.parametrize("which", ["init", "xs"])
def test_init_and_xs_that_are_written_to_are_refused_by_name(which, capture):
    h0, xs = start(), torch.ones(STEPS, 4, dtype=torch.float64)
    h, _ = scanned(lambda h, x: (torch.sin(h * x), None), h0, xs, capture=capture)
    {"init": h0, "xs": xs}[which].data[0] = 5.0
    with pytest.raises(UsageError, match=f"leaf 0 of {which}"):
        h.sum().backward()


@pytest.mark.parametrize("name", ["table", "large"])
def test_numpy_arrays_that_are_written_to_are_refused_by_name(name):
    cell, h0 = Cell(), start()

    def step(h, _):
        return torch.sin(h * float(cell.table[1]) * float(cell.large[7])), None

    h, _ = scanned(step, h0)
    getattr(cell, name)[:] = 3.0
    with pytest.raises(UsageError, match=f"{name}.*between the forward sweep and backward"):
        h.sum().backward()


def test_tensors_that_are_reached_but_not_read_may_change():
    cell, h0 = Cell(), start()
    cell.other = nn.Linear(4, 4, dtype=torch.float64)

    def step(h, _, use=False):
        return (cell.other(h) if use else cell(h, None)[0]), None

    h, _ = scanned(step, h0)
    cell.other.weight.data.zero_()
    h.sum().backward()
    assert h0.grad is not None


def test_a_place_that_cannot_be_set_back_is_refused_by_name():
    class Frozen:
        def __init__(self):
            object.__setattr__(self, "_kept", 1.0)

        def __setattr__(self, name, value):
            raise AttributeError("frozen")

    class Slotted:
        __slots__ = ("gain",)

        def __setattr__(self, name, value):
            if hasattr(self, name):
                raise AttributeError("read-only")
            super().__setattr__(name, value)

    settings, h0 = Slotted(), start()
    settings.gain = 1.0
    h, _ = scanned(lambda h, _: (torch.sin(h * settings.gain), None), h0)
    object.__setattr__(settings, "gain", 2.0)
    with pytest.raises(UsageError, match=r"settings'?\.gain.*cannot be set back"):
        h.sum().backward()


@captures
def test_going_through_the_graph_twice_after_a_change(capture):
    def make(run):
        cell, h0 = Cell(), start()
        h, _ = run(cell, h0)
        found = []
        for _ in range(2):
            cell.scale += 1.0
            found += torch.autograd.grad(h.sum(), [h0, *cell.parameters()], retain_graph=True)
        return found

    same(make, capture)


# The last window ends in a state that is known ------------------------------------------------------


def numpy_noise(h, _):
    return torch.sin(h) + 0.1 * float(np.random.rand()), None


def python_noise(h, _):
    return torch.sin(h), h * random.random()


def counter():
    count = itertools.count()

    def step(h, _):
        return torch.sin(h) * (1.0 + 0.1 * next(count)), None

    return step


def clock():
    now = iter(range(10_000))
    timer = types.SimpleNamespace(read=lambda: next(now))
    return lambda h, _: (torch.sin(h), h * timer.read())


@captures
@pytest.mark.parametrize("make", [lambda: numpy_noise, lambda: python_noise, counter, clock])
def test_a_step_that_is_another_one_when_run_again_is_refused(make, capture):
    h0 = start()
    with pytest.raises(StepError):
        h, ys = scanned(make(), h0, capture=capture)
        (h.sum() + (0.0 if ys is None else ys.sum())).backward()


def test_rounding_is_no_difference():
    count, h0 = itertools.count(), start()
    h, _ = scanned(lambda h, _: (torch.sin(h) * (1.0 + 1e-15 * next(count)), None), h0)
    h.sum().backward()
    assert h0.grad is not None


def test_one_element_among_many_is_seen():
    count, h0 = itertools.count(), torch.zeros(100_000, dtype=torch.float64, requires_grad=True)

    def step(h, _):
        h = torch.sin(h)
        h[77_777] += next(count)
        return h, None

    h, _ = lt.scan(step, h0, None, STEPS, memory="16MiB", capture=False)
    with pytest.raises(StepError, match="step 5"):
        h.sum().backward()


@captures
def test_the_caller_may_write_to_the_carry_that_was_returned(capture):
    def make(run):
        h0 = start()
        h, _ = run(lambda h, _: (torch.sin(h), None), h0)
        h.mul_(3.0)
        return torch.autograd.grad(h.sum(), [h0])

    same(make, capture)


# while_loop --------------------------------------------------------------------------------------------


@captures
def test_a_loop_whose_closure_is_bound_late(capture):
    def by_hand(h, factor):
        for _ in range(STEPS):
            h = torch.sin(h * factor)
        return h

    def by_loop(h, factor):
        def step(carry):
            return torch.sin(carry[0] * factor), carry[1] + 1

        init = (h, torch.zeros((), dtype=torch.int64))
        out = lt.while_loop(lambda carry: carry[1] < STEPS, step, init, memory="64KiB", capture=capture)[0]
        factor = 100.0
        return out

    h0 = start()
    ours, theirs = by_loop(h0, 1.5), by_hand(h0, 1.5)
    torch.testing.assert_close(*(torch.autograd.grad(h.sum(), [h0]) for h in (ours, theirs)))


def test_a_condition_is_asked_once_a_step():
    asked = itertools.count()
    lt.while_loop(lambda h: next(asked) < 5, lambda h: h + 1, torch.zeros(()), memory="64KiB")
    assert next(asked) == 6


# Hooks ---------------------------------------------------------------------------------------------------


@captures
@pytest.mark.parametrize("place", ["given", "retained", "returned"])
def test_a_hook_on_the_carry_sees_the_plain_loops_gradient_or_is_refused(place, capture):
    def outcome(run):
        seen, h0 = [], start()

        def step(h, _):
            if place == "given" and h.requires_grad:
                h.register_hook(lambda g: 0.5 * g)
            if place == "retained" and h.requires_grad:
                h.retain_grad()
            new = torch.sin(h)
            if place == "returned" and new.requires_grad:
                new.register_hook(lambda g: 0.5 * g)
            return new, new * new

        h, ys = run(step, h0)
        return *torch.autograd.grad(h.sum() + ys.sum(), [h0]), *seen

    theirs = outcome(plain)
    try:
        ours = outcome(lambda *args, **kwargs: scanned(*args, capture=capture, **kwargs))
    except StepError as error:
        assert place != "returned"
        assert "hooks into the gradient of the carry" in str(error)
        return
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_held_once_the_graph_was_released():
    """A training loop that keeps its results where the step's code can see them holds one graph at a time."""
    import gc
    import weakref

    class Model:
        def __init__(self):
            self.state, self.gain = None, 1.0

        def step(self, h, _):
            return torch.sin(h * self.gain) if self.state is None else torch.cos(h * self.gain), None

    model, seen = Model(), []
    for _ in range(3):
        h, _ = scanned(model.step, start())
        h.sum().backward()
        model.state = h
        seen.append(weakref.ref(h))
        del h
    gc.collect()
    assert [ref() is None for ref in seen] == [True, True, False]
