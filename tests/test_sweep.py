"""`Sweep`: the same bits as storing everything, within the budget, and clear errors."""

import functools
import threading
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace, Recording, Spanning, store_everything

import longtape
from longtape.measure import TierSpeed
from longtape.plan.binomial import advances
from longtape.testing.tiers import ThrottledTier
from longtape.tiers.disk import DiskTier

exact = functools.lru_cache(maxsize=4096)(store_everything)
STATE = 64 + 12  # two arrays, the second on the next cache line


def run(model, steps, **options):
    sweep = longtape.Sweep(model, steps, **options)
    model.advanced = 0  # a few first steps were run to time them
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    return sweep


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from([Chaotic, Spanning, OutOfPlace]),
    steps=st.one_of(st.integers(1, 60), st.integers(1, 2000)),
    slots=st.integers(1, 70),
    on_disk=st.booleans(),
)
def test_same_bits_for_every_budget(tmp_path_factory, kind, steps, slots, on_disk):
    if slots < 3:
        steps = min(steps, 200)  # quadratic with one slot
    model = kind()
    disk = tmp_path_factory.mktemp("scratch") if on_disk else None
    sweep = run(model, steps, memory=slots * STATE, disk=disk)
    assert model.result() == exact(steps)
    assert sweep.report.measured.peak_memory_bytes <= slots * STATE
    assert disk is None or not list(disk.iterdir())


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 300), slots=st.integers(2, 20), size=st.sampled_from([5, 8192, 9001]))
def test_same_bits_when_states_are_large_enough_for_direct_io(tmp_path_factory, steps, slots, size):
    model = Chaotic(size)
    nbytes = 8 * size + 128 + 4096
    run(model, steps, memory=slots * nbytes, disk=tmp_path_factory.mktemp("scratch"))
    assert model.result() == exact(steps, size)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([Chaotic, OutOfPlace, Recording]),
    steps=st.integers(1, 300),
    slots=st.integers(8, 40),
    size=st.sampled_from([500, 9001]),
    name=st.sampled_from(["lz4", "zstd", "bitshuffle+lz4", "bitshuffle+zstd"]),
)
@example(kind=Recording, steps=21, slots=20, size=9001, name="lz4")  # buffers grow twice with the blocks
def test_same_bits_when_what_is_stored_is_compressed(tmp_path_factory, kind, steps, slots, size, name):
    model, memory = kind(size), slots * (8 * size + 128 + 4096)
    costs = longtape.Costs(1e-3, 2e-3, 1.1e-3, 1e-3, write_bytes_per_second=1e8, read_bytes_per_second=1e8)
    sweep = run(model, steps, memory=memory, disk=tmp_path_factory.mktemp("scratch"), compress=name, costs=costs)
    assert model.result() == exact(steps, size)
    report = sweep.report
    assert report.measured.peak_memory_bytes <= memory
    assert report.lossy_bound is None
    if report.writes:
        assert report.codec == name
        assert report.compression_ratio >= 1.0


@pytest.mark.parametrize("known", [True, False])
def test_the_buffers_of_a_codec_are_predicted(tmp_path, known):
    model = Large(nbytes=1 << 20)
    costs = longtape.Costs(2e-3, 4e-3, write_bytes_per_second=1e8, read_bytes_per_second=1e8)
    steps = model.ends_at if known else None
    report = run(model, steps, memory="12MiB", disk=tmp_path, compress="lz4", costs=costs).report
    assert report.codec == "lz4"
    assert report.predicted.peak_memory_bytes == report.measured.peak_memory_bytes > 11 << 20


def test_a_lossy_codec_says_so_and_keeps_integers(tmp_path):
    size = 20_000
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    model = Chaotic(size)  # which asserts, at every step, that its counter is right
    memory = 6 * (8 * size + 8192)
    sweep = run(model, 100, memory=memory, disk=tmp_path, compress="relative:1e-6+zstd", costs=costs)
    assert sweep.report.reads > 0
    assert "LOSSY" in str(sweep.report)
    assert sweep.report.lossy_bound == 1e-6
    assert model.result() != exact(100, size)


def test_a_codec_is_used_only_where_it_pays(tmp_path):
    class Noise(Chaotic):
        def advance(self, start, stop):
            self.state[1] += stop - start

        def reverse(self, start, stop):
            pass

    model = Noise(40_000)
    model.state[0].view(np.uint8)[:] = np.random.default_rng(1).integers(0, 256, 320_000)
    sweep = longtape.Sweep(model, 50, memory="4MiB", disk=tmp_path, compress="lz4")
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    assert sweep.report.codec is None
    assert any("not used" in note for note in sweep.report.notes)


