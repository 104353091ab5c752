"""The plan that is shown is the plan that is run: its slots, blocks, window, spacing, tail and dense end."""

from __future__ import annotations

import heapq
import random
import sys
from collections import deque
from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from longtape import Sweep
from longtape.actions import Action, Kind
from longtape.compose import Run
from longtape.measure import TierSpeed
from longtape.plan.costs import Costs
from longtape.plan.simulate import Speeds, simulate
from longtape.tiers.memory import MemoryTier
from tests.edges.clocks import Clock, controlled

STATE = 4096


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return controlled(monkeypatch)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layouts that plans were made with."""
    from longtape import compose

    found: list[Any] = []
    plan = compose.AsynchronousPlan

    def noting(stock: Any, layout: Any) -> Any:
        found.append(layout)
        return plan(stock, layout)

    monkeypatch.setattr(compose, "AsynchronousPlan", noting)
    return found


def believe(monkeypatch: pytest.MonkeyPatch, speed: TierSpeed) -> None:
    """Storage is measured to be as quick as this."""
    monkeypatch.setattr("longtape.compose.measure_tier", lambda *given, **named: speed)


class Timed:
    """A model whose steps take a known time."""

    def __init__(self, clock: Clock, forward: float, reverse: float, nbytes: int = STATE, *, records: int = 0) -> None:
        self.state = [np.zeros(nbytes, np.uint8)]
        self._clock, self._forward, self._reverse = clock, forward, reverse
        self.reverse_seconds = reverse
        if records:
            self.residual_nbytes, self.record, self.pull_back = records, self._record, self._pull_back

    def advance(self, start: int, stop: int) -> int:
        self._clock.spend((stop - start) * self._forward)
        self.state[0] += np.uint8((stop - start) % 256)
        return stop

    def reverse(self, start: int, stop: int) -> None:
        self._clock.spend((stop - start) * self._reverse)

    def _record(self, step: int, residuals: Any) -> None:
        self._clock.spend(self._forward)
        self.state[0] += np.uint8(1)

    def _pull_back(self, step: int, residuals: Any) -> None:
        self._clock.spend(self._reverse)


def check_shown(run: Run, layout: Any, shown: Any) -> None:
    """What was allocated and laid out is what the plan says."""
    pools = run._pools
    beside = run._traits.working_slots + (run._keeper is not None)
    assert run.choice is shown
    assert pools[Kind.SNAPSHOT].count == shown.slots + beside
    assert pools[Kind.RESIDUALS].count == shown.blocks
    stock = run._stock
    assert (stock.snapshots.capacity, stock.residuals.capacity) == (shown.slots, shown.blocks)
    assert (layout.window, layout.tail, layout.dense) == (shown.window, shown.tail, shown.dense)
    assert (layout.fixed_spacing, layout.longest_piece) == (shown.stall_spacing, shown.longest_piece)
    assert layout.stores == shown.uses_disk
    assert layout.record_fraction == shown.record_fraction
    assert (layout.staging, layout.held) == (shown.staging, shown.held)
    held = (shown.slots + beside) * run._mover.nbytes[Kind.SNAPSHOT]
    if shown.blocks:
        held += shown.blocks * run._mover.nbytes[Kind.RESIDUALS]
    assert held <= run.memory_nbytes


@pytest.mark.parametrize("seed", range(24))
def test_sweeps(clock: Clock, laid_out: list[Any], monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    forward = 10 ** chance.uniform(-5, -2)
    speed = STATE / (forward * 10 ** chance.uniform(-1, 2))
    touch = STATE / (forward * 10 ** chance.uniform(-2, 1))
    believe(monkeypatch, TierSpeed(speed, speed, 0.0, 0.0, touch))
    model = Timed(clock, forward, 2 * forward, records=chance.choice((0, 0, 1000, 10_000)))
    steps = chance.choice((30, 300, 3000))
    options: dict[str, Any] = {"tier": MemoryTier()} if chance.random() < 0.9 else {}
    if chance.random() < 0.3:
        options["disk_limit"] = chance.randint(1, 40) * STATE
    with Sweep(model, steps, memory=chance.randint(2, 60) * STATE + 10_000, **options) as sweep:
        shown = sweep.plan
        check_shown(sweep._run, laid_out[-1], shown)
        sweep.forward()
        sweep.reverse()
        assert sweep.plan is shown


def test_a_tail_that_is_costly_to_touch_is_shown_as_it_is_run(
    clock: Clock, laid_out: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    believe(monkeypatch, TierSpeed(STATE / 5e-3, STATE / 5e-3, 0.0, 0.0, STATE / 1e-2))
    with Sweep(Timed(clock, 1e-3, 2e-3), 3000, memory=60 * STATE, tier=MemoryTier()) as sweep:
        assert sweep.plan.schedule == "asynchronous"
        assert sweep.plan.staging == 4
        assert laid_out[-1].tail == sweep.plan.tail <= 4 * sweep.plan.window
        assert laid_out[-1].dense == sweep.plan.dense == 0


@pytest.mark.parametrize("memory", [4500, 6000, 20_000, 100_000])
@pytest.mark.parametrize("stores", [False, True])
def test_captured_scans_whose_blocks_have_heads(
    laid_out: list[Any], monkeypatch: pytest.MonkeyPatch, memory: int, stores: bool
) -> None:
    """The heads count when the plan is chosen, so nothing has to be made to fit afterwards."""
    torch = pytest.importorskip("torch")
    import longtape.torch as lt
    from longtape.plan.choose import choose

    shown: list[Any] = []
    runs: list[Any] = []

    def noting(*arguments: Any, **given: Any) -> Run:
        runs.append(Run(*arguments, **given))
        return runs[-1]

    monkeypatch.setattr(sys.modules["longtape.torch.scan"], "Run", noting)
    weight = torch.full((16,), 0.5, requires_grad=True)
    carry, _ = lt.scan(
        lambda c, x: (torch.sin(c * weight), None),
        torch.ones(16),
        torch.ones(300, 1),
        memory=memory,
        tier=MemoryTier() if stores else None,
        capture=True,
        on_plan=shown.append,
    )
    carry.sum().backward()
    run = runs[0]
    assert not run.report.notes
    assert run.choice is shown[-1]
    layout = laid_out[-1]
    assert (layout.window, layout.tail, layout.dense) == (shown[-1].window, shown[-1].tail, shown[-1].dense)
    assert run._mover.nbytes[Kind.RESIDUALS] * run.choice.blocks <= memory
    assert run.report.measured.peak_memory_bytes <= memory
    assert run.choice == choose(run._problem(), run.costs)


def test_a_choice_says_all_that_a_run_is_laid_out_with(clock: Clock, laid_out: list[Any]) -> None:
    from longtape.plan.choice import layout_of

    with Sweep(Timed(clock, 1e-3, 2e-3), 100, memory=6 * STATE, tier=MemoryTier()) as sweep:
        assert layout_of(sweep.plan) == laid_out[-1]


def test_a_run_that_is_gone_on_with_is_laid_out_as_it_was(
    tmp_path: Any, clock: Clock, laid_out: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured then, and memory was costly to touch."""
    believe(monkeypatch, TierSpeed(STATE / 5e-3, STATE / 5e-3, 0.0, 0.0, STATE / 1e-2))

    def sweep() -> Sweep:
        return Sweep(Timed(clock, 1e-3, 2e-3), 3000, memory=60 * STATE, resume=tmp_path, resume_seconds=0.1)

    with sweep() as first:
        first.forward()
    with sweep() as second:
        assert second.plan == replace(first.plan, alternatives=())
        assert laid_out[-1] == laid_out[-2]


