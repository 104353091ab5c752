"""What a run believes of steps, storage, link and codec is what they take, on a clock that the test controls."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from longtape.actions import Kind
from longtape.engine.workers import Workers
from longtape.measure import JobCosts, measure_codec, measure_tier
from longtape.plan.costs import Costs
from longtape.tiers.memory import MemoryTier
from tests.edges.clocks import SPIKES, TRUE_SECONDS, Clock, Varying, controlled, near


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return controlled(monkeypatch)


# PyTorch --------------------------------------------------------------------------------------------


def eager_scan(clock: Clock, forward: Any, adjoint: Any, *, steps: int = 40, **options: Any) -> tuple[Any, int]:
    """Runs a scan; returns its run, and how many steps ran before the sweep began."""
    torch = pytest.importorskip("torch")
    import longtape.torch as lt

    calls: list[int] = []
    before: list[int] = []

    hidden: Any = threading.Semaphore()  # into which nobody looks: a step that counts is refused
    hidden.forward, hidden.adjoint, hidden.calls = forward, adjoint, calls
    hidden.spend = clock.spend

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, carry: Any) -> Any:
            hidden.spend(hidden.forward())
            return 0.5 * carry

        @staticmethod
        def backward(ctx: Any, bar: Any) -> Any:
            hidden.spend(hidden.adjoint())
            return 0.5 * bar

    def step(carry: Any, x: Any) -> tuple[Any, None]:
        hidden.calls.append(1)
        return Step.apply(carry), None

    runs: list[Any] = []
    start = torch.ones(256, requires_grad=True)
    carry, _ = lt.scan(
        step,
        start,
        torch.ones(steps, 1),
        capture=False,
        on_plan=lambda choice: before.append(len(calls)),
        on_report=runs.append,
        **{"memory": 4096, "tier": MemoryTier(), **options},
    )
    carry.sum().backward()
    assert torch.equal(start.grad, torch.full((256,), 0.5**steps))
    return runs[0], before[0]


@pytest.mark.parametrize("true", TRUE_SECONDS)
def test_eager_steps(clock: Clock, true: float) -> None:
    for spike in SPIKES:
        run, _ = eager_scan(clock, Varying(true, spike), Varying(2 * true, spike))
        assert run.costs.forward == near(true)
        assert run.costs.reverse == near(3 * true)


def test_an_eager_step_is_called_a_handful_of_times_before_the_sweep(clock: Clock) -> None:
    assert eager_scan(clock, Varying(1e-4), Varying(1e-4))[1] <= 6


def test_an_eager_step_is_not_run_to_keep_a_disk_company(clock: Clock, scratch: Any) -> None:
    assert eager_scan(clock, Varying(1e-4), Varying(1e-4), tier=None, disk=scratch)[1] <= 6


@pytest.mark.parametrize("options", [{"tier": None}, {"memory": "1MiB"}])
def test_steps_are_run_once_each_way_where_no_choice_depends_on_their_times(clock: Clock, options: Any) -> None:
    run, before = eager_scan(clock, Varying(1e-4), Varying(1e-4), **options)
    assert before <= 4  # twice more to see whether it is repeatable
    assert run.costs.forward == near(1e-4)
    assert run.costs.reverse == near(2e-4)


def test_a_step_of_seconds_is_timed_once(clock: Clock) -> None:
    run, before = eager_scan(clock, Varying(3.0), Varying(6.0))
    assert before <= 4
    assert run.costs.forward == near(3.0)
    assert run.costs.reverse == near(9.0)


@pytest.mark.parametrize("true", TRUE_SECONDS)
def test_captured_steps(clock: Clock, true: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import longtape.torch as lt
    from longtape.torch.captured import CapturedSteps

    costs: dict[str, Any] = {}

    def spending(name: str) -> None:
        method = getattr(CapturedSteps, name)

        def spent(self: Any, *given: Any) -> Any:
            clock.spend(costs[name]())
            return method(self, *given)

        monkeypatch.setattr(CapturedSteps, name, spent)

    for name in ("advance", "record", "pull_back"):
        spending(name)
    weight = torch.full((64,), 0.5, requires_grad=True)
    for spike in SPIKES:
        costs |= {"advance": Varying(true, spike), "record": Varying(1.5 * true, spike)}
        costs["pull_back"] = Varying(2 * true, spike)
        choices: list[Any] = []
        runs: list[Any] = []
        carry, _ = lt.scan(
            lambda c, x: ((c * weight).sin(), None),
            torch.ones(64),
            torch.ones(40, 1),
            memory=8192,
            tier=MemoryTier(),
            capture=True,
            on_plan=choices.append,
            on_report=runs.append,
        )
        carry.sum().backward()
        found = runs[0].costs
        assert not runs[0].notes
        assert found.forward == near(true)
        assert found.record == near(1.5 * true)
        assert found.pull_back == near(2 * true)
        assert found.reverse == near(3.5 * true)


# JAX ------------------------------------------------------------------------------------------------


class Spending:
    """Has the chunks of JAX loops take a known time a step."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        from longtape.jax.chunks import Chunks

        self.costs: dict[str, Any] = {}
        self.steps = dict.fromkeys(("_advance", "_record", "_pull_back"), 0)
        compiled = Chunks._compile

        def spending(chunks: Any, function: Any, types: Any, donated: Any) -> Any:
            name, run = function.__name__, compiled(chunks, function, types, donated)

            def spent(*given: Any) -> Any:
                found = run(*given)
                count = int(given[-1]) if name == "_pull_back" else int(found[0])
                self.steps[name] += count
                clock.spend(sum(self.costs[name]() for _ in range(count)))
                return found

            return spent

        monkeypatch.setattr(Chunks, "_compile", spending)

    def set(self, true: float, spike: int | None) -> None:
        self.costs = {"_advance": Varying(true, spike), "_record": Varying(1.5 * true, spike)}
        self.costs["_pull_back"] = Varying(2 * true, spike)