def test_a_codec_pays_where_storage_is_slow(tmp_path):
    class Still(Chaotic):
        def advance(self, start, stop):
            time.sleep(2e-3 * (stop - start))  # another core computes
            self.state[1] += stop - start

        def reverse(self, start, stop):
            pass

    model = Still(40_000)
    model.state[0][:] = 0.5
    tier = ThrottledTier(DiskTier(tmp_path), write_bytes_per_second=2e7, read_bytes_per_second=2e7)
    sweep = longtape.Sweep(model, 60, memory="3MiB", tier=tier, compress="bitshuffle+lz4")
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    assert sweep.report.codec == "bitshuffle+lz4"
    assert sweep.report.compression_ratio > 10
    assert sweep.report.measured.bytes_written <= 60 * 40_000 * 8 / 10


@settings(max_examples=80, deadline=None)
@given(steps=st.integers(1, 400), slots=st.integers(6, 60), bandwidth=st.sampled_from([1e9, 3e4, 1e3]))
def test_same_bits_from_a_model_s_own_residuals(tmp_path_factory, steps, slots, bandwidth):
    model, memory = Recording(), slots * STATE
    costs = longtape.Costs(1e-3, 2e-3, 1.1e-3, 1e-3, write_bytes_per_second=bandwidth, read_bytes_per_second=bandwidth)
    sweep = run(model, steps, memory=memory, disk=tmp_path_factory.mktemp("scratch"), costs=costs)
    assert model.result() == exact(steps)
    assert sweep.report.measured.peak_memory_bytes <= memory


