"""Conditions: pure functions, and the transition time that moves only with the status."""

from datetime import UTC, datetime, timedelta

from sandkeeper.api import find_condition, is_true, remove_condition, set_condition

T0 = datetime(2026, 1, 1, tzinfo=UTC)
T1 = T0 + timedelta(seconds=90)


def test_transition_time_moves_only_with_the_status() -> None:
    first = set_condition((), "Ready", "False", "Pending", "a", now=T0, observed_generation=1)
    same = set_condition(first, "Ready", "False", "Starting", "b", now=T1, observed_generation=2)
    flipped = set_condition(same, "Ready", "True", "Running", now=T1)
    ready = find_condition(same, "Ready")
    assert ready is not None
    assert (ready.reason, ready.message, ready.observed_generation) == ("Starting", "b", 2)
    assert ready.last_transition_time == T0
    assert flipped[0].last_transition_time == T1
    assert first[0].reason == "Pending"


def test_order_is_kept_and_new_ones_come_last() -> None:
    conditions = set_condition((), "Scheduled", "True", "Assigned", now=T0)
    conditions = set_condition(conditions, "Ready", "False", "Starting", now=T0)
    conditions = set_condition(conditions, "Scheduled", "False", "Unscheduled", now=T1)
    assert [condition.type for condition in conditions] == ["Scheduled", "Ready"]
    assert remove_condition(conditions, "Ready") == conditions[:1]
    assert find_condition(conditions, "Stalled") is None
    assert not is_true(conditions, "Stalled")
    assert not is_true(conditions, "Scheduled")


def test_a_transition_time_has_whole_seconds_as_kubernetes_writes_it() -> None:
    (ready,) = set_condition((), "Ready", "True", "Running", now=T0.replace(microsecond=999_999))
    assert ready.to_dict()["lastTransitionTime"] == "2026-01-01T00:00:00Z"
    assert type(ready).model_validate(ready.to_dict()) == ready
