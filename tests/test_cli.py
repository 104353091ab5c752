"""The command line says what a run would take, and refuses what makes no sense."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest

import longtape.probe
from longtape.cli import main
from longtape.foresee import foresee, replay

STENCIL = ["plan", "--steps", "1000", "--state", "64MiB", "--forward", "0.0065", "--reverse", "0.008", "--tape", "0"]


def figures(capsys, *arguments):
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_in_json(capsys):
    found = figures(capsys, *STENCIL, "--memory", "1GiB", "--write-bandwidth", "1GB")
    assert found["schedule"] == "asynchronous"
    assert found["spacing"] == pytest.approx(10.3, abs=0.1)
    assert found["peak_memory_bytes"] <= 2**30
    assert 1.0 <= found["overhead"] < 1.5
    expected = {"slots", "time_seconds", "ideal_seconds", "peak_disk_bytes", "advances", "writes", "reads"}
    assert expected | {"stall_seconds", "alternatives", "improvements"} <= found.keys()


def test_the_replay_agrees_with_the_prediction(capsys):
    arguments = (*STENCIL, "--memory", "1GiB", "--write-bandwidth", "1GB")
    predicted, replayed = figures(capsys, *arguments), figures(capsys, *arguments, "--simulate")
    assert replayed["simulated"]
    assert replayed["time_seconds"] == pytest.approx(predicted["time_seconds"], rel=0.02)
    assert replayed["writes"] == pytest.approx(predicted["writes"], rel=0.05)


def test_residuals_where_storage_carries_them(capsys):
    found = figures(
        capsys, "plan", "--steps", "100_000", "--state", "128KiB", "--residuals", "512KiB", "--forward", "5e-4",
        "--memory", "8MiB", "--write-bandwidth", "3GB", "--read-bandwidth", "2GB", "--latency", "1e-4",
    )  # fmt: skip
    assert (found["schedule"], found["record_fraction"], found["advances"]) == ("residuals", 1.0, 0)


def test_an_unknown_length_and_a_probed_directory(capsys, tmp_path):
    found = figures(
        capsys, "plan", "--state", "1MiB", "--forward", "0.01", "--memory", "16MiB", "--disk", str(tmp_path)
    )
    assert found["schedule"] == "asynchronous"
    assert not list(tmp_path.iterdir())


def test_probing(capsys, tmp_path):
    found = figures(capsys, "probe", str(tmp_path), "--item", "1MiB")
    assert found["write_bytes_per_second"] > 0
    assert found["bytes_written"] < 16 * 2**20
    assert main(["probe", str(tmp_path)]) == 0
    assert "bandwidth" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_tables_and_pictures(capsys, tmp_path):
    picture = tmp_path / "pareto.png"
    assert main([*STENCIL, "--memory", "1GiB", "--write-bandwidth", "1GB", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    assert "asynchronous" in text
    assert "storage twice as fast" in text
    assert picture.stat().st_size > 10_000


DEVICE = [*STENCIL, "--memory", "640MiB", "--host-memory", "8GiB"]


def test_a_plan_behind_a_device(capsys):
    found = figures(capsys, *DEVICE, "--link-bandwidth", "4GB/s,3GB/s", "--link-latency", "2e-5")
    assert found["schedule"] in ("store_all", "revolve")
    assert not found["on_device"]
    assert found["window"] >= 64 * 2**20 / 4e9 / 0.0065
    assert found["device_slots"] >= 1
    assert 4 * 64 * 2**20 < found["peak_device_bytes"] <= 640 * 2**20
    assert found["peak_memory_bytes"] <= 8 * 2**30
    assert found["bytes_out"] > 0
    assert found["bytes_in"] > 0
    assert 0 <= found["link_stall_seconds"] < 0.1
    without = {"out_bytes", "peak_device_bytes", "bytes_out", "bytes_in"} & found.keys()
    assert all(figures(capsys, *STENCIL, "--memory", "640MiB")[name] == 0 for name in without)


def test_the_replay_behind_a_device_agrees_with_the_prediction(capsys):
    arguments = (*DEVICE, "--link-bandwidth", "4GB", "--write-bandwidth", "2GB")
    predicted, replayed = figures(capsys, *arguments), figures(capsys, *arguments, "--simulate")
    assert replayed["simulated"]
    assert replayed["schedule"] == "asynchronous"
    assert replayed["time_seconds"] == pytest.approx(predicted["time_seconds"], rel=0.02)
    assert replayed["bytes_in"] == pytest.approx(predicted["bytes_in"], rel=0.05)
    assert replayed["bytes_out"] == pytest.approx(predicted["bytes_out"], rel=0.3)


def test_a_device_in_tables_and_pictures(capsys, tmp_path):
    picture = tmp_path / "pareto.png"
    assert main([*DEVICE, "--link-bandwidth", "4GB", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    for words in ("peak device", "peak host", "link", "snapshots", "of device memory", "the device memory"):
        assert words in text
    assert picture.stat().st_size > 10_000
    assert main([*DEVICE, "--link-bandwidth", "4GB", "--steps", "5"]) == 0
    assert "everything is kept there" in capsys.readouterr().out


def test_residuals_where_the_link_carries_them(capsys):
    found = figures(
        capsys, "plan", "--steps", "10_000", "--state", "128KiB", "--residuals", "512KiB", "--forward", "5e-4",
        "--memory", "64MiB", "--host-memory", "16GiB", "--link-bandwidth", "10GB",
    )  # fmt: skip
    assert (found["schedule"], found["record_fraction"], found["advances"]) == ("store_all", 1.0, 0)
    assert found["bytes_out"] >= 10_000 * 512 * 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1GiB", "--link-bandwidth", "1GB"], "--host-memory"),
        (["--memory", "1GiB", "--link-latency", "1e-5"], "--host-memory"),
        (["--memory", "1GiB", "--host-memory", "1GiB"], "--link-bandwidth"),
        (["--memory", "1GiB", "--host-memory", "1GiB", "--link-bandwidth", "1GB,2GB,3GB"], "out,in"),
        (["--memory", "1GiB", "--host-memory", "1GiB", "--link-bandwidth", "fast"], "fast"),
        (["--memory", "1GiB", "--host-memory", "1GiB", "--link-bandwidth", "1GB,0"], "--link-bandwidth"),
        (["--memory", "1GiB", "--host-memory", "1GiB", "--link-bandwidth", "1GB", "--link-latency", "-1"], "latency"),
        (["--memory", "1MiB", "--host-memory", "1GiB", "--link-bandwidth", "1GB"], "on the device"),
        (["--memory", "1GiB", "--host-memory", "1MiB", "--link-bandwidth", "1GB"], "in the host's memory"),
        (["--memory", "1MB"], "at least"),
        (["--memory", "lots"], "lots"),
        (["--memory", "1GiB", "--steps", "few"], "--steps"),
        (["--memory", "1GiB", "--steps", "0"], "at least one"),
        (["--memory", "1GiB", "--disk", "/nowhere"], "/nowhere"),
        (["--memory", "1GiB", "--read-bandwidth", "1GB"], "--write-bandwidth"),
        (["--memory", "1GiB", "--latency", "1e-3"], "--write-bandwidth"),
        (["--memory", "1GiB", "--disk", "/tmp", "--read-bandwidth", "1GB"], "is probed"),
        (["--memory", "1GiB", "--write-bandwidth", "0"], "--write-bandwidth"),
        (["--memory", "1GiB", "--forward", "-1"], "--forward"),
        (["--memory", "1GiB", "--tape", "nan"], "--tape"),
        (["--memory", "1GiB", "--plot", "/nowhere/pareto.png"], "/nowhere"),
        (["--memory", "1GiB", "--disk-limit", "1GB"], "--disk-limit"),
        (["--memory", "1GiB", "--disk", "/tmp", "--write-bandwidth", "1GB"], "not both"),
    ],
)
def test_bad_input_says_what_is_wrong(capsys, arguments, message):
    assert main([*STENCIL, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_clean_lists_and_removes_what_is_not_held(tmp_path, capsys):
    from models import Chaotic

    import longtape

    def run(name):
        return longtape.Sweep(Chaotic(), 50, memory="1MiB", resume=tmp_path, name=name)

    with run("given-up") as sweep:
        sweep.forward()
    (tmp_path / "notes.txt").write_text("mine")
    with run("going-on"):
        assert main(["clean", str(tmp_path), "--yes"]) == 0
        left = sorted(path.name for path in tmp_path.iterdir())
    said = capsys.readouterr().out
    assert "given-up: Chaotic, forward sweep at step 50 of 50" in said
    assert "going-on" in said
    assert "working on it" in said
    assert left == [
        "going-on.longtape-data",
        "going-on.longtape-journal",
        "notes.txt",
    ]


def test_clean_asks_first(tmp_path, capsys, monkeypatch):
    (tmp_path / "left.longtape-journal").touch()
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["clean", str(tmp_path)]) == 0
    assert "nothing was removed" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1


def test_storing_everything_is_listed_with_what_it_needs(capsys):
    found = figures(capsys, *STENCIL, "--memory", "1GiB", "--write-bandwidth", "1 GB/s")
    others = {other["schedule"]: other for other in found["alternatives"]}
    assert others.keys() == {"revolve", "store_all"}
    assert others["revolve"]["fits"]
    assert others["revolve"]["time_seconds"] > found["time_seconds"]
    assert not others["store_all"]["fits"]
    assert others["store_all"]["peak_memory_bytes"] >= 1000 * 64 * 2**20
    assert others["store_all"]["time_seconds"] == pytest.approx(found["ideal_seconds"], rel=0.01)


def test_what_would_help_where_there_is_no_disk(capsys):
    found = figures(capsys, *STENCIL, "--memory", "256MiB")
    gains = {gain["what"]: gain["saved_seconds"] for gain in found["improvements"]}
    assert {"twice the memory", "four times the memory", "storage at 1 GB/s"} <= gains.keys()
    assert gains["four times the memory"] > gains["twice the memory"] > 0


def test_a_disk_limit_in_the_way_is_named(capsys):
    found = figures(capsys, *STENCIL, "--memory", "256MiB", "--write-bandwidth", "2GB", "--disk-limit", "1GiB")
    assert found["peak_disk_bytes"] <= 2**30
    assert "storage without a limit" in {gain["what"] for gain in found["improvements"]}


def test_a_probe_writes_no_more_than_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("longtape.probe.LARGEST_ITEM_NBYTES", 1 << 20)
    found = figures(capsys, "probe", str(tmp_path), "--item", "10GiB")
    assert found["item_nbytes"] == 2**20
    assert found["bytes_written"] == 5 * (2**20 + 2**16)


def test_a_probe_of_a_full_directory_says_so(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("longtape.tiers.linux.allocate", full)
    assert main(["probe", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "No space left" in message
    assert str(tmp_path) in message


def test_a_probe_of_a_read_only_directory_says_so(capsys, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.open", refused)
    monkeypatch.setattr("tempfile.mkstemp", refused)
    assert main(["probe", str(tmp_path)]) == 2
    assert "Read-only" in capsys.readouterr().err


def test_a_directory_that_vanishes_while_it_is_probed(tmp_path, monkeypatch):
    """The file has no name anyway: the probe ends, and nothing is left."""
    directory = tmp_path / "soon gone"
    directory.mkdir()
    work = longtape.probe._work

    def vanish():
        if directory.exists():
            directory.rmdir()
        work()

    monkeypatch.setattr("longtape.probe._work", vanish)
    assert longtape.probe.probe(directory, item="1MiB").write_bytes_per_second > 0
    assert main(["probe", str(directory)]) == 2


def test_the_python_functions_return_frozen_figures(tmp_path):
    found = longtape.probe.probe(tmp_path, item="1MiB")
    problem = longtape.Problem(1000, 2**20, 2**24, has_disk=True)
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    foresight = foresee(problem, costs)
    for figures_of in (found, foresight, foresight.choice, replay(foresight)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(figures_of, dataclasses.fields(figures_of)[0].name, None)


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "longtape", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "probe" in done.stdout