def believed_by_jax(steps: int | None, *, length: int = 400, **options: Any) -> Costs:
    jax = pytest.importorskip("jax")
    import longtape.jax as lj

    runs: list[Any] = []
    options = {"memory": 1 << 16, "tier": MemoryTier(), "on_report": runs.append, **options}

    def loss(start: Any) -> Any:
        if steps is not None:
            return lj.scan(lambda c, x: (jax.numpy.sin(c), None), start, None, length=steps, **options)[0].sum()
        count = jax.numpy.zeros((), jax.numpy.int32)
        return lj.while_loop(
            lambda c: c[1] < length, lambda c: (jax.numpy.sin(c[0]), c[1] + 1), (start, count), **options
        )[0].sum()

    jax.grad(loss)(jax.numpy.ones(64))
    costs: Costs = runs[0].costs
    return costs


@pytest.mark.parametrize("true", TRUE_SECONDS)
@pytest.mark.parametrize("steps", [400, None])
def test_steps_of_jax(clock: Clock, true: float, steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    spending = Spending(clock, monkeypatch)
    for spike in (0, 1, 2, 5, 11):
        spending.set(true, spike)
        found = believed_by_jax(steps)
        assert found.forward == near(true)
        assert found.record == near(1.5 * true)
        assert found.pull_back == near(2 * true)


def test_a_loop_of_jax_that_ends_within_the_first_steps(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    spending = Spending(clock, monkeypatch)
    spending.set(1e-4, None)
    found = believed_by_jax(None, length=7)
    assert found.forward == near(1e-4)
    assert found.record == near(1.5e-4)
    assert found.pull_back == near(2e-4)


def test_long_steps_of_jax_are_run_once_each_way(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    spending = Spending(clock, monkeypatch)
    spending.set(2.0, None)
    seen: list[dict[str, int]] = []
    found = believed_by_jax(400, on_plan=lambda choice: seen.append(dict(spending.steps)))
    assert found.forward == near(2.0)
    assert seen[0] == {"_advance": 1, "_record": 1, "_pull_back": 1}


# pyrevolve (Devito has a file of its own) ----------------------------------------------------------


@pytest.mark.parametrize("true", TRUE_SECONDS)
def test_operators_of_pyrevolve(clock: Clock, true: float) -> None:
    from longtape.pyrevolve import Checkpoint, MemoryRevolver, Operator

    live = np.ones(4)

    class Live(Checkpoint):
        def get_data(self, timestep: int) -> list[Any]:
            return [live]

    class Steps(Operator):
        def __init__(self, cost: Any) -> None:
            self.cost = cost

        def apply(self, **times: Any) -> None:
            live[:] += times["t_end"] - times["t_start"]
            clock.spend(sum(self.cost() for _ in range(times["t_start"], times["t_end"])))

    for spike in (None, 0, 1, 2):
        made = MemoryRevolver(Live(), Steps(Varying(true, spike)), Steps(Varying(2 * true)), 4, 40)
        made.apply_forward()
        assert made._run is not None
        assert made._run.costs.forward == near(true)
        made.apply_reverse()


# Storage, codec, link -------------------------------------------------------------------------------


class TimedTier(MemoryTier):
    """Takes a latency and a time for each byte, either way, on the clock."""

    def __init__(self, clock: Clock, write: Any, read: Any) -> None:
        super().__init__()
        self._clock, self._write, self._read = clock, write, read

    def write(self, key: Any, data: Any) -> None:
        self._clock.spend(self._write(data.nbytes))
        super().write(key, data)

    def read(self, key: Any, out: Any) -> None:
        self._clock.spend(self._read(out.nbytes))
        super().read(key, out)


def transfers(latency: float, speed: float, spike: int | None) -> tuple[Any, Any]:
    """Seconds of a transfer as it comes out, and as it truly is."""
    varying = Varying(1.0, spike)

    def true(nbytes: int) -> float:
        return latency + nbytes / speed

    return lambda nbytes: varying() * true(nbytes), true


@pytest.mark.parametrize("latency", [0.0, 1e-4, 5e-3])
@pytest.mark.parametrize("speed", [2e7, 2e9])
@pytest.mark.parametrize("sizes", [[1 << 16], [1 << 16, 4 << 20], [1 << 20, 4 << 20]])
def test_storage(clock: Clock, latency: float, speed: float, sizes: list[int]) -> None:
    for spike in (None, *range(6)):
        write, true_write = transfers(latency, speed, spike)
        read, true_read = transfers(2 * latency, 0.5 * speed, spike)
        tier = TimedTier(clock, write, read)
        workers = Workers(tier, clock)
        try:
            found = measure_tier(tier, workers, sizes)
        finally:
            workers.close(30.0)
        for nbytes in sizes:
            if true_read(nbytes) < 0.08:  # what takes longer is not tried out, or once
                assert found.write_seconds(nbytes) == near(true_write(nbytes))
                assert found.read_seconds(nbytes) == near(true_read(nbytes))


@pytest.mark.parametrize("state", [100, 1 << 16, 3 << 20, 4 << 20, 9 << 20])
def test_latency_and_bandwidth_are_told_apart_whatever_the_state(
    clock: Clock, state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where residuals may be stored, too, in blocks of another size."""
    from longtape import Sweep

    class Recording:
        residual_nbytes = 64

        def __init__(self) -> None:
            self.state = [np.zeros(state, np.uint8)]

        def advance(self, start: int, stop: int) -> None:
            clock.spend((stop - start) * 1e-3)

        def reverse(self, start: int, stop: int) -> None:
            pass

        def record(self, step: int, residuals: Any) -> None:
            clock.spend(1e-3)

        def pull_back(self, step: int, residuals: Any) -> None:
            pass

    monkeypatch.setattr("longtape.compose.measure_tier", _without_company(measure_tier))
    write, true_write = transfers(1e-3, 1e9, None)
    read, true_read = transfers(1e-3, 2e9, None)
    tier = TimedTier(clock, write, read)
    with Sweep(Recording(), 100, memory=20 << 20, tier=tier) as sweep:
        found = sweep._run.costs
    for nbytes in (state, 8 << 20):
        assert found.write_seconds(nbytes) == near(true_write(nbytes))
        assert found.read_seconds(nbytes) == near(true_read(nbytes))


def _without_company(measure: Any) -> Any:
    """Steps that run meanwhile would spend the same clock."""
    return lambda *given, busy, **named: measure(*given, busy=None, **named)


@pytest.mark.parametrize(("out", "back"), [(1e8, 3e8), (5e9, 1e9)])
def test_a_codec(clock: Clock, out: float, back: float) -> None:
    for spike in (None, *range(6)):
        leaving, coming = Varying(1.0, spike), Varying(1.0, spike)

        def encode(data: Any, floats: Any = (), cost: Any = leaving) -> Any:
            clock.spend(cost() * data.nbytes / out)
            return data[: data.nbytes // 4].copy()

        def decode(packed: Any, whole: Any, cost: Any = coming) -> None:
            clock.spend(cost() * whole.nbytes / back)
            whole[:] = 0

        codec: Any = SimpleNamespace(name="fake", bound=None, encode=encode, decode=decode)
        found = measure_codec(codec, (Kind.RESIDUALS, np.zeros(1 << 20, np.uint8)), None, JobCosts())
        assert found.encode_bytes_per_second == near(out)
        assert found.decode_bytes_per_second == near(back)
        assert found.stored_fraction == near(0.25)
        assert found.slowdown == 1.0
        through = found.through(Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9))
        assert through.write_seconds(1 << 20) == near((1 << 20) * (1 / out + 0.25e-9))
        assert through.read_seconds(1 << 20) == near((1 << 20) * (1 / back + 0.25e-9))


class LinkedDevice:
    """A device whose copies take a latency and a time for each byte, on the clock."""

    name = "timed"

    def __init__(self, clock: Clock, out: Any, into: Any) -> None:
        self.out, self.into, self.compute = (TimedStream(clock, seconds) for seconds in (out, into, None))

    def begin_peak(self) -> int:
        return 0

    def pin(self, memory: Any) -> None:
        pass

    def unpin(self, memory: Any) -> None:
        pass

    def reserve(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def seconds(self, began: Any, ended: Any) -> float:
        return float(ended.at - began.at)


class TimedStream:
    def __init__(self, clock: Clock, seconds: Any) -> None:
        self._clock, self._seconds = clock, seconds

    def record(self) -> Any:
        return SimpleNamespace(at=self._clock(), wait=lambda: None, is_over=lambda: True)

    def copy(self, target: Any, source: Any) -> None:
        self._clock.spend(self._seconds(target.nbytes))


@pytest.mark.parametrize("latency", [0.0, 2e-5, 1e-3])
@pytest.mark.parametrize("speed", [2e9, 2e10])
@pytest.mark.parametrize("state", [64, 5000, 1 << 20, 32 << 20])
def test_a_link(clock: Clock, latency: float, speed: float, state: int) -> None:
    pytest.importorskip("torch")
    from longtape.torch.linked import Linked

    for spike in (None, *range(8)):
        out, true_out = transfers(latency, speed, spike)
        into, true_into = transfers(latency, 0.5 * speed, spike)
        device: Any = LinkedDevice(clock, out, into)
        found = Linked(device, 1 << 30).with_link(Costs(1e-3, 2e-3), state)
        for nbytes in (state, 8 << 20):
            assert found.out_seconds(nbytes) == near(true_out(nbytes))
            assert found.in_seconds(nbytes) == near(true_into(nbytes))
