"""`while_loop`: a loop whose length nothing tells in advance."""

import itertools

import pytest
import torch

import longtape.torch as lt
from longtape.errors import ReplayError, StepError, UsageError
from longtape.testing.tiers import ThrottledTier
from longtape.tiers.memory import MemoryTier

WIDTH = 8


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        (0.3 * torch.randn(WIDTH, WIDTH, generator=generator)).requires_grad_(),
        torch.randn(4, WIDTH, generator=generator).requires_grad_(),
    )


def cell(h, w):
    return torch.tanh(h @ w) + 0.1 * h


def plain(steps):
    w, h0 = weights()
    h = h0
    for _ in range(steps):
        h = cell(h, w)
    h.square().sum().backward()
    return h.detach(), w.grad, h0.grad


def looped(steps, reports, **settings):
    w, h0 = weights()

    def step(carry):
        h, count = carry
        return cell(h, w), count + 1

    def cond(carry):
        return carry[1] < steps

    init = h0, torch.zeros((), dtype=torch.int64)
    settings.setdefault("memory", "4KiB")
    h, count = lt.while_loop(cond, step, init, on_report=reports.append, **settings)
    assert count == steps
    h.square().sum().backward()
    return h.detach(), w.grad, h0.grad


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("with_disk", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9, 300])
def test_gradients_are_those_of_the_plain_loop(tmp_path, capture, with_disk, steps):
    reports = []
    found = looped(steps, reports, disk=tmp_path if with_disk else None, capture=capture)
    for ours, exact in zip(found, plain(steps), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)
    assert [report.steps for report in reports] == [steps]
    assert reports[0].title == "while_loop"
    assert reports[0].measured.peak_memory_bytes <= 4096


@pytest.mark.parametrize("limit", ["20KB", "60KB", "200KB"])
@pytest.mark.parametrize("capture", [False, True])
def test_a_disk_limit_is_kept_to(tmp_path, limit, capture):
    reports = []
    found = looped(200, reports, disk=tmp_path, disk_limit=limit, capture=capture, memory="2KiB")
    for ours, exact in zip(found, plain(200), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)
    assert reports[0].measured.peak_disk_bytes <= int(limit.rstrip("KB")) * 1000
    assert not reports[0].faults


@pytest.mark.parametrize("capture", [False, True])
def test_verified_states_are_those_of_the_forward_sweep(tmp_path, capture):
    reports = []
    found = looped(120, reports, disk=tmp_path, capture=capture, verify=True)
    for ours, exact in zip(found, plain(120), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-8)
    assert reports[0].states_verified > 0


def test_a_step_that_gives_something_else_when_it_is_run_again_is_found():
    calls = itertools.count()

    def step(carry):
        h, count = carry
        return h * 1.01 + 1e-3 * next(calls) * (count > 20), count + 1

    h0 = torch.ones(64, requires_grad=True)
    init = h0, torch.zeros((), dtype=torch.int64)
    h, _ = lt.while_loop(lambda carry: carry[1] < 80, step, init, memory=1200, capture=False, verify=True)
    with pytest.raises(ReplayError, match="carry"):
        h.sum().backward()


def test_what_goes_to_storage_is_compressed():
    reports = []
    tier = ThrottledTier(MemoryTier(), write_bytes_per_second=1e5, read_bytes_per_second=1e5)

    def step(carry):
        h, count = carry
        return torch.tanh(1.01 * h), count + 1

    h0 = torch.zeros(1 << 14, requires_grad=True)
    init = h0, torch.zeros((), dtype=torch.int64)
    h, _ = lt.while_loop(
        lambda carry: carry[1] < 300,
        step,
        init,
        memory=6 * (1 << 16),
        tier=tier,
        capture=False,
        compress="bitshuffle+lz4",
        on_report=reports.append,
    )
    h.sum().backward()
    expected = torch.ones(1 << 14, dtype=torch.float64) * 1.01**300
    torch.testing.assert_close(h0.grad.double(), expected, rtol=1e-4, atol=0)
    assert reports[0].codec is not None


def test_a_condition_that_does_not_hold_at_first():
    init = torch.ones(3, requires_grad=True)
    out = lt.while_loop(lambda carry: False, lambda carry: 1 / 0, init, memory="1MiB")
    out.sum().backward()
    assert torch.equal(init.grad, torch.ones(3))


def test_no_gradient_is_a_plain_loop():
    calls = []

    def step(x):
        calls.append(1)
        return x + 1

    out = lt.while_loop(lambda x: x < 1000, step, torch.zeros(()), memory="1KiB", capture=False)
    assert out == 1000
    assert len(calls) == 1000
    with torch.no_grad():
        assert lt.while_loop(lambda x: x < 5, step, torch.zeros((), requires_grad=True), memory="1KiB") == 5


def test_max_steps_ends_it():
    init = torch.ones((), requires_grad=True)
    out = lt.while_loop(lambda x: True, lambda x: 1.5 * x, init, memory="1KiB", max_steps=7)
    out.backward()
    assert out == 1.5**7
    assert init.grad == 1.5**7
    assert lt.while_loop(lambda x: True, lambda x: 2 * x, init, memory="1KiB", max_steps=0) is init


def test_random_numbers_are_replayed():
    def step(carry):
        h, count = carry
        return torch.nn.functional.dropout(1.1 * h, 0.1), count + 1

    def run(loop):
        torch.manual_seed(3)
        h = torch.ones(50, requires_grad=True)
        loop((h, torch.zeros(())))[0].sum().backward()
        return h.grad

    def by_hand(carry):
        for _ in range(20):
            carry = step(carry)
        return carry

    ours = run(lambda init: lt.while_loop(lambda c: c[1] < 20, step, init, memory="32KiB", capture=False))
    assert torch.equal(ours, run(by_hand))


def test_two_steps_of_one_shape_do_not_share_graphs():
    for factor in (1.001, 0.999):
        init = torch.ones(3, requires_grad=True)
        out = lt.while_loop(
            lambda c: c[1] < 300, lambda c, f=factor: (c[0] * f, c[1] + 1), (init, torch.zeros(())), memory="1KiB"
        )
        out[0].sum().backward()
        torch.testing.assert_close(init.grad, torch.full((3,), factor**300), rtol=1e-4, atol=0)


def test_bad_arguments_are_refused():
    init = torch.ones(3, requires_grad=True)
    with pytest.raises(UsageError, match="max_steps must be an integer of zero or more"):
        lt.while_loop(lambda x: True, lambda x: x, init, memory="1KiB", max_steps=-1)
    with pytest.raises(UsageError, match="init leaf 0 is a float"):
        lt.while_loop(lambda x: True, lambda x: x, 1.0, memory="1KiB")
    with pytest.raises(StepError, match="cond must return a bool or a tensor of one element"):
        lt.while_loop(lambda x: x > 0, lambda x: x, init, memory="1KiB")
    with pytest.raises(StepError, match="cond draws random numbers"):
        lt.while_loop(lambda x: bool(torch.rand(()) < 2), lambda x: x, init, memory="1KiB")
