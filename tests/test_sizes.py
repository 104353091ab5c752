from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtape.errors import UsageError
from longtape.sizes import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (0, 0),
        (123, 123),
        (1e9, 10**9),
        ("0", 0),
        ("1_000", 1000),
        ("12 B", 12),
        ("12 bytes", 12),
        ("2GiB", 2 << 30),
        ("2 gib", 2 << 30),
        ("2Gi", 2 << 30),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("64 MiB", 64 << 20),
        ("  64MiB ", 64 << 20),
        ("1.5G", 1_500_000_000),
        ("1.5KiB", 1536),
        ("1.1GB", 1_100_000_000),  # which a float would miss
        ("0.3 kB", 300),
        ("1.0005 kB", 1000),
        ("1e9", 10**9),
        ("2.5e3 kB", 2_500_000),
        ("3EB", 3 * 10**18),
        ("7TB", 7 * 10**12),
        ("1PiB", 1 << 50),
    ],
)
def test_what_amounts_mean(value: float | str, nbytes: int) -> None:
    assert parse_bytes(value) == nbytes
    assert type(parse_bytes(value)) is int


NONSENSE: list[Any] = [
    *(
        "",
        " ",
        "GiB",
        "two",
        "1.5.2",
        "1,5G",
        "2 GiBs",
        "1 G B",
        "0x10",
        "nan",
        "inf",
        "+5",
        "٣",
        "1e999",
        "1..G",
        "_5",
    ),
    *(1.5, float("nan"), float("inf"), None, True, b"2GiB", [1], "9EiB", 2**63, 1e19),
]


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match=r"not an amount of bytes|more than"):
        parse_bytes(value)


@pytest.mark.parametrize("value", [-1, "-1", " -2GiB"])
def test_negative_amounts_are_refused(value: int | str) -> None:
    with pytest.raises(UsageError, match="negative"):
        parse_bytes(value)


def test_whole_numbers_of_other_kinds_count() -> None:
    numpy = pytest.importorskip("numpy")
    assert parse_bytes(numpy.int64(77)) == 77


@given(st.integers(0, 2**63 - 1))
def test_numbers_survive_as_text(nbytes: int) -> None:
    assert parse_bytes(str(nbytes)) == parse_bytes(nbytes) == nbytes


@given(st.integers(0, 2**62))
def test_formatted_bytes_are_near_and_short(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert len(text) <= 9
    assert parse_bytes(text) == pytest.approx(nbytes, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (64 << 20, "64 MiB"),
        (1000 << 20, "0.977 GiB"),
        (int(2.25 * 2**30), "2.25 GiB"),
        (123 << 30, "123 GiB"),
        (3 << 60, "3 EiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_bytes_read_well(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (850e-9, "850 ns"),
        (12.34e-6, "12.3 µs"),
        (12.3e-3, "12.3 ms"),
        (0.9999, "1 s"),
        (4.56, "4.56 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (11040, "3 h 04 min"),
        (-0.002, "-2 ms"),
    ],
)
def test_seconds_read_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
