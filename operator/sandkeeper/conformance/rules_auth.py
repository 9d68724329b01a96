"""Who may call."""

from __future__ import annotations

import stat
from collections.abc import Awaitable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import PATIENCE, Clients, Server, about, drained, fails, unknown_id
from sandkeeper.wire import controller_pb2_grpc, node_pb2, node_pb2_grpc
from sandkeeper.wire.client import OPTIONS, ShimClient
from sandkeeper.wire.controller_pb2 import ControllerStatusRequest
from sandkeeper.wire.tls import ClientTLS, TLSFiles

UNAVAILABLE, PERMISSION_DENIED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED


def _clients(server: Server) -> Clients:
    assert server.clients is not None
    return server.clients


async def _permitted(clients: Clients) -> None:
    """A server that nobody reaches would refuse the others too."""
    for files in clients.permitted:
        with about(files.cert.name):
            async with ShimClient(
                clients.address, tls=ClientTLS(files), server_name=clients.server_name
            ) as client:
                await client.info()


def _info(channel: grpc.aio.Channel) -> Awaitable[object]:
    call: Awaitable[object] = node_pb2_grpc.NodeStub(channel).Info(node_pb2.InfoRequest(), timeout=PATIENCE)
    return call


@rule("AUTH-1", needs=("tcp",))
async def a_client_without_a_certificate_of_the_ca_is_refused(server: Server) -> None:
    clients = _clients(server)
    await _permitted(clients)
    ca = clients.permitted[0].ca
    foreign = TLSFiles(ca, clients.foreign.cert, clients.foreign.key)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", clients.server_name))
    for name, credentials in (
        ("no certificate", grpc.ssl_channel_credentials(root_certificates=ca.read_bytes())),
        ("a certificate of another CA", ClientTLS(foreign).credentials()),
    ):
        with about(name):
            async with grpc.aio.secure_channel(clients.address, credentials, options=options) as channel:
                await fails(_info(channel), UNAVAILABLE)
    with about("no TLS"):
        async with grpc.aio.insecure_channel(clients.address, options=OPTIONS) as channel:
            await fails(_info(channel), UNAVAILABLE)
    await _permitted(clients)


@rule("AUTH-2", needs=("tcp",))
async def a_client_with_another_name_is_denied_every_service(server: Server) -> None:
    clients = _clients(server)
    await _permitted(clients)
    options = (*OPTIONS, ("grpc.ssl_target_name_override", clients.server_name))
    for files in clients.strangers:
        with about(files.cert.name):
            credentials = ClientTLS(files).credentials()
            async with grpc.aio.secure_channel(clients.address, credentials, options=options) as channel:
                await fails(_info(channel), PERMISSION_DENIED)
                node = node_pb2_grpc.NodeStub(channel)
                watching = node.Watch(node_pb2.WatchRequest(epoch="any"), timeout=PATIENCE)
                await fails(drained(watching), PERMISSION_DENIED)
                controller = controller_pb2_grpc.ControllerStub(channel)
                request = ControllerStatusRequest(sandbox_id=unknown_id())
                await fails(controller.Status(request, timeout=PATIENCE), PERMISSION_DENIED)
                health = health_pb2_grpc.HealthStub(channel)
                check = health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
                await fails(check, PERMISSION_DENIED)


@rule("AUTH-3", needs=("local",))
async def the_socket_is_for_its_owner_alone(server: Server) -> None:
    assert server.socket is not None
    assert oct(stat.S_IMODE(server.socket.stat().st_mode)) == "0o600"