def test_a_model_that_records_runs_nothing_twice_where_storage_keeps_up(tmp_path):
    model = Recording(20_000)
    costs = longtape.Costs(1e-3, 3e-3, 1.1e-3, 1e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    sweep = run(model, 300, memory="8MiB", disk=tmp_path, costs=costs)
    assert model.result() == exact(300, 20_000)
    assert sweep.plan.schedule == "residuals"
    assert model.advanced < 30  # a slow disk of the machine that tests may cost a few
    assert model.recorded == 300


@pytest.mark.parametrize("missing", ["residual_nbytes", "record", "pull_back"])
def test_half_of_a_recording_model_is_refused(missing):
    class Half(Chaotic):
        pass

    for name in {"residual_nbytes", "record", "pull_back"} - {missing}:
        setattr(Half, name, 8)
    with pytest.raises(longtape.UsageError, match="residual_nbytes, record and pull_back"):
        longtape.Sweep(Half(), 10, memory=1000)


@pytest.mark.parametrize("slots", [40, 500])
def test_tiny_steps_are_reversed_in_windows(slots, monkeypatch):
    monkeypatch.setattr("longtape.sweep.TINY_SECONDS", 1.0)
    model = Chaotic()
    sweep = run(model, 10_000, memory=slots * STATE)
    assert model.result() == exact(10_000)
    assert sweep.report.window > 1
    assert sweep.report.measured.peak_memory_bytes <= slots * STATE


@pytest.mark.parametrize(("steps", "slots"), [(1, 1), (2, 1), (10, 3), (100, 5), (500, 8)])
def test_without_disk_it_costs_what_revolve_costs(steps, slots):
    model = Chaotic()
    sweep = run(model, steps, memory=slots * STATE)
    # The final state is handed to the caller first: a chain of one more step, whose adjoint costs nothing.
    assert model.advanced == advances(steps + 1, slots)
    assert model.advanced == sweep.report.measured.steps_recomputed + steps


def test_the_forward_sweep_ends_with_the_final_state():
    for kind in (Chaotic, OutOfPlace):
        model, other = kind(), Chaotic()
        sweep = longtape.Sweep(model, 25, memory=3 * STATE)
        sweep.forward()
        other.advance(0, 25)
        assert np.array_equal(model.state[0], other.state[0])
        sweep.close()


def test_the_report_counts(tmp_path):
    model = Chaotic(20_000)
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    sweep = run(model, 400, memory="1MiB", disk=tmp_path, costs=costs)
    report = sweep.report
    assert report.schedule == "asynchronous"
    assert report.writes > 0
    assert report.measured.bytes_written > 0
    assert report.measured.peak_memory_bytes <= 2**20
    assert 0.0 <= report.overlap_fraction <= 1.0
    assert "predicted" in str(report)
    assert '"schedule": "asynchronous"' in report.to_json()


class Large:
    """States of many bytes, in steps that take less than to have the system provide memory for many."""

    def __init__(self, nbytes=16 << 20):
        self.state = [np.zeros(nbytes // 8)]
        self.advanced = 0
        self.ends_at = 400
        self.seen = []

    def start_adjoint(self):
        self.seen.clear()

    def advance(self, start, stop):
        stop = min(stop, self.ends_at)
        time.sleep(2e-3 * (stop - start))
        self.state[0][:8] += stop - start
        return stop

    def reverse(self, start, stop):
        time.sleep(2e-3)
        self.seen.append((start, self.state[0][0], self.state[0][7]))


@pytest.mark.parametrize("known", [True, False])
def test_of_memory_that_gains_little_little_is_touched(tmp_path, known, monkeypatch):
    """And the prediction knows it."""
    model, nbytes = Large(), 16 << 20
    rate = {"write_bytes_per_second": 1e9, "read_bytes_per_second": 1e9}
    speed = TierSpeed(**rate, write_latency=0.0, read_latency=0.0, touch_bytes_per_second=2e9)  # for a busy machine too
    monkeypatch.setattr("longtape.compose.measure_tier", lambda *_, **__: speed)
    tier = ThrottledTier(DiskTier(tmp_path), **rate)
    try:
        report = run(model, model.ends_at if known else None, memory=24 * nbytes, tier=tier).report
    finally:
        tier.close()
    assert model.seen == [(step, step, step) for step in reversed(range(model.ends_at))]
    assert report.schedule == "asynchronous"
    assert report.measured.peak_memory_bytes == report.predicted.peak_memory_bytes < 17 * nbytes


def test_a_budget_below_one_state_says_the_least():
    with pytest.raises(longtape.BudgetError, match="at least 76"):
        longtape.Sweep(Chaotic(), 10, memory=75)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10"])
def test_steps_must_be_a_positive_integer(steps):
    with pytest.raises(longtape.UsageError, match="steps"):
        longtape.Sweep(Chaotic(), steps, memory=1000)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(longtape.UsageError, match="nowhere"):
        longtape.Sweep(Chaotic(), 10, memory=1000, disk=tmp_path / "nowhere")


def test_calls_out_of_order_are_refused():
    sweep = longtape.Sweep(Chaotic(), 10, memory=1000)
    with pytest.raises(longtape.StateError, match="forward"):
        sweep.reverse()
    sweep.forward()
    with pytest.raises(longtape.StateError, match="once"):
        sweep.forward()
    with pytest.raises(longtape.StateError, match="reverse"):
        _ = sweep.report
    sweep.close()
    sweep.close()


class Failing(Chaotic):
    """Raises at one step, in one of the sweeps."""

    def __init__(self, at, error, in_reverse):
        super().__init__()
        self.at, self.error, self.in_reverse = at, error, in_reverse
        self.armed = False

    def advance(self, start, stop):
        if self.armed and not self.in_reverse and start <= self.at < stop:
            raise self.error
        super().advance(start, stop)

    def reverse(self, start, stop):
        if self.in_reverse and start == self.at:
            raise self.error
        super().reverse(start, stop)


@pytest.mark.parametrize("in_reverse", [False, True])
@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()])
def test_an_error_in_a_step_keeps_its_type_and_releases_everything(tmp_path, in_reverse, error):
    model = Failing(37, error, in_reverse)
    sweep = longtape.Sweep(model, 60, memory=6 * STATE, disk=tmp_path)
    model.armed = True
    with pytest.raises(type(error)) as caught:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    if isinstance(error, Exception):
        notes = " ".join(caught.value.__notes__)
        assert ("adjoint of steps 37" if in_reverse else "forward sweep") in notes
    assert not [t for t in threading.enumerate() if t.name.startswith("longtape")]
    assert not list(tmp_path.iterdir())


def test_a_state_that_changes_shape_is_refused():
    model = Chaotic()
    sweep = longtape.Sweep(model, 10, memory=1000)
    model.state[0] = np.zeros(6)
    with pytest.raises(longtape.StepError, match=r"state\[0\]"):
        sweep.forward()


@pytest.mark.parametrize("state", [None, [], [[1.0, 2.0]], [np.array([object()])]])
def test_a_state_must_be_arrays(state):
    model = Chaotic()
    model.state = state
    with pytest.raises(longtape.UsageError, match="state"):
        longtape.Sweep(model, 10, memory=1000)
