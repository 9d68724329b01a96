"""Metrics, Platform, Update, Info and List."""

from __future__ import annotations

import platform
from pathlib import Path

import grpc

from sandkeeper.conformance.box import (
    CREATED,
    EXITED,
    FAILED,
    FOREVER,
    PREPARING,
    Box,
    box_in,
    state_name,
    states,
)
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import PATIENCE, RUNTIME, Server, about, code_of, drained, fails
from sandkeeper.wire import controller_pb2, node_pb2, types_pb2

_GO = {"x86_64": "amd64", "aarch64": "arm64"}


@rule("METRICS-1")
async def metrics_are_a_usage(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    metrics = (await box.call("Metrics")).metrics
    assert metrics.id == box.id
    assert metrics.timestamp.ToNanoseconds() > 0
    usage = node_pb2.Usage()
    assert metrics.data.Unpack(usage)
    assert usage.pids > 0
    assert usage.memory_bytes > 0
    assert usage.sampled_at.ToNanoseconds() > 0


@rule("METRICS-2")
async def what_does_not_run_has_no_metrics(server: Server) -> None:
    for state in (PREPARING, CREATED, EXITED, FAILED):
        if state in await states(server):
            with about(state_name(state)):
                box = await box_in(server, state)
                await fails(box.call("Metrics"), grpc.StatusCode.FAILED_PRECONDITION)


@rule("PLATFORM-1")
async def a_platform_is_in_gos_names(server: Server) -> None:
    answer = await server.controller.Platform(controller_pb2.ControllerPlatformRequest(), timeout=PATIENCE)
    assert answer.platform.os == "linux"
    assert answer.platform.architecture
    assert answer.platform.architecture not in _GO


@rule("PLATFORM-1", needs=("local",))
async def the_platform_is_this_machines(server: Server) -> None:
    answer = await server.controller.Platform(controller_pb2.ControllerPlatformRequest(), timeout=PATIENCE)
    assert answer.platform.architecture == _GO.get(platform.machine(), platform.machine())


@rule("UPDATE-1")
async def an_update_changes_nothing_that_runs(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    before = await box.record()
    runtime = types_pb2.Sandbox.Runtime(name=RUNTIME)
    sandbox = types_pb2.Sandbox(sandbox_id=box.id, runtime=runtime, labels={"a": "b"})
    code, message = await code_of(box.call("Update", sandbox=sandbox, fields=["labels"]))
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNIMPLEMENTED), f"{code.name}: {message}"
    assert await box.record() == before


@rule("INFO-1")
async def info_names_the_node_and_its_runtimes(server: Server) -> None:
    info = await server.client.info()
    assert info.node_name
    assert info.engine
    assert info.boot_id
    assert info.runtimes
    for runtime in info.runtimes:
        with about(runtime.name):
            assert runtime.name
            assert runtime.ready or runtime.message
    ready = {runtime.name for runtime in info.runtimes if runtime.ready}
    assert info.default_runtime in ready


@rule("INFO-1")
async def every_ready_runtime_runs_a_sandbox(server: Server) -> None:
    for runtime in (await server.client.info()).runtimes:
        if runtime.ready:
            with about(runtime.name):
                record = await Box(server, "exit 0", runtime=runtime.name).finish()
                assert (record.runtime, record.exit.status) == (runtime.name, 0)


@rule("INFO-1", needs=("local",))
async def the_boot_id_is_the_kernels(server: Server) -> None:
    assert (await server.client.info()).boot_id == _boot_id()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@rule("INFO-2")
async def what_may_be_allocated_is_at_most_what_there_is(server: Server) -> None:
    info = await server.client.info()
    for name in ("cpu_millis", "memory_bytes", "pids", "sandboxes"):
        with about(name):
            assert 0 < getattr(info.allocatable, name) <= getattr(info.capacity, name)


@rule("LIST-1")
async def every_record_is_listed_in_whatever_state(server: Server) -> None:
    boxes = {state: await box_in(server, state) for state in await states(server)}
    listed = {record.sandbox_id: record for record in (await server.client.list()).sandboxes}
    for state, box in boxes.items():
        with about(state_name(state)):
            record = listed[box.id]
            assert (record.state, record.owner) == (state, box.config.owner)
    assert len(listed) == len((await server.client.list()).sandboxes)


@rule("LIST-2", "WATCH-2", needs=("restart",))
async def the_epoch_changes_with_each_start(server: Server) -> None:
    first = await server.client.list()
    assert first.epoch
    assert (await server.client.list()).epoch == first.epoch
    await server.restart()
    assert (await server.client.list()).epoch not in ("", first.epoch)
    await fails(drained(server.client.watch(first.epoch, first.sequence)), grpc.StatusCode.OUT_OF_RANGE)
