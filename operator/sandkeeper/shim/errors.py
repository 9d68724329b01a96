"""Why a shim refuses a call, by gRPC code."""

from __future__ import annotations

import grpc


class Refused(Exception):
    """The call is not carried out; `message` names the field or the state that forbids it."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnknownSandbox(Refused):
    """There is no such sandbox here, or no such container in it."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, sandbox_id: str, container: str = "") -> None:
        super().__init__(
            f"sandbox {sandbox_id!r} has no container {container!r}"
            if container
            else f"sandbox {sandbox_id!r} not found"
        )


class Taken(Refused):
    """The id belongs to a sandbox with another configuration."""

    code = grpc.StatusCode.ALREADY_EXISTS


class WrongState(Refused):
    """Not in this state, not for this owner, or not for this old an instance."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class BadRequest(Refused):
    """The request itself is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotReady(Refused):
    """Not yet; the same call may succeed later."""

    code = grpc.StatusCode.UNAVAILABLE


class Full(Refused):
    """The node takes no more."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Outdated(Refused):
    """A Watch cannot go on from there: List again."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unsupported(Refused):
    """This engine cannot."""

    code = grpc.StatusCode.UNIMPLEMENTED