# Replayed -------------------------------------------------------------------------------------------


class VirtualWorkers:
    """Transfers that take their time on a clock that nothing else moves while somebody waits."""

    def seconds(self, transfer: Any) -> float:
        return 0.0

    def __init__(self, tier: Any, clock: Any) -> None:
        self._tier, self._clock = tier, clock
        self._lanes = {is_write: SimpleNamespace(queue=deque(), free=0.0) for is_write in (True, False)}
        self._under_way: list[tuple[float, int, Any]] = []
        self._count = 0

    def submit(self, transfer: Any) -> None:
        self._lanes[transfer.is_write].queue.append((self._clock(), transfer))
        self._begin()

    def _begin(self) -> None:
        for lane in self._lanes.values():
            while lane.queue:
                asked, transfer = lane.queue[0]
                began = max(asked, lane.free)
                if began > self._clock() + 1e-12:
                    break
                lane.queue.popleft()
                if not transfer.claim():
                    continue
                (self._tier.write if transfer.is_write else self._tier.read)(transfer.key, transfer.slot.data)
                transfer.began, transfer.ended = began, began + self.seconds(transfer)
                lane.free = transfer.ended
                self._count += 1
                heapq.heappush(self._under_way, (transfer.ended, self._count, transfer))

    def next_finished(self, timeout: float | None) -> Any:
        self._begin()
        if not self._under_way:
            return None
        ended = self._under_way[0][0]
        if ended > self._clock() + 1e-12:
            if timeout == 0:
                return None
            self._clock.spend(ended - self._clock())
        _, _, transfer = heapq.heappop(self._under_way)
        self._begin()
        return transfer

    def let_go(self) -> None:
        self.close(0.0)

    def close(self, timeout: float) -> bool:
        return True


