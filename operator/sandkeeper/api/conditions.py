"""Pure functions on lists of conditions. Source: Kubernetes' api-conventions.md and apimachinery's
pkg/api/meta/conditions.go: `lastTransitionTime` changes only when `status` does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from sandkeeper.api.meta import Condition

ConditionStatus = Literal["True", "False", "Unknown"]


def find_condition(conditions: Sequence[Condition], type_: str) -> Condition | None:
    return next((condition for condition in conditions if condition.type == type_), None)


def is_true(conditions: Sequence[Condition], type_: str) -> bool:
    found = find_condition(conditions, type_)
    return found is not None and found.status == "True"


def set_condition(
    conditions: Sequence[Condition],
    type_: str,
    status: ConditionStatus,
    reason: str,
    message: str = "",
    *,
    now: datetime,
    observed_generation: int | None = None,
) -> tuple[Condition, ...]:
    """The conditions with the one of `type_` set; its place is kept, a new one comes last.

    `now` becomes lastTransitionTime only where `status` differs from the one before.
    """
    before = find_condition(conditions, type_)
    after = Condition(
        type=type_,
        status=status,
        reason=reason,
        message=message,
        last_transition_time=before.last_transition_time if before and before.status == status else now,
        observed_generation=observed_generation,
    )
    if before is None:
        return (*conditions, after)
    return tuple(after if condition.type == type_ else condition for condition in conditions)


def remove_condition(conditions: Sequence[Condition], type_: str) -> tuple[Condition, ...]:
    return tuple(condition for condition in conditions if condition.type != type_)
