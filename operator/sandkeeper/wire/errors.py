"""What a call to a shim can end in.

    ShimError
    ├── NotFound             the shim has no such sandbox (after Shutdown: the proof that it is gone)
    ├── AlreadyExists        the id is taken by a sandbox with another configuration
    ├── FailedPrecondition   not in this state, or fenced: another owner or an older instance
    ├── InvalidArgument      the request is wrong; the message names the field
    ├── OutOfRange           Watch cannot go on from there: List again
    ├── ResourceExhausted    the node has no room
    ├── Unimplemented        this server does not offer the call
    ├── PermissionDenied     the caller's identity is not allowed
    ├── Unauthenticated      the caller has none
    ├── Unavailable          not reached, or not ready yet            (ambiguous)
    ├── DeadlineExceeded     no answer in time                        (ambiguous)
    ├── Aborted              cut off                                  (ambiguous)
    └── Internal             anything else that the shim failed with  (ambiguous)

*Ambiguous*: the effect may have happened although the call failed. Such a call is repeated with the same id on
the same node, never moved elsewhere.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class ShimError(Exception):
    """A call to a shim failed. `code` is gRPC's, `message` the server's own words."""

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    ambiguous: ClassVar[bool] = False

    def __init__(self, message: str = "", code: grpc.StatusCode | None = None) -> None:
        self.message = message
        self.code = code or self.default_code
        super().__init__(f"{self.code.name}: {message}" if message else self.code.name)


class NotFound(ShimError):
    default_code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ShimError):
    default_code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ShimError):
    default_code = grpc.StatusCode.FAILED_PRECONDITION


class InvalidArgument(ShimError):
    default_code = grpc.StatusCode.INVALID_ARGUMENT


class OutOfRange(ShimError):
    default_code = grpc.StatusCode.OUT_OF_RANGE


class ResourceExhausted(ShimError):
    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unimplemented(ShimError):
    default_code = grpc.StatusCode.UNIMPLEMENTED


class PermissionDenied(ShimError):
    default_code = grpc.StatusCode.PERMISSION_DENIED


class Unauthenticated(ShimError):
    default_code = grpc.StatusCode.UNAUTHENTICATED


class Unavailable(ShimError):
    default_code = grpc.StatusCode.UNAVAILABLE
    ambiguous = True


class DeadlineExceeded(ShimError):
    default_code = grpc.StatusCode.DEADLINE_EXCEEDED
    ambiguous = True


class Aborted(ShimError):
    default_code = grpc.StatusCode.ABORTED
    ambiguous = True


class Internal(ShimError):
    default_code = grpc.StatusCode.INTERNAL
    ambiguous = True


_BY_CODE: dict[grpc.StatusCode, type[ShimError]] = {
    kind.default_code: kind
    for kind in (
        NotFound, AlreadyExists, FailedPrecondition, InvalidArgument, OutOfRange, ResourceExhausted,
        Unimplemented, PermissionDenied, Unauthenticated, Unavailable, DeadlineExceeded, Aborted, Internal,
    )
}  # fmt: skip
_BY_CODE[grpc.StatusCode.CANCELLED] = Aborted


def from_rpc_error(error: grpc.aio.AioRpcError) -> ShimError:
    """The exception for what gRPC raised. UNKNOWN and DATA_LOSS become Internal, which is ambiguous."""
    code = error.code()
    return _BY_CODE.get(code, Internal)(error.details() or "", code)