class Noting:
    def __init__(self) -> None:
        self.actions: list[Action] = []

    def on_action(self, action: Action, began: float, ended: float) -> None:
        self.actions.append(action)

    def on_transfer(self, *given: Any) -> None:
        pass


@pytest.mark.parametrize("seed", range(30))
def test_the_plan_that_is_shown_gives_the_actions_that_are_run(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    from longtape.plan.choice import layout_of

    chance = random.Random(seed)
    forward = chance.choice((1e-3, 2e-3))
    write = forward * chance.choice((0.0, 0.4, 1.3, 2.6, 7.7, 19.1, 60.3))
    read = write * chance.choice((0.3, 1.0, 1.7))
    costs = Costs(
        forward,
        2.25 * forward,
        write_bytes_per_second=STATE / write if write else inf,
        read_bytes_per_second=STATE / read if read else inf,
        touch_bytes_per_second=chance.choice((inf, STATE / forward)),
    )
    monkeypatch.setattr(VirtualWorkers, "seconds", lambda self, transfer: write if transfer.is_write else read)
    monkeypatch.setattr("longtape.compose.Workers", VirtualWorkers)
    steps, noting = chance.choice((20, 100, 400)), Noting()
    limit = chance.choice((None, None, 12 * STATE))
    model = Timed(clock, forward, 2.25 * forward)
    with Sweep(
        model,
        steps,
        memory=chance.randint(2, 30) * STATE,
        tier=MemoryTier(),
        disk_limit=limit,
        costs=costs,
        observers=[noting],
    ) as sweep:
        shown, began = sweep.plan, clock()
        sweep.forward()
        sweep.reverse()
    expected: list[Action] = []
    outcome = simulate(
        steps,
        shown.slots,
        Speeds(forward, 2.25 * forward, lambda key: write, lambda key: read),
        layout=layout_of(shown),
        blocks=shown.blocks,
        storage_limit=inf if limit is None else limit,
        item_nbytes={Kind.SNAPSHOT: STATE, Kind.RESIDUALS: 0},
        observe=expected.append,
    )
    assert noting.actions == expected
    assert clock() - began == pytest.approx(outcome.seconds, rel=1e-6)
    assert sweep.report.measured.stall_seconds == pytest.approx(outcome.stall_seconds, rel=1e-6, abs=1e-9)
