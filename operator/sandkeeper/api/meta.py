"""What every object has: metadata (the part that is used here) and conditions."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError

from sandkeeper.api.names import ASSIGNMENT_ANNOTATION
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


class Assignment(Model):
    """Where an instance is or may be: written into the object before Start, so that no reply that gets
    lost can lead to a second copy."""

    node: str
    instance: Annotated[int, Field(ge=1)]
    digest: str = ""
    runtime: str = ""

    @classmethod
    def of(cls, metadata: ObjectMeta) -> Self | None:
        """The assignment that the object carries; None where there is none.

        Raises ValueError where the annotation was spoiled by somebody.
        """
        text = metadata.annotations.get(ASSIGNMENT_ANNOTATION)
        if text is None:
            return None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ValueError(f"annotation `{ASSIGNMENT_ANNOTATION}` must be an assignment") from error

    def to_annotation(self) -> str:
        """Compact JSON, keys in a fixed order."""
        return json.dumps(self.model_dump(), separators=(",", ":"))
