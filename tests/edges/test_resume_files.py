"""Files of a resumable run: those of others are left alone, and those that are gone are missed."""

import gc
import os

import pytest
from models import Chaotic

import longtape

STEPS, SIZE = 60, 500
STATE = 64 * -(-8 * SIZE // 64) + 12
JOURNAL, DATA = "sweep.longtape-journal", "sweep.longtape-data"


def sweep(directory, model=None, **options):
    options = {"memory": 6 * STATE, "costs": longtape.Costs(1e-3, 2e-3)} | options
    return longtape.Sweep(model or Chaotic(SIZE), STEPS, resume=directory, resume_seconds=1e-6, **options)


def begin(directory):
    """A run that has turned and is given up."""
    with sweep(directory) as run:
        run.forward()


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected():
    model = Chaotic(SIZE)
    with longtape.Sweep(model, STEPS, memory=2 * STEPS * STATE) as run:
        run.forward()
        model.start_adjoint()
        run.reverse()
    return model.result()


def end(run, model):
    run.forward()
    model.start_adjoint()
    run.reverse()
    assert model.result() == expected()
    return run.report


@pytest.mark.parametrize("name", [JOURNAL, DATA])
@pytest.mark.parametrize("how", ["another user", "two links", "others may write", "a link"])
def test_files_that_may_be_somebody_elses_are_refused(tmp_path, name, how):
    directory = tmp_path / "run"
    directory.mkdir()
    begin(directory)
    path = directory / name
    if how == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, -1)
    elif how == "two links":
        os.link(path, tmp_path / "second")
    elif how == "others may write":
        path.chmod(0o666)
    else:
        path.rename(tmp_path / "first")
        path.symlink_to(tmp_path / "first")
    before = contents(directory)
    with pytest.raises(longtape.ResumeError, match=name):
        sweep(directory)
    assert contents(directory) == before


@pytest.mark.parametrize("name", [JOURNAL, DATA])
def test_a_users_own_file_of_that_name_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("my own notes")
    with pytest.raises(longtape.ResumeError, match=name):
        sweep(tmp_path)
    assert contents(tmp_path) == {name: b"my own notes"}


def test_a_data_file_that_is_not_ours_is_not_cleared_with_a_run(tmp_path):
    begin(tmp_path)
    (tmp_path / DATA).write_text("put here since")
    before = contents(tmp_path)
    with pytest.raises(longtape.ResumeError, match=DATA):
        sweep(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.filterwarnings("ignore:longtape:RuntimeWarning")
def test_a_run_that_ends_leaves_those_that_took_its_place(tmp_path):
    """Its own were removed by somebody; another run has begun in the same place."""
    model = Chaotic(SIZE)
    first = sweep(tmp_path, model)
    first.forward()
    for name in (JOURNAL, DATA):
        (tmp_path / name).unlink()
    begin(tmp_path)
    theirs = contents(tmp_path)
    model.start_adjoint()
    first.reverse()
    assert model.result() == expected()
    assert contents(tmp_path) == theirs


@pytest.mark.filterwarnings("ignore:longtape:RuntimeWarning")
def test_a_run_that_ends_leaves_the_users_own(tmp_path):
    model = Chaotic(SIZE)
    run = sweep(tmp_path, model)
    run.forward()
    for name in (JOURNAL, DATA):
        (tmp_path / name).unlink()
        (tmp_path / name).write_text("mine")
    model.start_adjoint()
    run.reverse()
    assert contents(tmp_path) == {JOURNAL: b"mine", DATA: b"mine"}


def test_clean_leaves_what_took_the_place_of_what_it_has_listed(tmp_path, monkeypatch):
    from longtape.cli import main

    begin(tmp_path)

    def answer(question):
        for name in (JOURNAL, DATA):
            (tmp_path / name).unlink()
        begin(tmp_path)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    assert main(["clean", str(tmp_path)]) == 0
    assert sorted(contents(tmp_path)) == [DATA, JOURNAL]


@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
def test_a_directory_that_goes_away_is_missed(tmp_path, how):
    directory, model = tmp_path / "run", Chaotic(SIZE)
    directory.mkdir()
    run = sweep(directory, model)
    run.forward()
    if how == "deleted":
        for path in list(directory.iterdir()):
            path.unlink()
        directory.rmdir()
    else:
        directory.rename(tmp_path / "elsewhere")
    if how == "replaced":
        directory.mkdir()
    model.start_adjoint()
    with pytest.warns(RuntimeWarning, match="no longer durable"):
        run.reverse()
    assert model.result() == expected()
    assert any("no longer durable" in fault for fault in run.report.faults)
    if how != "deleted":
        assert not list((tmp_path / "elsewhere").iterdir())


# Options -------------------------------------------------------------------------------------------


def by_sweep(**options):
    with longtape.Sweep(Chaotic(SIZE), STEPS, memory=6 * STATE, **options) as run:
        run.forward()


def by_torch(**options):
    import torch

    from longtape.torch import scan

    scan(lambda c, x: (torch.sin(c), c), torch.ones(3, requires_grad=True), None, 30, memory=4000, **options)
    gc.collect()


def by_jax(**options):
    import jax
    import jax.numpy as jnp

    import longtape.jax as lt

    def loss(init):
        return lt.scan(lambda c, _: (jnp.sin(c), None), init, None, 30, memory=4000, **options)[0].sum()

    jax.grad(loss)(jnp.ones(3))


@pytest.mark.parametrize("front", [by_sweep, by_torch, by_jax])
def test_resume_and_disk_are_not_given_together(tmp_path, front):
    with pytest.raises(longtape.UsageError, match="either resume or disk"):
        front(resume=tmp_path, disk=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("front", [by_sweep, by_torch, by_jax])
@pytest.mark.parametrize("option", ["resume", "disk"])
def test_a_missing_directory_is_refused(tmp_path, front, option):
    with pytest.raises(longtape.UsageError, match="does not exist"):
        front(**{option: tmp_path / "missing"})
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path):
    with pytest.raises(longtape.BudgetError):
        sweep(tmp_path, memory=10)
    assert not list(tmp_path.iterdir())
