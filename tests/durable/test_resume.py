"""Kill a run anywhere, call it again: the same bits, and little is done twice."""

import os
import random

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Recording

import longtape
from longtape.actions import Key, Kind
from longtape.durable import points
from longtape.durable.home import Home
from longtape.durable.leftovers import leftovers, remove_leftover
from longtape.plan.costs import Costs
from tests.durable.programs import MODELS, SIZE, InPlaceModel, Log, forked, right_bits, sweep
from tests.faults.sweeps import nbytes, storing_costs

STEPS, SECONDS = 300, 0.04
SLACK = 0.25
"""For a busy machine: seconds, beside the stated interval, for which a point may take to become durable."""


def finish_by_kills(directory, kind, seed, *, kills=3, costs=True, steps=STEPS):
    """Kill a run `kills` times at random moments, then let it end; how it was resumed, and what was repeated."""
    chance, log = random.Random(seed), Log(steps)

    def body():
        model = MODELS[kind](SIZE)
        model.log = log
        report = sweep(directory, model, steps, SECONDS, costs=costs)
        return model.result() + f"|{report.resumed_from}|{'; '.join(report.faults)}".encode()

    found = None
    for _ in range(kills):
        found = found or forked(body, kill_after=chance.uniform(0.01, 0.3), at_kill=log.killed)
    found = found or forked(body)
    repeated = log.oldest_repeated
    log.close()
    bits, resumed, faults = found.rsplit(b"|", 2)
    assert bits == right_bits(steps)
    assert not faults
    assert repeated < SECONDS + SLACK
    assert not os.listdir(directory)
    return resumed.decode()


@pytest.mark.parametrize("kind", MODELS)
def test_killed_at_random(tmp_path, kind):
    resumed = [finish_by_kills(tmp_path, kind, seed) for seed in range(5)]
    assert any(text != "None" for text in resumed)


def test_a_plan_in_memory_alone_is_resumed_too(tmp_path):
    """Revolve writes nothing by itself; the restart points are the keeper's."""
    slow = Costs(1e-3, 2e-3, write_bytes_per_second=1.0, read_bytes_per_second=1.0)
    resumed = [finish_by_kills(tmp_path, "in place", seed, costs=slow) for seed in range(4)]
    assert any(text != "None" for text in resumed)


class Fast(InPlaceModel):
    seconds = 0.0


def resume(directory, model=None, **options):
    options = {"memory": 5 * nbytes(SIZE), "costs": storing_costs(SIZE), "steps": STEPS} | options
    return longtape.Sweep(model or Chaotic(SIZE), options.pop("steps"), resume=directory, **options)


def begin(directory, model=None, **options):
    """A run that has turned, and is then given up."""
    with resume(directory, model, resume_seconds=1e-6, **options) as run:
        run.forward()


def end(run, model):
    run.forward()
    model.start_adjoint()
    run.reverse()
    assert model.result() == right_bits(STEPS)
    return run.report


def test_an_exception_leaves_the_run_to_be_resumed(tmp_path):
    begin(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["sweep.longtape-data", "sweep.longtape-journal"]
    assert {os.stat(tmp_path / name).st_mode & 0o777 for name in os.listdir(tmp_path)} == {0o600}
    model = Chaotic(SIZE)
    report = end(resume(tmp_path, model), model)
    assert report.resumed_from == "the turn"
    assert "resumed from the turn" in str(report)
    assert not os.listdir(tmp_path)


def test_the_final_state_is_there_at_once(tmp_path):
    begin(tmp_path)
    model, whole = Chaotic(SIZE), Chaotic(SIZE)
    whole.advance(0, STEPS)
    with resume(tmp_path, model) as run:
        run.forward()
        assert model.advanced < 20  # to see that they do the same
        assert all(np.array_equal(a, b) for a, b in zip(model.state, whole.state, strict=True))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("number of steps", lambda model: {"steps": STEPS + 1}),
        ("initial state", lambda model: model.state[0].__setitem__(0, 7.0)),
        ("fingerprint of the model", lambda model: setattr(model, "fingerprint", "other parameters")),
        ("shape of the adjoint", lambda model: model.adjoint.pop()),
    ],
)
def test_another_run_is_refused(tmp_path, what, change):
    begin(tmp_path)
    model = Chaotic(SIZE)
    options = change(model)
    with pytest.raises(longtape.ResumeError, match=what):
        resume(tmp_path, model, **(options if isinstance(options, dict) else {}))
    model = Chaotic(SIZE)
    end(resume(tmp_path, model), model)


