"""Times on the wire."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

_YEAR_ONE = -62_135_596_800


def to_datetime(stamp: Timestamp) -> datetime | None:
    """The time in UTC; None where it is unset.

    A Go server's zero time arrives as year 1, its nil as 1970-01-01: both mean "unset".
    """
    if stamp.seconds in (0, _YEAR_ONE) and not stamp.nanos:
        return None
    return stamp.ToDatetime(tzinfo=UTC)


def to_timestamp(when: datetime) -> Timestamp:
    """The wire form of an aware time. Raises ValueError for a naive one."""
    if when.tzinfo is None:
        raise ValueError("a time on the wire must be aware of its zone")
    stamp = Timestamp()
    stamp.FromDatetime(when)
    return stamp
