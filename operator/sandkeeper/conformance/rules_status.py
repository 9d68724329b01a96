"""Status."""

from __future__ import annotations

import os
import signal

from sandkeeper.conformance.box import (
    EXITED,
    FOREVER,
    OBEDIENT,
    PAUSED,
    RUNNING,
    Box,
    box_in,
    container,
    state_name,
    states,
)
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, about, until
from sandkeeper.wire import controller_pb2, node_pb2
from sandkeeper.wire.times import to_datetime

WAITING, RUNS, ENDED = (
    node_pb2.CONTAINER_STATE_WAITING,
    node_pb2.CONTAINER_STATE_RUNNING,
    node_pb2.CONTAINER_STATE_EXITED,
)


@rule("STATUS-1", "STATUS-2")
async def a_status_has_the_whole_record_in_every_state(server: Server) -> None:
    for state in await states(server):
        with about(state_name(state)):
            box = await box_in(server, state)
            response = await box.call("Status")
            assert response.sandbox_id == box.id
            record = node_pb2.SandboxRecord()
            assert response.extra.Unpack(record)
            assert (record.sandbox_id, record.state) == (box.id, state)
            assert record.owner == box.config.owner
            assert record.digest == box.config.digest
            ready = state in (RUNNING, PAUSED)
            assert response.state == ("SANDBOX_READY" if ready else "SANDBOX_NOTREADY")
            await box.shutdown()


@rule("STATUS-3", "STATUS-4")
async def times_and_pid_follow_its_life(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    before = await box.call("Status")
    assert before.created_at.ToNanoseconds() > 0
    assert (before.pid, _has_ended(server, before)) == (0, False)
    pid = await box.start()
    running = await box.call("Status")
    assert (running.pid, _has_ended(server, running)) == (pid, False)
    await box.stop()
    ended = await box.call("Status")
    assert ended.pid == 0
    assert ended.exited_at == (await box.call("Wait")).exited_at
    assert ended.exited_at.ToNanoseconds() > ended.created_at.ToNanoseconds()
    assert before.created_at == running.created_at == ended.created_at


def _has_ended(server: Server, response: controller_pb2.ControllerStatusResponse) -> bool:
    if server.between:  # it writes an unset time as Go's first one
        return to_datetime(response.exited_at) is not None
    return response.HasField("exited_at")


@rule("STATUS-5")
async def an_exit_is_told_apart(server: Server) -> None:
    for script, status, reason in (("exit 0", 0, "Completed"), ("exit 3", 3, "Error")):
        with about(reason):
            record = await Box(server, script).finish()
            assert record.state == EXITED
            assert (record.exit.status, record.exit.signal, record.exit.reason) == (status, 0, reason)
            assert record.exit.exited_at.ToNanoseconds() >= record.started_at.ToNanoseconds() > 0
    box = Box(server, FOREVER)
    await box.run()
    record = await box.stop()
    assert (record.exit.status, record.exit.signal, record.exit.reason) == (137, 9, "Stopped")
    assert await box.record() == record


@rule("STATUS-5", needs=("processes",))
async def a_signal_is_told_apart(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    os.kill((await box.record()).containers[0].pid, signal.SIGKILL)
    ended = (await box.until(EXITED)).exit
    assert (ended.status, ended.signal, ended.reason) == (137, 9, "Signaled")


@rule("STATUS-5", needs=("processes",))
async def a_want_of_memory_is_told_apart(server: Server) -> None:
    limited = node_pb2.Resources(memory_bytes=16 * 1024 * 1024)
    box = Box(server, container(server, "x=a; while :; do x=$x$x; done", resources=limited))
    ended = (await box.finish()).exit
    assert (ended.status, ended.signal, ended.reason) == (137, 9, "OOMKilled")


@rule("STATUS-5", needs=("processes",))
async def a_lost_sandbox_process_is_told_apart(server: Server) -> None:
    box = Box(server, FOREVER)
    os.kill(await box.run(), signal.SIGKILL)
    record = await box.until(EXITED)
    assert record.exit.reason == "SandboxLost"
    assert record.containers[0].state == ENDED


@rule("STATUS-6")
async def every_container_is_in_the_record(server: Server) -> None:
    box = Box(
        server,
        container(server, OBEDIENT, name="zulu"),
        container(server, "exit 3", name="alpha"),
        container(server, OBEDIENT, name="mike"),
    )
    await box.create()
    assert _containers(await box.record()) == [("zulu", WAITING), ("alpha", WAITING), ("mike", WAITING)]
    await box.start()
    await box.trapping("zulu", "mike")
    record = await until(box.record, lambda record: record.containers[1].state == ENDED)
    assert _containers(record) == [("zulu", RUNS), ("alpha", ENDED), ("mike", RUNS)]
    pids = [each.pid for each in record.containers]
    assert pids[0] > 0
    assert pids[1] == 0
    assert pids[2] > 0
    assert len({*pids, record.pid}) == 4
    assert (record.containers[1].exit.status, record.containers[1].exit.reason) == (3, "Error")
    record = await box.stop(20)
    assert _containers(record) == [("zulu", ENDED), ("alpha", ENDED), ("mike", ENDED)]
    assert [each.pid for each in record.containers] == [0, 0, 0]
    assert [each.exit.status for each in record.containers] == [7, 3, 7]
    assert record.exit.status == 3  # the first to fail


def _containers(record: node_pb2.SandboxRecord) -> list[tuple[str, int]]:
    return [(each.name, each.state) for each in record.containers]
