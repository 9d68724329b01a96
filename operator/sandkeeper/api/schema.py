"""What the models are made of: the base model, bounded scalar types, and marks for the CRD schema.

Bounds are checked by pydantic and by the API server alike; CEL rules only by the API server, the one place
that every writer passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Model(BaseModel):
    """Frozen, camelCase on the wire. Unknown fields are dropped: a newer CRD may have served the object."""

    model_config = ConfigDict(
        frozen=True,
        extra="ignore",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    def to_dict(self) -> dict[str, Any]:
        """As the API server has it: camelCase, JSON types, absent instead of null."""
        return self.model_dump(by_alias=True, mode="json", exclude_none=True)


def rule(cel: str, message: str, field_path: str = "") -> dict[str, str]:
    """One entry of `x-kubernetes-validations`; `message` says what must be."""
    if "must" not in message:
        raise ValueError(f"a rule's message must say what must be, not {message!r}")
    entry = {"rule": cel, "message": message}
    return entry | {"fieldPath": field_path} if field_path else entry


def rules(*entries: dict[str, str]) -> dict[str, Any]:
    """For a model's `json_schema_extra`: CEL rules that span its fields."""
    return {"x-kubernetes-validations": list(entries)}


@dataclass(frozen=True)
class cel:  # noqa: N801 (reads as a function in annotations)
    """A CEL rule on one field, in `Annotated`; `message` says what must be."""

    text: str
    message: str

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = dict(handler(core))
        before = schema.get("x-kubernetes-validations", [])
        return schema | {"x-kubernetes-validations": [*before, rule(self.text, self.message)]}


@dataclass(frozen=True)
class MapList:
    """A list whose entries are told apart by `key` (server-side apply merges it by that key)."""

    key: str

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = dict(handler(core))
        return schema | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [self.key]}


Int32 = Annotated[int, Field(ge=0, le=2**31 - 1, json_schema_extra={"format": "int32"})]
Int64 = Annotated[int, Field(ge=0, le=2**53 - 1, json_schema_extra={"format": "int64"})]


def _seconds(value: datetime) -> datetime:
    return value.astimezone(UTC).replace(microsecond=0)


def _rfc3339(value: datetime) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z")


_DATE_TIME = WithJsonSchema({"type": "string", "format": "date-time", "maxLength": 64})

MicroTime = Annotated[AwareDatetime, PlainSerializer(_rfc3339, return_type=str), _DATE_TIME]
"""RFC 3339 with fractions of a second, in UTC."""

Time = Annotated[
    AwareDatetime, AfterValidator(_seconds), PlainSerializer(_rfc3339, return_type=str), _DATE_TIME
]
"""RFC 3339 in whole seconds, in UTC: what Kubernetes itself has in conditions."""

_DNS_LABEL = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_DNS_LABEL_RULE = cel(
    f"self.matches('{_DNS_LABEL}')",
    "must be a DNS label: lower-case letters, digits and `-`, beginning and ending with a letter or digit",
)
DnsLabel = Annotated[str, Field(min_length=1, max_length=63), _DNS_LABEL_RULE]

DnsSubdomain = Annotated[
    str,
    Field(min_length=1, max_length=253),
    cel(
        r"self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",
        "must be a DNS subdomain: lower-case letters, digits, `-` and `.`",
    ),
]

RuntimeName = Annotated[
    str,
    Field(min_length=1, max_length=63),
    cel(
        "self.matches('^[a-z0-9]([-._a-z0-9]*[a-z0-9])?$')",
        "must be a runtime's name: lower-case letters, digits, `-`, `.` and `_`",
    ),
]

CamelCase = Annotated[
    str, Field(min_length=1, max_length=128, pattern="^[A-Za-z]([A-Za-z0-9]*[A-Za-z0-9])?$")
]


def _cut(length: int) -> BeforeValidator:
    """Messages come from runtimes and registries in any length: too long a one must not cost the status."""

    def cut(value: Any) -> Any:
        if isinstance(value, str) and len(value) > length:
            return value[: length - 1] + "…"
        return value

    return BeforeValidator(cut)


Message = Annotated[str, Field(max_length=4096), _cut(4096)]
Text = Annotated[str, Field(max_length=256), _cut(256)]


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def quantity(minimum: str, maximum: str) -> Any:
    """Annotation of a quantity from `minimum` to `maximum`: "500m", "64Mi" or a number."""
    return WithJsonSchema(
        {
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            "x-kubernetes-validations": [
                rule(
                    f"isQuantity(string(self)) && !quantity(string(self)).isLessThan(quantity('{minimum}'))"
                    f" && !quantity(string(self)).isGreaterThan(quantity('{maximum}'))",
                    f"must be a quantity from {minimum} to {maximum}",
                )
            ],
        }
    )


Cpu = Annotated[str, Field(max_length=32), BeforeValidator(_to_text), quantity("1m", "4096")]
Memory = Annotated[str, Field(max_length=32), BeforeValidator(_to_text), quantity("1Mi", "64Ti")]
