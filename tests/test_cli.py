"""The command line says what a run would take, and refuses what makes no sense."""

import json

import pytest

from longtape.cli import main

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1MB"], "at least"),
        (["--memory", "lots"], "lots"),
        (["--memory", "1GiB", "--steps", "few"], "--steps"),
        (["--memory", "1GiB", "--steps", "0"], "at least one"),
        (["--memory", "1GiB", "--disk", "/nowhere"], "/nowhere"),
        (["--memory", "1GiB", "--read-bandwidth", "1GB"], "--write-bandwidth"),
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
    said = capsys.readouterr().out
    assert "given-up: Chaotic, forward sweep at step 50 of 50" in said
    assert "going-on" in said
    assert "working on it" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "going-on.longtape-data",
        "going-on.longtape-journal",
        "notes.txt",
    ]


def test_clean_asks_first(tmp_path, capsys, monkeypatch):
    from longtape.durable.home import Home

    Home(tmp_path, "left").close()
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(["clean", str(tmp_path)]) == 0
    assert "nothing was removed" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 1
