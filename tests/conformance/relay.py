"""A sandboxer in front of another, which it asks for everything that a test does not answer itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from sandkeeper.wire import controller_pb2

_SERVICE = "/containerd.services.sandbox.v1.Controller/"
_PASSED = ("containerd-namespace",)
_WORKERS = 64
"""More than there are calls at once: a Wait holds one."""

Answer = Callable[[Any], Message]
"""From the request of a call, to its answer. Raises Refused."""


class Refused(Exception):
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__(code)
        self.code = code


class Relay(grpc.GenericRpcHandler):
    """answers: by the call's name; may change at any time."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}

    @contextlib.contextmanager
    def serving(self, socket: Path, behind: Path) -> Iterator[None]:
        """On a unix socket, until the end of the block. behind: the socket of the other, which may come later."""
        with (
            grpc.insecure_channel(f"unix:{behind}") as self._channel,
            ThreadPoolExecutor(_WORKERS) as workers,
        ):
            server = grpc.server(workers, handlers=(self,))
            server.add_insecure_port(f"unix:{socket}")
            server.start()
            try:
                yield
            finally:
                server.stop(None).wait()

    def service(self, details: Any) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if not details.method.startswith(_SERVICE):
            return None
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(details.method, request, context)
        )

    def _answer(self, method: str, request: bytes, context: Any) -> bytes:
        name = method.removeprefix(_SERVICE)
        answer = self.answers.get(name)
        try:
            if answer is not None:
                kind = getattr(controller_pb2, f"Controller{name}Request")
                return answer(kind.FromString(request)).SerializeToString()
            return self.ask(name, request, context)
        except Refused as error:
            context.abort(error.code, "")
        except grpc.FutureCancelledError:
            context.abort(grpc.StatusCode.CANCELLED, "")
        except grpc.RpcError as error:
            failed: Any = error  # a grpc.Call as well
            context.abort(failed.code(), failed.details())
        raise AssertionError("abort raises")

    def ask(self, name: str, request: bytes, context: Any) -> bytes:
        """The one behind."""
        passed = [(key, value) for key, value in context.invocation_metadata() if key in _PASSED]
        call: Any = self._channel.unary_unary(_SERVICE + name)
        done = call.future(request, metadata=passed, timeout=context.time_remaining())
        context.add_callback(done.cancel)
        return bytes(done.result())
