"""Times on the wire: aware ones there and back, and the two ways of a Go server to say "none"."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from sandkeeper.wire.times import to_datetime, to_timestamp

YEAR_ONE = -62_135_596_800  # Go's zero time.Time, in seconds since 1970


@pytest.mark.parametrize("stamp", [Timestamp(), Timestamp(seconds=0, nanos=0), Timestamp(seconds=YEAR_ONE)])
def test_unset(stamp: Timestamp) -> None:
    assert to_datetime(stamp) is None


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (Timestamp(seconds=1), datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)),
        (Timestamp(nanos=1_000), datetime(1970, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
        (Timestamp(seconds=-1), datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)),
        (Timestamp(seconds=1_790_000_000, nanos=123_456_789), datetime(2026, 9, 21, 14, 13, 20, 123456, UTC)),
    ],
)
def test_set(stamp: Timestamp, expected: datetime) -> None:
    assert to_datetime(stamp) == expected


@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC)))  # noqa: DTZ001
def test_there_and_back(when: datetime) -> None:
    assert to_datetime(to_timestamp(when)) == when


def test_another_zone_is_the_same_instant() -> None:
    when = datetime(2026, 11, 24, 18, 0, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    back = to_datetime(to_timestamp(when))
    assert back == when
    assert back is not None
    assert back.tzinfo is UTC


def test_a_naive_time_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"):
        to_timestamp(datetime(2026, 11, 24))  # noqa: DTZ001
