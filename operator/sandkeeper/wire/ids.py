"""Identity on the wire: sandbox ids and the gRPC metadata that carries the owner with every call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

OWNER_UID = "sandkeeper-owner-uid"
OWNER_NAMESPACE = "sandkeeper-owner-namespace"
OWNER_NAME = "sandkeeper-owner-name"
OWNER_INSTANCE = "sandkeeper-instance"

_ID = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_MAX_ID = 76
_INSTANCE = re.compile(r"[1-9][0-9]{0,9}")
_MAX_INSTANCE = 2**32 - 1  # Owner.instance is a uint32


def valid_id(text: str) -> bool:
    """Whether `text` is an identifier as containerd has it: also safe as a file name.

    Source: containerd pkg/identifiers (letters and digits, single `.`, `_`, `-` between, at most 76).
    """
    return len(text) <= _MAX_ID and _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class OwnerKey:
    """The object that owns a sandbox, and which instance of it is meant. Instances count from 1."""

    namespace: str
    name: str
    uid: str
    instance: int

    @property
    def sandbox_id(self) -> str:
        """The id on the node: made of UID and instance alone, so a name used again never meets an old sandbox."""
        return f"{self.uid}-{self.instance}"

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata that every call of the operator carries; the shim fences by it."""
        return (
            (OWNER_UID, self.uid),
            (OWNER_NAMESPACE, self.namespace),
            (OWNER_NAME, self.name),
            (OWNER_INSTANCE, str(self.instance)),
        )

    @classmethod
    def from_metadata(cls, metadata: dict[str, str]) -> Self | None:
        """The owner that a call names; None where it names none (containerd, for one).

        Raises ValueError where it is named by halves.
        """
        if OWNER_UID not in metadata and OWNER_INSTANCE not in metadata:
            return None
        uid, instance = metadata.get(OWNER_UID, ""), metadata.get(OWNER_INSTANCE, "")
        # int() alone would take "-1", "1_0" and digits of other scripts.
        if not uid or _INSTANCE.fullmatch(instance) is None or int(instance) > _MAX_INSTANCE:
            raise ValueError(
                f"metadata `{OWNER_UID}` and `{OWNER_INSTANCE}` must both be set, the second to a number from 1"
            )
        return cls(
            namespace=metadata.get(OWNER_NAMESPACE, ""),
            name=metadata.get(OWNER_NAME, ""),
            uid=uid,
            instance=int(instance),
        )


def fence_of(sandbox_id: str) -> tuple[str, int]:
    """The owner's UID and the instance that an id on a node is made of; ("", 0) for an id of another make."""
    uid, _, instance = sandbox_id.rpartition("-")
    if not valid_id(uid) or _INSTANCE.fullmatch(instance) is None or int(instance) > _MAX_INSTANCE:
        return "", 0
    return uid, int(instance)


_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def valid_node_name(text: str) -> bool:
    """Whether `text` may name a SandboxNode: a DNS subdomain (RFC 1123)."""
    return len(text) <= 253 and _NODE_NAME.fullmatch(text) is not None
