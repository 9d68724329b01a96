"""Restarts, of a container and of the server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import grpc

from sandkeeper.conformance.box import (
    CREATED,
    EXITED,
    FAILED,
    FOREVER,
    OBEDIENT,
    PAUSED,
    PREPARING,
    RUNNING,
    Box,
    box_in,
    state_name,
    states,
)
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, about, alive, fails, until
from sandkeeper.wire import node_pb2
from sandkeeper.wire.times import to_datetime

ON_FAILURE, ALWAYS = node_pb2.RESTART_POLICY_ON_FAILURE, node_pb2.RESTART_POLICY_ALWAYS
WAITING = node_pb2.CONTAINER_STATE_WAITING


@rule("RESTART-1")
async def never_starts_nothing_again(server: Server) -> None:
    box = Box(server, FOREVER, "exit 3")
    await box.run()
    ended = await until(box.record, lambda record: record.containers[1].HasField("exit"))
    await box.stays(ended)
    record = await box.record()
    assert (record.state, record.containers[1].restart_count) == (RUNNING, 0)
    assert record.containers[1].state == node_pb2.CONTAINER_STATE_EXITED


@rule("RESTART-2")
async def on_failure_starts_again_with_growing_waits(server: Server) -> None:
    box = Box(server, "exit 3", restart_policy=ON_FAILURE)
    async with server.watching() as changes:
        await box.run()
        await until(box.record, lambda record: record.containers[0].restart_count >= 3)
        await box.stop()
        await until(lambda: changes[-1:] and changes[-1].sandbox.state == EXITED)
    mine = [c.sandbox for c in changes if c.sandbox.sandbox_id == box.id]
    states = [record.state for record in mine]
    assert all(state == RUNNING for state in states[states.index(RUNNING) : -1])
    counts = [record.containers[0].restart_count for record in mine]
    assert counts == sorted(counts)
    waits = [_wait_before(mine, count) for count in (1, 2, 3)]
    least = server.restart_backoff or 0.001
    # Each begins after twice the wait of the one before.
    assert all(wait >= least * 2**number for number, wait in enumerate(waits)), waits


def _wait_before(records: list[node_pb2.SandboxRecord], count: int) -> float:
    """Seconds from a container's end to its start number `count`."""
    before = [r.containers[0] for r in records if r.containers[0].restart_count == count - 1][-1]
    after = next(r.containers[0] for r in records if r.containers[0].restart_count == count)
    assert (before.state, before.exit.status) == (WAITING, 3)
    return (after.started_at.ToNanoseconds() - before.exit.exited_at.ToNanoseconds()) / 1e9


@rule("RESTART-2")
async def on_failure_leaves_a_success_alone(server: Server) -> None:
    record = await Box(server, "exit 0", restart_policy=ON_FAILURE).finish()
    assert (record.state, record.exit.status, record.containers[0].restart_count) == (EXITED, 0, 0)


@rule("RESTART-3", needs=("restart",))
async def a_killed_server_has_every_record_and_what_ran_runs_on(server: Server) -> None:
    boxes = {state: await box_in(server, state) for state in await states(server)}
    obedient = Box(server, OBEDIENT)
    pid = await obedient.run()
    await obedient.trapping()
    records = {state: await box.record() for state, box in boxes.items()}
    await server.restart()
    for state, box in boxes.items():
        with about(state_name(state)):
            record = await box.record()
            if state == PREPARING:  # it goes on: what it waits for is told anew
                record = await box.until(PREPARING)
                for each in (record, records[state]):
                    _forget_reasons(each)
            assert record == records[state]
    assert (await obedient.record()).pid == await obedient.start() == pid
    # What runs is under control again.
    assert (await obedient.stop(20)).exit.status == 7
    if PAUSED in boxes:
        await server.client.resume(boxes[PAUSED].owner)
        assert (await boxes[PAUSED].record()).pid == records[PAUSED].pid
    await boxes[CREATED].start()
    assert (await boxes[EXITED].wait())[0] == records[EXITED].exit.status
    await fails(boxes[FAILED].start(), grpc.StatusCode.FAILED_PRECONDITION)


def _forget_reasons(record: node_pb2.SandboxRecord) -> None:
    record.reason = record.message = ""
    for each in record.containers:
        each.reason = each.message = ""


@rule("RESTART-3", needs=("processes", "restart"))
async def the_processes_are_the_same(server: Server) -> None:
    box = Box(server, "while :; do echo tick; sleep 0.05; done", FOREVER)
    pids = [await box.run(), *(each.pid for each in (await box.record()).containers)]
    await server.restart()
    record = await box.record()
    assert [record.pid, *(each.pid for each in record.containers)] == pids
    assert alive(pids) == pids
    before = (await box.log("c0")).count("tick")
    await until(lambda: box.log("c0"), lambda output: output.count("tick") > before)


@rule("RESTART-3", needs=("failpoints", "leaks", "restart"))
async def what_the_server_did_not_live_to_note_is_found(server: Server) -> None:
    ordinary = Box(server, FOREVER)
    await ordinary.run()
    expected = len(_processes(server))
    await ordinary.shutdown()
    await server.restart({"start": "1*panic(after)"})
    box = await Box(server, FOREVER).create()
    await fails(box.call("Start"), grpc.StatusCode.UNAVAILABLE)
    await server.restart()
    # Its sandbox process runs already; the same call completes it and starts no second one.
    pid = await box.start()
    record = await box.record()
    assert (record.state, record.pid) == (RUNNING, pid)
    await until(lambda: _processes(server), lambda found: len(found) == expected)


def _processes(server: Server) -> list[str]:
    return [line for line in server.left() if line.startswith("process ")]


@rule("RESTART-4", needs=("restart",))
async def an_end_while_the_server_was_away_is_known(server: Server) -> None:
    assert server.host is not None
    boxes = [Box(server, f"sleep 0.5; exit {code}") for code in (0, 5)]
    for box in boxes:
        await box.run()
    records = [await box.record() for box in boxes]
    waiting = asyncio.create_task(boxes[1].wait())
    server.host.kill()
    pids = [record.containers[0].pid for record in records]
    # A second more: whoever reaps a process takes its time on a busy machine, and the time of the reaping for the end.
    due = max(record.started_at.ToNanoseconds() for record in records) / 1e9 + 0.5 + 1.0
    await until(lambda: not alive(pids) and datetime.now(UTC).timestamp() > due)
    began = datetime.now(UTC)
    await server.started()
    for box, code, reason in ((boxes[0], 0, "Completed"), (boxes[1], 5, "Error")):
        assert (await box.wait())[0] == code
        record = await box.record()
        assert record.state == EXITED
        assert (record.exit.status, record.exit.reason) == (code, reason)
        ended = to_datetime(record.exit.exited_at)
        assert ended is not None
        assert ended <= began
    # Who waited when it was killed gets the answer too.
    assert (await waiting)[0] == 5


@rule("RESTART-5")
async def always_starts_a_success_again(server: Server) -> None:
    box = Box(server, "exit 0", restart_policy=ALWAYS)
    await box.run()
    record = await until(box.record, lambda record: record.containers[0].restart_count >= 2)
    assert record.state == RUNNING
