"""What every object has: metadata (the part that is used here) and conditions."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from sandkeeper.api.schema import CamelCase, Int64, Message, Model, Time


class ObjectMeta(Model):
    """The part of Kubernetes' ObjectMeta that Sandkeeper reads."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    finalizers: tuple[str, ...] = ()
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Condition(Model):
    """One aspect of the state that was observed last, as Kubernetes' metav1.Condition."""

    type: CamelCase
    """Which aspect: Scheduled, Running, Finished, Ready, Reconciling or Stalled."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds: True, False or Unknown."""
    reason: CamelCase
    """Why, as one CamelCase word that programs may compare."""
    message: Message = ""
    """Why, in words for people."""
    last_transition_time: Time
    """When `status` changed last."""
    observed_generation: Int64 | None = None
    """The `metadata.generation` that the condition was computed from."""
