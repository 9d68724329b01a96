"""All calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sandkeeper.conformance.box import CREATED, EXITED, FOREVER, RUNNING, Box, fresh_owner
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import (
    NAMESPACE,
    PATIENCE,
    Server,
    about,
    code_of,
    fails,
    unknown_id,
    until,
)
from sandkeeper.wire import controller_pb2, controller_pb2_grpc
from sandkeeper.wire.client import open_channel

NOT_FOUND, UNAVAILABLE = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED


@rule("CALL-1")
async def a_call_about_an_unknown_id_is_not_found(server: Server) -> None:
    owner = fresh_owner()
    for method in await server.sandbox_calls():
        with about(method):
            await fails(server.call(method, unknown_id()), NOT_FOUND)
            await fails(server.call(method, owner.sandbox_id, owner), NOT_FOUND)


@rule("CALL-1")
async def a_call_after_shutdown_is_not_found(server: Server) -> None:
    box = await Box(server).create()
    await box.shutdown()
    for method in await server.sandbox_calls():
        with about(method):
            await fails(box.call(method), NOT_FOUND)


@rule("CALL-2", needs=("restart",))
async def a_record_is_never_not_found_while_the_server_starts(server: Server) -> None:
    assert server.host is not None
    ids = [(await Box(server, FOREVER).create()).id for _ in range(10)]
    server.host.kill()
    server.host.launch()

    async def answered() -> bool:
        """A channel of its own each time: one that was refused waits before it tries again."""
        async with open_channel(server.address) as channel:
            controller: Any = controller_pb2_grpc.ControllerStub(channel)
            requests = [controller_pb2.ControllerStatusRequest(sandbox_id=each) for each in ids]
            calls = [code_of(controller.Status(each, timeout=PATIENCE)) for each in requests]
            codes = {code for code, _ in await asyncio.gather(*calls)}
        assert codes <= {grpc.StatusCode.OK, UNAVAILABLE}, codes
        return codes == {grpc.StatusCode.OK}

    await until(answered)


@rule("CALL-3")
async def the_sandboxer_is_ignored(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.ask(sandboxer="another")
    await box.until(CREATED)
    for method in ("Start", "Metrics", "Status", "Stop", "Wait", "Shutdown"):
        with about(method):
            await box.call(method, sandboxer="another")
    request = controller_pb2.ControllerPlatformRequest(sandboxer="another")
    await server.controller.Platform(request, timeout=PATIENCE)


@rule("CALL-4")
async def a_caller_that_leaves_at_any_moment_leaves_nothing_half_done(server: Server) -> None:
    for patience in (0.001, 0.003, 0.01, 0.03, 0.1):
        with about(f"a caller that leaves after {patience:g} s"):
            box = Box(server, FOREVER)
            await _left(box.ask(timeout=patience))
            await box.create()
            await _left(box.call("Start", timeout=patience))
            pid = await box.start()
            record = await box.record()
            assert (record.state, record.pid) == (RUNNING, pid)
            await _left(box.call("Stop", timeout=patience))
            assert (await box.stop()).state == EXITED
            await _left(box.call("Shutdown", timeout=patience))
            await _gone(box)


@rule("CALL-4", needs=("failpoints", "leaks"))
async def a_call_that_outlives_its_caller_completes(server: Server) -> None:
    slow = "1*delay(0.5)"
    await server.restart({"prepare": slow, "start": slow, "remove": slow})
    before = server.left()
    box = Box(server, FOREVER)
    await fails(box.ask(timeout=0.1), DEADLINE_EXCEEDED)
    await box.create()
    await fails(box.call("Start", timeout=0.1), DEADLINE_EXCEEDED)
    # It completes, without another call that would begin it anew.
    record = await box.until(RUNNING)
    assert await box.start() == record.pid
    await fails(box.call("Shutdown", timeout=0.1), DEADLINE_EXCEEDED)
    await until(lambda: server.ids(), lambda ids: box.id not in ids)
    assert server.left() == before


async def _left(call: Awaitable[object]) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call


async def _gone(box: Box) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        await box.call("Shutdown")
    await fails(box.call("Status"), NOT_FOUND)


@rule("CALL-5")
async def the_health_service_says_serving(server: Server) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@rule("CALL-6")
async def the_reflection_service_lists_both_services(server: Server) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = [each async for each in reflection.ServerReflectionInfo(iter([request]), timeout=PATIENCE)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {"containerd.services.sandbox.v1.Controller", "sandkeeper.shim.v1.Node"}


@rule("CALL-7")
async def one_id_in_two_containerd_namespaces_is_two_sandboxes(server: Server) -> None:
    sandbox_id = unknown_id()
    one, other = (((NAMESPACE, name),) for name in server.namespaces)
    await server.create(sandbox_id, one)
    await fails(server.call("Status", sandbox_id, other), NOT_FOUND)
    await server.create(sandbox_id, other)
    await server.call("Shutdown", sandbox_id, other)
    assert (await server.call("Status", sandbox_id, one)).sandbox_id == sandbox_id
    await fails(server.call("Status", sandbox_id, other), NOT_FOUND)
