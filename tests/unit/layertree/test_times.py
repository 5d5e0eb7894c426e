"""RFC 3339 times."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerstore.errors import InvalidLayer
from layerstore.layertree.times import MAX_NS, MIN_NS, parse_time_ns

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("0001-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01T00:00:01.5Z", 1_500_000_000),
        ("1969-12-31T23:59:59.000000001Z", -SECOND + 1),
        ("2024-05-01T12:00:00Z", 1714564800 * SECOND),
        ("2024-05-01T14:00:00+02:00", 1714564800 * SECOND),
        ("2024-05-01T06:30:00-05:30", 1714564800 * SECOND),
        ("2024-05-01T12:00:00.123456789Z", 1714564800 * SECOND + 123456789),
        ("2024-05-01T12:00:00.1234567899Z", 1714564800 * SECOND + 123456789),
        ("9999-12-31T23:59:59Z", MAX_NS),
        ("1066-10-14T09:00:00Z", MIN_NS),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert parse_time_ns(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2024-05-01",
        "2024-05-01T12:00:00",
        "2024-05-01 12:00:00Z",
        "2024-05-01T12:00:00z",
        "2024-02-30T12:00:00Z",
        "2024-05-01T24:00:00Z",
        "2024-05-01T12:00:60Z",
        "2024-05-01T12:00:00.Z",
        "2024-05-01T12:00:00+24:00",
        "2024-05-01T12:00:00Z\n",
        "٢٠٢٤-05-01T12:00:00Z",
        "2024-05-01T12:00:00." + "1" * 100 + "Z",
    ],
)
def test_malformed_times(text: str) -> None:
    with pytest.raises(InvalidLayer):
        parse_time_ns(text)


@given(
    st.datetimes(min_value=datetime(1700, 1, 1), max_value=datetime(2200, 1, 1)),
    st.integers(-14 * 60, 14 * 60),
)
def test_as_the_standard_library(moment: datetime, minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    since = aware - datetime(1970, 1, 1, tzinfo=UTC)
    expected = (since // timedelta(microseconds=1)) * 1000
    assert parse_time_ns(aware.isoformat()) == expected
