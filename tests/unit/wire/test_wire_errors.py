"""Every gRPC status has its exception, and the exception knows whether the effect may have happened."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from sandkeeper.wire import errors
from sandkeeper.wire.errors import ShimError, from_rpc_error

EXPECTED: dict[grpc.StatusCode, tuple[type[ShimError], bool]] = {
    # code: exception, ambiguous (docs/contract.md, "Words")
    grpc.StatusCode.CANCELLED: (errors.Aborted, True),
    grpc.StatusCode.UNKNOWN: (errors.Internal, True),
    grpc.StatusCode.INVALID_ARGUMENT: (errors.InvalidArgument, False),
    grpc.StatusCode.DEADLINE_EXCEEDED: (errors.DeadlineExceeded, True),
    grpc.StatusCode.NOT_FOUND: (errors.NotFound, False),
    grpc.StatusCode.ALREADY_EXISTS: (errors.AlreadyExists, False),
    grpc.StatusCode.PERMISSION_DENIED: (errors.PermissionDenied, False),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (errors.ResourceExhausted, False),
    grpc.StatusCode.FAILED_PRECONDITION: (errors.FailedPrecondition, False),
    grpc.StatusCode.ABORTED: (errors.Aborted, True),
    grpc.StatusCode.OUT_OF_RANGE: (errors.OutOfRange, False),
    grpc.StatusCode.UNIMPLEMENTED: (errors.Unimplemented, False),
    grpc.StatusCode.INTERNAL: (errors.Internal, True),
    grpc.StatusCode.UNAVAILABLE: (errors.Unavailable, True),
    grpc.StatusCode.DATA_LOSS: (errors.Internal, True),
    grpc.StatusCode.UNAUTHENTICATED: (errors.Unauthenticated, False),
}


def failure(code: grpc.StatusCode, details: str | None = "the shim's words") -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details=details)


def test_the_table_has_every_failure_that_grpc_knows() -> None:
    assert EXPECTED.keys() == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", EXPECTED, ids=lambda code: code.name)
def test_code(code: grpc.StatusCode) -> None:
    kind, ambiguous = EXPECTED[code]
    error = from_rpc_error(failure(code))
    assert type(error) is kind
    assert error.ambiguous is ambiguous
    assert error.code is code
    assert error.message == "the shim's words"
    assert str(error) == f"{code.name}: the shim's words"


@pytest.mark.parametrize("details", ["", None])
def test_without_words_the_code_speaks(details: str | None) -> None:
    error = from_rpc_error(failure(grpc.StatusCode.NOT_FOUND, details))
    assert (error.message, str(error)) == ("", "NOT_FOUND")


def test_raised_by_hand_an_exception_has_its_own_code() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ShimError)]
    for kind in kinds:
        assert kind("no").code is kind.default_code
    assert len({kind.default_code for kind in kinds}) == len(kinds)


def test_one_except_clause_catches_them_all() -> None:
    for code in EXPECTED:
        assert isinstance(from_rpc_error(failure(code)), ShimError)
