"""Why a shim refuses: the codes that the contract names."""

from __future__ import annotations

import grpc
import pytest

from sandkeeper.shim import errors
from sandkeeper.wire.errors import from_rpc_error

REFUSALS = [
    (errors.Refused("why"), grpc.StatusCode.INTERNAL),
    (errors.UnknownSandbox("uid-1"), grpc.StatusCode.NOT_FOUND),
    (errors.UnknownSandbox("uid-1", container="main"), grpc.StatusCode.NOT_FOUND),
    (errors.Taken("why"), grpc.StatusCode.ALREADY_EXISTS),
    (errors.WrongState("why"), grpc.StatusCode.FAILED_PRECONDITION),
    (errors.BadRequest("why"), grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotReady("why"), grpc.StatusCode.UNAVAILABLE),
    (errors.Full("why"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Outdated("why"), grpc.StatusCode.OUT_OF_RANGE),
    (errors.Unsupported("why"), grpc.StatusCode.UNIMPLEMENTED),
]


@pytest.mark.parametrize(("refused", "code"), REFUSALS)
def test_codes(refused: errors.Refused, code: grpc.StatusCode) -> None:
    assert refused.code is code
    assert refused.message
    assert str(refused) == refused.message


def test_what_is_not_known_is_named() -> None:
    assert "'uid-1'" in errors.UnknownSandbox("uid-1").message
    assert "'main'" in errors.UnknownSandbox("uid-1", container="main").message


@pytest.mark.parametrize(("refused", "code"), REFUSALS)
def test_only_what_may_pass_leaves_the_effect_open(refused: errors.Refused, code: grpc.StatusCode) -> None:
    empty = grpc.aio.Metadata()
    error = from_rpc_error(grpc.aio.AioRpcError(refused.code, empty, empty, details=refused.message))
    assert error.ambiguous is (type(refused) in (errors.Refused, errors.NotReady))
    assert refused.message in str(error)