def test_another_model_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(longtape.ResumeError, match="model"):
        resume(tmp_path, Fast(SIZE))


def test_less_memory_is_refused(tmp_path):
    begin(tmp_path)
    with pytest.raises(longtape.ResumeError, match="memory"):
        resume(tmp_path, memory=2 * nbytes(SIZE))


def test_two_at_once_need_two_names(tmp_path):
    with resume(tmp_path) as first, resume(tmp_path, name="other") as other:
        with pytest.raises(longtape.ResumeError, match="this process"):
            resume(tmp_path)
        first.forward()
        other.forward()
    assert [left.name for left in leftovers(tmp_path)] == ["other", "sweep"]


def test_another_process_holds_it(tmp_path):
    with resume(tmp_path):

        def body():
            try:
                resume(tmp_path)
            except longtape.ResumeError as error:
                return str(error).encode()
            return b"not refused"

        assert f"process {os.getpid()}".encode() in forked(body)


def test_a_child_does_not_hold_the_lock(tmp_path):
    run = resume(tmp_path)
    (here, child_end), (child_in, there) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(there)
        os.write(child_end, b"x")
        os.read(child_in, 1)
        os._exit(0)
    try:
        os.read(here, 1)
        run.close()
        resume(tmp_path).close()
    finally:
        for fd in (here, child_end, child_in, there):
            os.close(fd)
        os.waitpid(child, 0)


class Stop(Exception):
    pass


def stop_half_way(directory, kind=Chaotic, **options):
    """A run that is given up in the middle of its reverse sweep."""
    model = kind(SIZE)

    def stopping(method):
        def stop_or_go_on(step, *rest):
            if step < STEPS // 2:
                raise Stop
            getattr(kind, method)(model, step, *rest)

        return stop_or_go_on

    run = resume(directory, model, resume_seconds=1e-6, **options)
    run.forward()
    model.start_adjoint()
    for method in ("reverse", "reverse_from", "pull_back"):
        if hasattr(kind, method):
            setattr(model, method, stopping(method))
    with pytest.raises(Stop):
        run.reverse()


def test_another_loss_begins_the_reverse_sweep_anew(tmp_path):
    stop_half_way(tmp_path)
    other = Chaotic(SIZE)
    run = resume(tmp_path, other)
    run.forward()
    other.adjoint[0][:] = 2 * other.state[0]
    with pytest.warns(RuntimeWarning, match="another one"):
        run.reverse()
    model = Chaotic(SIZE)
    with longtape.Sweep(model, STEPS, memory=STEPS * nbytes(SIZE)) as whole:
        whole.forward()
        model.adjoint[0][:] = 2 * model.state[0]
        whole.reverse()
    assert other.result() == model.result()


def lose_the_final_state(directory):
    """Damage it, and only it, in the file."""
    home = Home(directory, "sweep")
    point = points.read_point(home.later(), points.read_begin(home.first), most=10**6)
    home.close()
    assert point.turned
    assert point.adjoint is not None
    place = point.items[Key(Kind.RESTART, STEPS)]
    with open(directory / "sweep.longtape-data", "r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.written))


@pytest.mark.parametrize("stopped_again", [False, True])
def test_without_the_final_state_a_durable_adjoint_is_not_gone_on_with(tmp_path, stopped_again):
    """The plan runs forward to the turn and begins at the end, for which an adjoint of the middle would be wrong."""
    stop_half_way(tmp_path)
    lose_the_final_state(tmp_path)
    with pytest.warns(RuntimeWarning, match="the final state cannot be read back"):
        run = resume(tmp_path, model := Chaotic(SIZE))
    if stopped_again:
        run.forward()
        run.close()
        run = resume(tmp_path, model := Chaotic(SIZE))
    report = end(run, model)
    assert "adjoint" not in report.resumed_from


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace])
@pytest.mark.parametrize("begun", [begin, stop_half_way])
def test_what_is_left_of_a_resumed_run_is_verified(tmp_path, kind, begun):
    """States that only the process before has seen are believed."""
    begun(tmp_path, **{"model": kind(SIZE)} if begun is begin else {"kind": kind})
    model = kind(SIZE)
    assert end(resume(tmp_path, model, verify=True), model).states_verified > 20


