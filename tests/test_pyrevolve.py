"""`longtape.pyrevolve`: the protocol of pyrevolve on Longtape, bit for bit, and clear errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longtape
import longtape.pyrevolve as lp

WIDTH = 40
LEVELS = 3


class Fields:
    """Two arrays in cyclic time buffers of three levels, single and double precision, and a count."""

    def __init__(self) -> None:
        self.u = np.zeros((LEVELS, WIDTH), np.float32)
        self.w = np.zeros((LEVELS, 3))
        self.count = np.zeros((), np.int64)
        self.u[0], self.w[0] = np.linspace(0, 1, WIDTH), 0.3

    def levels(self, step: int) -> list[np.ndarray]:
        """Two levels of each: state `step`."""
        return [*(f[(step - back) % LEVELS] for f in (self.u, self.w) for back in (0, 1)), self.count]


class Forward(lp.Operator):
    def __init__(self, fields: Fields) -> None:
        self.fields, self.calls, self.total = fields, [], 0

    def apply(self, **kwargs: Any) -> None:
        start, stop = kwargs["t_start"], kwargs["t_end"]
        self.calls.append((start, stop))
        for t in range(start, stop):
            for f, bend in ((self.fields.u, np.float32(3.6)), (self.fields.w, 3.7)):
                now, before, after = f[t % LEVELS], f[(t - 1) % LEVELS], f[(t + 1) % LEVELS]
                after[:] = 0.9 * bend * now * (1 - now) + 0.1 * before
            self.fields.count += t
            self.total += 1


class Reverse(lp.Operator):
    """Remembers every level that it could see, for each step."""

    def __init__(self, fields: Fields) -> None:
        self.fields, self.order, self.seen = fields, [], []

    def apply(self, **kwargs: Any) -> None:
        for t in range(kwargs["t_end"] - 1, kwargs["t_start"] - 1, -1):
            self.order.append(t)
            levels = [f[(t + d) % LEVELS].tobytes() for f in (self.fields.u, self.fields.w) for d in (1, 0, -1)]
            self.seen.append(levels)


class Live(lp.Checkpoint):
    dtype, size = np.float32, 1  # not relied on

    def __init__(self, fields: Fields) -> None:
        self.fields = fields

    def get_data(self, timestep: int) -> list[np.ndarray]:
        return self.fields.levels(timestep)

    def get_data_location(self, timestep: int) -> list[np.ndarray]:
        return self.get_data(timestep)


def make(kind: Any = None, checkpoint: type[Live] = Live, **arguments: Any) -> tuple[Any, Forward, Reverse, Fields]:
    fields = Fields()
    forward, reverse = Forward(fields), Reverse(fields)
    kind = kind or lp.Revolver
    return kind(checkpoint(fields), forward, reverse, **arguments), forward, reverse, fields


def expected(steps: int) -> list[list[bytes]]:
    fields = Fields()
    forward, reverse = Forward(fields), Reverse(fields)
    for step in range(steps):
        forward.apply(t_start=step, t_end=step + 1)
        reverse.apply(t_start=step, t_end=step + 1)
    return reverse.seen[::-1]


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 300), kept=st.integers(2, 30), kind=st.sampled_from(["memory", "disk", "both", "levels"]))
def test_the_reverse_operator_sees_every_level_of_the_buffer(tmp_path_factory, steps, kept, kind):
    where = tmp_path_factory.mktemp("scratch")
    arguments: dict[str, Any] = {"n_timesteps": steps}
    if kind == "levels":
        storages = [lp.NumpyStorage(1, kept, np.float32), lp.DiskStorage(1, steps, np.float32, filedir=where)]
        revolver, forward, reverse, _ = make(lp.MultiLevelRevolver, storage_list=storages, **arguments)
    elif kind == "disk":
        revolver, forward, reverse, _ = make(lp.DiskRevolver, n_checkpoints=kept, filedir=where, **arguments)
    else:
        arguments["n_checkpoints"] = kept
        disk = where if kind == "both" else None
        revolver, forward, reverse, _ = make(disk=disk, **arguments)
    revolver.apply_forward()
    assert forward.total == steps  # every step once: a user's forward operator may count on it
    assert not reverse.order
    revolver.apply_reverse()
    assert reverse.order == list(range(steps - 1, -1, -1))
    assert reverse.seen == expected(steps)
    assert not list(where.iterdir())


def test_the_live_arrays_hold_the_final_state_after_the_forward_sweep():
    revolver, _, _, fields = make(n_checkpoints=3, n_timesteps=50)
    other = Fields()
    Forward(other).apply(t_start=0, t_end=50)
    revolver.apply_forward()
    for ours, theirs in zip(fields.levels(50), other.levels(50), strict=True):
        assert np.array_equal(ours, theirs)
    revolver.close()


def test_the_budget_in_bytes_holds(scratch):
    revolver, _, reverse, _ = make(n_checkpoints=None, n_timesteps=400, memory=7 * 4096, disk=scratch)
    revolver.apply_forward()
    revolver.apply_reverse()
    assert reverse.seen == expected(400)
    assert revolver.report.measured.peak_memory_bytes <= 7 * 4096
    assert revolver.n_checkpoints == lp.adjust(400)


def test_the_reverse_operator_may_take_several_steps():
    revolver, forward, reverse, _ = make(n_checkpoints=4, n_timesteps=40, max_reverse=5)
    revolver.apply_forward()
    forward.calls.clear()
    revolver.apply_reverse()
    assert reverse.order == list(range(39, -1, -1))
    assert revolver.plan.window > 1
    assert (35, 40) in forward.calls  # all steps of a window are run before they are reversed in one call


def test_by_default_it_keeps_as_many_as_pyrevolve():
    pyrevolve = pytest.importorskip("pyrevolve")
    assert all(lp.adjust(n) == pyrevolve.adjust(n) for n in range(2, 4000))


def test_without_disk_it_is_revolve():
    """Forward steps within a constant of what pyrevolve runs on as many checkpoints."""
    pyrevolve = pytest.importorskip("pyrevolve")
    ours, forward, _, _ = make(n_checkpoints=5, n_timesteps=200)
    ours.apply_forward()
    ours.apply_reverse()
    fields = Fields()
    theirs = Forward(fields)
    live = Live(fields)
    live.get_data = lambda step: fields.levels(step)[:-1]  # pyrevolve has no arrays without a dimension
    live.size = sum(a.size for a in live.get_data(0))
    peer = pyrevolve.Revolver(live, theirs, Reverse(fields), 5, 200)
    peer.apply_forward()
    peer.apply_reverse()
    assert forward.total <= theirs.total + 10


def test_profiler():
    revolver, _, _, _ = make(n_checkpoints=5, n_timesteps=50)
    revolver.apply_forward()
    assert revolver.profiler.counts["forward"]["takeshot"] >= 1
    revolver.apply_reverse()
    assert revolver.profiler.counts["reverse"]["reverse"] == 50
    assert "In section reverse" in revolver.profiler.summary()
    assert revolver.ratio >= 1.0
    assert revolver.makespan > 0.0


def test_a_dropped_revolver_leaves_nothing(scratch):
    revolver, _, _, _ = make(n_checkpoints=4, n_timesteps=20, disk=scratch)
    revolver.apply_forward()
    del revolver  # the fixtures look for threads and files


def test_it_takes_the_place_of_pyrevolve():
    program = (
        "import longtape.pyrevolve as lp; lp.install(); lp.install(); import pyrevolve; "
        "from pyrevolve import Revolver, Operator; assert pyrevolve is lp and Revolver is lp.MemoryRevolver"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    late = "import sys, types; sys.modules['devito'] = types.ModuleType('devito'); "
    done = subprocess.run(
        [sys.executable, "-c", late + "import longtape.pyrevolve as lp; lp.install()"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "devito is imported already" in done.stderr


# Bad input ---------------------------------------------------------------------------------------


class Copies(Live):
    """Restores into arrays that nobody looks at."""

    def get_data_location(self, timestep: int) -> list[np.ndarray]:
        return [array.copy() for array in self.get_data(timestep)]


class Growing(Live):
    def get_data(self, timestep: int) -> list[np.ndarray]:
        arrays = super().get_data(timestep)
        return arrays if timestep < 7 else [np.zeros(WIDTH + 1, np.float32), *arrays[1:]]


class Shrinking(Live):
    def get_data(self, timestep: int) -> list[np.ndarray]:
        return super().get_data(timestep)[: 5 if timestep < 7 else 4]


class Objects(Live):
    def get_data(self, timestep: int) -> list[Any]:
        return [[1.0, 2.0]]


def both(revolver: Any) -> None:
    revolver.apply_forward()
    revolver.apply_reverse()


def test_what_does_not_restore_what_it_read():
    revolver, *_ = make(checkpoint=Copies, n_checkpoints=3, n_timesteps=20)
    with pytest.raises(longtape.StepError, match=r"state \d+ was put into get_data_location\(\d+\)\[\d\]") as caught:
        both(revolver)
    assert "reverse sweep" in caught.value.__notes__[0]


@pytest.mark.parametrize(("kind", "message"), [(Growing, r"\[41\]"), (Shrinking, "returned 4 arrays")])
def test_a_checkpoint_whose_size_changes(kind, message):
    revolver, *_ = make(checkpoint=kind, n_checkpoints=15, n_timesteps=20)
    with pytest.raises(longtape.StepError, match=r"get_data\(\d+\).*" + message):
        both(revolver)


def test_states_are_compared_if_asked():
    revolver, _, reverse, _ = make(n_checkpoints=4, n_timesteps=60, verify=True)
    both(revolver)
    assert reverse.seen == expected(60)
    assert revolver.report.states_verified >= 60


@pytest.mark.parametrize("first", ["wrong once", "wrong later"])
def test_an_operator_that_does_not_do_the_same_each_time(first, monkeypatch):
    revolver, forward, _, fields = make(n_checkpoints=4, n_timesteps=60, verify=True)
    apply = forward.apply

    def wavers(**kwargs: Any) -> None:
        apply(**kwargs)
        if kwargs["t_start"] == 33 and (forward.total > 60) == (first == "wrong later"):
            fields.w[(33 + 1) % LEVELS] += 1e-9

    monkeypatch.setattr(forward, "apply", wavers)
    with pytest.raises(longtape.ReplayError, match="step 33 does not do the same each time"):
        both(revolver)


def test_what_is_no_array():
    revolver, *_ = make(checkpoint=Objects, n_checkpoints=15, n_timesteps=20)
    with pytest.raises(longtape.UsageError, match=r"get_data\(0\)\[0\] must be a NumPy array"):
        both(revolver)


@pytest.mark.parametrize("failing", [0, 1, 13])
@pytest.mark.parametrize("which", ["fwd_operator", "rev_operator"])
def test_an_operator_that_raises(which, failing, monkeypatch):
    revolver, *_ = make(n_checkpoints=4, n_timesteps=20)
    operator = getattr(revolver, which)
    apply = operator.apply

    def fails(**kwargs: Any) -> None:
        if kwargs["t_start"] <= failing < kwargs["t_end"]:
            raise FloatingPointError("blew up")
        apply(**kwargs)

    monkeypatch.setattr(operator, "apply", fails)
    with pytest.raises(FloatingPointError) as caught:
        both(revolver)
    assert any("longtape: while" in note and "step" in note for note in caught.value.__notes__)


def test_calls_out_of_order():
    revolver, *_ = make(n_checkpoints=4, n_timesteps=20)
    with pytest.raises(longtape.StateError, match="apply_forward"):
        revolver.apply_reverse()
    both(revolver)
    with pytest.raises(longtape.StateError, match="once"):
        revolver.apply_forward()
    with pytest.raises(longtape.StateError):
        revolver.apply_reverse()


@pytest.mark.parametrize(
    "arguments",
    [
        {"n_checkpoints": 0, "n_timesteps": 5},
        {"n_checkpoints": 2, "n_timesteps": None},
        {"n_checkpoints": 2, "n_timesteps": 5, "compression_params": {"scheme": "zfp"}},
        {"n_checkpoints": 2, "n_timesteps": 5, "max_reverse": 0},
    ],
)
def test_arguments_that_cannot_be_honoured(arguments):
    with pytest.raises(longtape.UsageError):
        make(**arguments)


def test_storages_that_cannot_be_used():
    disk = lp.DiskStorage(1, 3, np.float32)
    for storages in ([], [disk, disk], [object()]):
        with pytest.raises(longtape.UsageError, match="storage_list"):
            make(lp.MultiLevelRevolver, n_timesteps=5, storage_list=storages)
    with pytest.raises(longtape.UsageError, match="compression"):
        lp.BytesStorage(1, 3, np.float32, (None, None))


def test_memory_for_less_than_a_state():
    revolver, *_ = make(n_checkpoints=None, n_timesteps=5, memory=10)
    with pytest.raises(longtape.BudgetError):
        revolver.apply_forward()
