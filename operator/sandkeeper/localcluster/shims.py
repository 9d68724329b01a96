"""Blocking calls to a shim for those that have no event loop: bringing a cluster up and down, and tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import grpc

from sandkeeper.wire import controller_pb2, controller_pb2_grpc, node_pb2, node_pb2_grpc
from sandkeeper.wire.client import CHANGE_DEADLINE, LIST_DEADLINE, READ_DEADLINE, SANDBOXER
from sandkeeper.wire.errors import NotFound, from_rpc_error
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import ClientTLS, TLSFiles


class ShimCalls:
    """One shim on TCP. Every method raises a ShimError."""

    def __init__(self, address: str, server_name: str, tls: TLSFiles) -> None:
        self._channel = grpc.secure_channel(
            address, ClientTLS(tls).credentials(), options=[("grpc.ssl_target_name_override", server_name)]
        )
        self._node: Any = node_pb2_grpc.NodeStub(self._channel)
        self._controller: Any = controller_pb2_grpc.ControllerStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def info(self) -> node_pb2.InfoResponse:
        with _mapped():
            answer: node_pb2.InfoResponse = self._node.Info(node_pb2.InfoRequest(), timeout=READ_DEADLINE)
        return answer

    def list(self) -> node_pb2.ListResponse:
        with _mapped():
            answer: node_pb2.ListResponse = self._node.List(node_pb2.ListRequest(), timeout=LIST_DEADLINE)
        return answer

    def shutdown_all(self) -> None:
        """Nothing that the shim has a record of is left."""
        for record in self.list().sandboxes:
            stop = controller_pb2.ControllerStopRequest(
                sandbox_id=record.sandbox_id, timeout_secs=1, sandboxer=SANDBOXER
            )
            shutdown = controller_pb2.ControllerShutdownRequest(
                sandbox_id=record.sandbox_id, sandboxer=SANDBOXER
            )
            with contextlib.suppress(NotFound), _mapped():
                if record.state in (node_pb2.STATE_RUNNING, node_pb2.STATE_PAUSED):
                    self._controller.Stop(stop, timeout=CHANGE_DEADLINE, metadata=_owner(record))
                self._controller.Shutdown(shutdown, timeout=CHANGE_DEADLINE, metadata=_owner(record))


def _owner(record: node_pb2.SandboxRecord) -> tuple[tuple[str, str], ...]:
    owner = record.owner
    if not owner.uid:
        return ()  # made by a plain client of the Controller protocol
    return OwnerKey(owner.namespace, owner.name, owner.uid, owner.instance).metadata()


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        failed: Any = error  # a blocking call's error has code() and details() too
        raise from_rpc_error(failed) from error