@pytest.mark.parametrize("begun", [begin, stop_half_way])
def test_residuals_of_a_model_that_records_are_gone_on_with(tmp_path, begun):
    costs = Costs(1e-3, 3e-3, 1.1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    options = {"costs": costs, "memory": 40 * nbytes(SIZE)}
    begun(tmp_path, **{"model": Recording(SIZE)} if begun is begin else {"kind": Recording}, **options)
    model = Recording(SIZE)
    run = resume(tmp_path, model, **options)
    assert run.plan.record_fraction > 0
    run.forward()
    assert model.recorded == 0
    model.start_adjoint()
    # It rounds otherwise than taking the adjoint of a state does.
    whole = Recording(SIZE)
    with longtape.Sweep(whole, STEPS, **options) as plain:
        plain.forward()
        whole.start_adjoint()
        plain.reverse()
    run.reverse()
    assert model.result() == whole.result()
    assert run.report.resumed_from is not None


@pytest.mark.parametrize(
    ("steps", "options", "match"),
    [
        (None, {}, "unknown length"),
        (STEPS, {"compress": "lz4"}, "compress"),
        (STEPS, {"schedule": object()}, "schedule"),
    ],
)
def test_what_a_resumable_run_is_not_combined_with(tmp_path, steps, options, match):
    with pytest.raises(longtape.UsageError, match=match):
        resume(tmp_path, steps=steps, **options)
    assert not os.listdir(tmp_path)


def test_without_adjoint_arrays_only_forward_is_resumed(tmp_path):
    class Private(Chaotic):
        def __init__(self, size):
            super().__init__(size)
            self._adjoint = self.adjoint
            del self.adjoint

        def reverse(self, start, stop):
            self.adjoint = self._adjoint
            super().reverse(start, stop)
            del self.adjoint

    model = Private(SIZE)
    run = resume(tmp_path, model, resume_seconds=1e-6)
    run.forward()
    run.reverse()
    assert any("only the forward sweep can be resumed" in note for note in run.report.notes)


@pytest.mark.parametrize("which", ["journal", "data"])
@pytest.mark.parametrize("how", ["empty", "garbage", "missing", "half"])
def test_what_is_damaged_is_done_again(tmp_path, which, how):
    begin(tmp_path)
    path = tmp_path / f"sweep.longtape-{which}"
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "garbage": bytes(len(whole)), "half": whole[: len(whole) // 2]}[how])
    model = Chaotic(SIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *arguments, **options: None)
        end(resume(tmp_path, model), model)


def test_foreign_files_are_left_alone(tmp_path):
    foreign = tmp_path / "sweep.longtape-journal"
    foreign.write_text("my own notes")
    (tmp_path / "x.longtape-data").write_text("mine as well")
    with pytest.raises(longtape.ResumeError, match="not a journal"):
        resume(tmp_path)
    assert leftovers(tmp_path) == []
    assert foreign.read_text() == "my own notes"


def test_leftovers_are_listed_and_removed(tmp_path):
    begin(tmp_path)
    with resume(tmp_path, name="held"):
        found = {left.name: left for left in leftovers(tmp_path)}
        assert {name: left.held for name, left in found.items()} == {"held": True, "sweep": False}
        assert not remove_leftover(found["held"])
        assert remove_leftover(found["sweep"])
    assert not leftovers(tmp_path)


def test_names_are_file_names(tmp_path):
    for name in ("", "a/b", "..", "x" * 200, ".hidden"):
        with pytest.raises(longtape.UsageError, match="name"):
            Home(tmp_path, name)
