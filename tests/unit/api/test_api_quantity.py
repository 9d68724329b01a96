"""Quantities, against Kubernetes' grammar."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandkeeper.api import format_bytes, format_cpu_millis, parse_bytes, parse_cpu_millis


@pytest.mark.parametrize(
    ("text", "millis"),
    [
        ("500m", 500),
        ("2", 2000),
        (2, 2000),
        ("0.5", 500),
        (".5", 500),
        ("1e1", 10000),
        ("100u", 1),
        ("1n", 1),
    ],
)
def test_cpu(text: str | int, millis: int) -> None:
    assert parse_cpu_millis(text) == millis


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64Mi", 64 * 2**20),
        ("1.5Gi", 3 * 2**29),
        ("1k", 1000),
        ("1Ki", 1024),
        ("2E", 2 * 10**18),
        ("1e3", 1000),
        ("1E3", 1000),
        ("12E-1", 2),
        (4096, 4096),
        ("100m", 1),
        ("1.", 1),
        ("0", 0),
    ],
)
def test_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "Mi", "1 Mi", "1mi", "1KiB", "0x10", "1e", "--1", "1e999", "NaN", "inf", "\u0661", "1\n", "9" * 70],
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="must be a quantity"):
        parse_bytes(text)


def test_negative_amounts_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        parse_cpu_millis("-1")


@given(st.integers(min_value=0, max_value=2**62))
def test_formats_parse_back(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == count
    assert parse_cpu_millis(format_cpu_millis(count)) == count
