"""What a journal says is checked before it is used, and one of another version is never cleared."""

import random
import struct

import pytest
from models import Chaotic

import longtape
from longtape.durable import journal

STEPS, SIZE = 60, 500
STATE = 64 * -(-8 * SIZE // 64) + 12
JOURNAL, DATA = "sweep.longtape-journal", "sweep.longtape-data"


def sweep(directory, model=None):
    costs = longtape.Costs(1e-3, 2e-3)
    return longtape.Sweep(
        model or Chaotic(SIZE), STEPS, memory=6 * STATE, costs=costs, resume=directory, resume_seconds=1e-6
    )


@pytest.fixture
def begun(tmp_path):
    with sweep(tmp_path) as run:
        run.forward()
    return tmp_path


def records(directory):
    with open(directory / JOURNAL, "rb") as file:
        return [(r.run_id, dict(r.header), bytes(r.payload)) for r, _ in journal.read(file.fileno())]


def write(directory, found):
    (directory / JOURNAL).write_bytes(b"".join(journal.encode(i, n, h, p) for n, (i, h, p) in enumerate(found)))


def refused(directory, match):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(longtape.ResumeError, match=match):
        sweep(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_a_sound_journal_is_gone_on_with(begun):
    write(begun, records(begun))
    model = Chaotic(SIZE)
    with sweep(begun, model) as run:
        run.forward()
        model.start_adjoint()
        run.reverse()
    assert run.report.resumed_from == "the turn"


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("change", [{"added": 1}, {"what": "another thing"}])
def test_a_record_with_something_unknown_is_refused(begun, which, change):
    found = records(begun)
    found[0 if which == "first" else -1][1].update(change)
    write(begun, found)
    refused(begun, "version")


@pytest.mark.parametrize("what", ["format", "choice", "costs", "steps"])
def test_a_journal_of_another_version_is_refused_and_named(begun, what):
    found = records(begun)
    header = found[0][1]
    header["version"] = "9.9.9"
    if what == "format":
        header["format"] += 1
    elif what == "steps":
        del header["steps"]
    else:
        header[what] = {**header[what], "a_field_to_come": 3}
    write(begun, found)
    refused(begun, r"9\.9\.9")


def test_a_journal_in_a_form_to_come_is_refused(begun):
    """It begins as ours do, and nothing more of it is known: nobody can tell that it is damaged."""
    data = bytearray((begun / JOURNAL).read_bytes())
    data[8:12] = struct.pack("<I", 12345)
    (begun / JOURNAL).write_bytes(data)
    refused(begun, "another version")


def test_a_journal_that_was_torn_while_it_began_is_begun_anew(begun):
    (begun / JOURNAL).write_bytes((begun / JOURNAL).read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="begins anew"):
        sweep(begun).close()


def test_data_that_cannot_be_opened_now_costs_no_run(begun, monkeypatch):
    import errno
    import os

    real = os.open

    def failing(path, *rest, **named):
        if str(path).endswith(DATA):
            raise OSError(errno.EMFILE, "too many open files")
        return real(path, *rest, **named)

    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        with pytest.raises(longtape.StorageError, match="try again"):
            sweep(begun)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before
    with sweep(begun) as run:
        run.forward()
    assert run._run._keeper.resumed_from == "the turn"


def test_one_odd_value_gives_the_right_gradient_or_none():
    """In records whose checksums are right: of sweeps and scans, stopped in either sweep."""
    from benchmarks.campaigns import odd

    found = odd.odd_values(12, random.Random(7))
    assert found["outcomes"]["refused (ResumeError)"] > 3
