"""Scans on a simulated device give plain autograd's bits, whenever its copies come."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_scans import KINDS, attempt, case_of
from scan_steps import Case, leaf, loss_of, plain
from simulated import Delay, plan, quickly, simulated, storing_everything, use_plan
from torch import Tensor

from longtape.errors import DeviceError
from longtape.plan.choose import choose
from longtape.plan.costs import Costs, Problem
from longtape.testing.device import SimulatedDevice, drawn, when_wanted
from longtape.torch import scan, while_loop

STEPS = 24
MEMORY = 1 << 20
Planner = Callable[[Problem, Costs], Any]

MODES: dict[str, tuple[Planner, bool, bool]] = {
    "every state in the host's memory": (plan("store_all", slots=STEPS), False, False),
    "windows taped on the device": (plan("revolve", window=3, slots=3), False, False),
    "windows recorded on the device": (plan("revolve", window=3, slots=3), True, False),
    "windows by Revolve on the device": (plan("revolve", window=5, slots=2, device_slots=2), False, False),
    "windows by Revolve on the device, captured": (plan("revolve", window=5, slots=2, device_slots=2), True, False),
    "residuals in the host's memory": (storing_everything(2), True, False),
    "states on disk": (plan("asynchronous", window=2, slots=3, spacing=1), False, True),
    "states on disk, windows by Revolve": (
        plan("asynchronous", window=2, slots=3, spacing=1, device_slots=1),
        True,
        True,
    ),
    "residuals on disk": (plan("residuals", window=2, slots=2, blocks=3, fraction=1.0, stores=True), True, True),
}
"""The plan; whether steps are captured; whether there is a disk."""

DELAYS: dict[str, Delay] = {"when wanted": when_wanted, "drawn": drawn(5)}


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """Bit for bit; a gradient of nothing may be None or zero."""
    return all(
        torch.equal(ours, theirs)
        if ours is not None and theirs is not None
        else all(part is None or not part.any() for part in (ours, theirs))
        for ours, theirs in zip(found, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def _times_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> Callable[..., Any]:
    """A scan in one of the modes; returns what it gave, and its report."""

    def in_mode(mode: str, case: Case, delay: Delay, *, staging: int = 2, **device: Any) -> tuple[Any, Any]:
        planner, capture, disk = MODES[mode]
        use_plan(monkeypatch, planner)
        monkeypatch.setattr("longtape.torch.linked.STAGING", staging)
        options: dict[str, Any] = {"memory": MEMORY, "host_memory": MEMORY, "capture": capture}
        if disk:
            options["disk"] = scratch
        reports: list[Any] = []
        with simulated(delay, **device):
            found = case.outcome(scan, on_report=reports.append, **options)
        return found, reports[-1]

    return in_mode


# --- gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "delay"), [*((kind, "when wanted") for kind in KINDS), ("lstm", "drawn")])
def test_gradients_are_plain_autograds_bit_for_bit(kind: str, mode: str, delay: str, run: Callable[..., Any]) -> None:
    case, expected = case_of(kind, STEPS)
    found, of = run(mode, case, DELAYS[delay])
    assert same(found, expected), of.schedule
    assert of.device.links[0].count > 0


@pytest.mark.parametrize("memory", [900, 1300, 20_000])
@pytest.mark.parametrize("capture", [False, True])
def test_on_the_device_alone(memory: int, capture: bool) -> None:
    case, expected = case_of("lstm", STEPS)
    reports: list[Any] = []
    with simulated(when_wanted) as device:
        found = case.outcome(scan, memory=memory, capture=capture, on_report=reports.append)
    assert same(found, expected)
    assert device.copies == 0
    report = reports[-1].device
    assert 0 < report.pool_bytes <= report.budget_bytes == memory
    assert report.pinned_bytes == 0


@pytest.mark.parametrize("capture", [False, True])
def test_with_a_disk_the_hosts_memory_is_but_a_pipe(capture: bool, scratch: Path) -> None:
    case, expected = case_of("gated", 33)
    reports: list[Any] = []
    with simulated(drawn(1)):
        found = case.outcome(
            scan, memory=4_000 if capture else 600, disk=scratch, capture=capture, on_report=reports.append
        )
    assert same(found, expected)
    assert capture or reports[-1].device.pinned_bytes > 0


def test_what_the_planner_chooses(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    case, expected = case_of("lstm", 33)
    found_plans = set()
    for memory, host, disk in [(900, 500, True), (900, 2_000, False), (3_000, 2_000, False), (40_000, 2_000, False)]:
        plans: list[Any] = []
        with simulated(drawn(memory)):
            options: dict[str, Any] = {"disk": scratch} if disk else {}
            found = case.outcome(scan, memory=memory, host_memory=host, capture=False, on_plan=plans.append, **options)
        assert same(found, expected)
        choice = plans[-1]
        found_plans.add((choice.schedule, choice.window > 1, choice.on_device))
    assert len(found_plans) >= 3


def test_a_loop_of_unknown_length() -> None:
    weight = leaf(4, 4)

    def cond(carry: tuple[Tensor, Tensor]) -> Tensor:
        return carry[1] < 29

    def step(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.tanh(carry[0] @ weight), carry[1] + 1

    init = leaf(2, 4), torch.tensor(0)
    carry = init
    for _ in range(29):
        carry = step(carry)
    expected = torch.autograd.grad(carry[0].sum(), [init[0], weight])
    for capture in (False, True):
        with simulated(drawn(7)):
            final = while_loop(cond, step, init, memory=5_000, host_memory=2_000, capture=capture)
            found = torch.autograd.grad(final[0].sum(), [init[0], weight])
        assert same(list(found), list(expected))


def test_inputs_read_lazily_and_verified_states(run: Callable[..., Any]) -> None:
    case, expected = case_of("gated", STEPS)

    class Lazy:
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, k: int) -> Tensor:
            return case.xs.detach()[k]

    lazily = Case(case.step, case.init, Lazy(), None, case.parameters)
    wanted = [k for k, tensor in enumerate(case.wanted()) if tensor is not case.xs]
    reports: list[Any] = []
    with simulated(when_wanted):
        options = {"memory": 1_000, "host_memory": 1_000, "capture": False, "verify": True}
        found = lazily.outcome(scan, on_report=reports.append, **options)
    results = len(expected) - 1 - len(case.wanted())
    assert same(found[:results], expected[:results])
    assert same(found[results:-1], [expected[results + k] for k in wanted])
    assert reports[-1].states_verified > 0


def test_autocast_is_replayed() -> None:
    weight = leaf(4, 4, dtype=torch.float32)
    step = lambda h, x: (torch.tanh(h @ weight + x).float(), None)  # noqa: E731
    case = Case(step, leaf(2, 4, dtype=torch.float32), leaf(STEPS, 2, 4, dtype=torch.float32), None, [weight])
    for capture in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # as it is inside a scan
            expected = case.outcome(plain)
        with torch.autocast("cpu", dtype=torch.bfloat16), simulated(drawn(2)):
            found = case.outcome(scan, memory=4_000, host_memory=300, capture=capture)
        assert same(found, expected)


def test_compressed_on_the_way_to_disk(scratch: Path) -> None:
    pytest.importorskip("numcodecs")
    case, expected = case_of("lstm", 33)
    with simulated(when_wanted):
        found = case.outcome(
            scan, memory=900, host_memory=4_000, disk=scratch, compress="bitshuffle+lz4", capture=False
        )
    assert same(found, expected)


def test_the_graph_may_be_gone_through_twice() -> None:
    weight = leaf(3, 3)
    init = leaf(2, 3)
    with simulated(drawn(3)):
        carry, _ = scan(lambda h, _: (torch.tanh(h @ weight), None), init, length=20, memory=400, host_memory=300)
        first = torch.autograd.grad(carry.sum(), [init, weight], retain_graph=True)
        second = torch.autograd.grad(carry.sum(), [init, weight])
    assert same(list(first), list(second))


@pytest.mark.parametrize("seed", range(25))
def test_any_scan_with_copies_at_any_time(seed: int) -> None:
    attempt(random.Random(seed))


# --- these tests can fail -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "mode"),
    [
        ("compute", "every state in the host's memory"),
        ("compute", "residuals on disk"),
        ("worker", "states on disk"),
        ("worker", "residuals on disk"),
    ],
)
def test_who_does_not_wait_gets_other_bits(who: str, mode: str, run: Callable[..., Any]) -> None:
    case, expected = case_of("lstm", STEPS)
    found, _ = run(mode, case, when_wanted, ignoring={who}, checks=False)
    assert not same(found, expected)


@pytest.mark.parametrize("who", ["compute", "out", "in"])
@pytest.mark.parametrize("mode", ["every state in the host's memory", "residuals on disk"])
def test_who_does_not_wait_is_found(who: str, mode: str, run: Callable[..., Any]) -> None:
    case, _ = case_of("lstm", STEPS)
    with pytest.raises(DeviceError, match="no event orders them"):
        run(mode, case, when_wanted, ignoring={who})


@pytest.mark.parametrize(
    "guard",
    ["buffer before it is filled", "buffer before it is fetched into", "arrival"],
)
def test_each_guard_is_needed(guard: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from longtape.torch import linked
    from longtape.torch.ring import Buffer

    if guard == "buffer before it is filled":
        monkeypatch.setattr(linked.Linked, "_hold_compute", lambda self, events: None)
    elif guard == "buffer before it is fetched into":
        monkeypatch.setattr(Buffer, "still_busy", lambda self: [])
    else:
        fetched = linked.Linked._copy_in

        def forgetful(self: Any, buffer: Any, *rest: Any) -> None:
            fetched(self, buffer, *rest)
            buffer.arrived = None

        monkeypatch.setattr(linked.Linked, "_copy_in", forgetful)
    case, _ = case_of("lstm", STEPS)
    with pytest.raises(DeviceError, match="no event orders them"):
        for mode in ("every state in the host's memory", "residuals on disk", "states on disk"):
            run(mode, case, when_wanted)


# --- bounds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3, 8])
def test_the_host_runs_ahead_by_so_many_actions_and_no_more(
    most: int, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtape.engine.meter import EventMeter

    monkeypatch.setattr("longtape.engine.meter.MOST_AHEAD", most)
    ahead: list[int] = []
    note = EventMeter.note

    def counting(self: EventMeter, *arguments: Any) -> None:
        note(self, *arguments)
        ahead.append(self.ahead)

    monkeypatch.setattr(EventMeter, "note", counting)
    case, expected = case_of("lstm", STEPS)
    found, _ = run("windows taped on the device", case, when_wanted)
    assert same(found, expected)
    assert max(ahead) == most  # a device that does nothing until it is wanted is always as far behind as may be


def test_no_memory_of_the_device_is_reserved_in_a_sweep(run: Callable[..., Any]) -> None:
    counts = []
    for steps in (24, 33):
        case, _ = case_of("lstm", steps)
        with SimulatedDevice() as device:
            from longtape.torch.devices import standing_in

            with standing_in(device):
                case.outcome(scan, memory=900, host_memory=1_500, capture=False)
            counts.append(device.reservations)
    assert counts[0] == counts[1] <= 2  # one to time the link with, one for the run


def test_few_buffers_are_as_good_as_many(run: Callable[..., Any]) -> None:
    case, expected = case_of("gated", STEPS)
    copies = []
    for staging in (2, 3, 4, 16):
        found, of = run("every state in the host's memory", case, drawn(staging), staging=staging)
        assert same(found, expected)
        copies.append(of.device.links[1].count)
    assert copies[0] > copies[-1] > 0  # what is still on the device is used from there


def test_choose_is_left_alone() -> None:
    from longtape import compose

    assert compose.choose is choose


@pytest.mark.parametrize("mode", MODES)
def test_backward_may_run_in_another_thread_as_autograd_has_it_for_cuda(
    mode: str, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, capture, disk = MODES[mode]
    use_plan(monkeypatch, planner)
    case, expected = case_of("dropout", STEPS)
    options: dict[str, Any] = {"memory": MEMORY, "host_memory": MEMORY, "capture": capture}
    if disk:
        options["disk"] = scratch
    found: list[Tensor | None] = []
    with simulated(drawn(4)):
        torch.manual_seed(3)
        carry, ys = scan(case.step, case.init, case.xs, **options)
        loss = loss_of(carry, ys)
        thread = threading.Thread(
            target=lambda: found.extend(torch.autograd.grad(loss, case.wanted(), allow_unused=True))
        )
        thread.start()
        thread.join()
    assert same(found, expected[-1 - len(case.wanted()) : -1])
