"""Start."""

from __future__ import annotations

import asyncio

import grpc

from sandkeeper.conformance.box import (
    EXITED,
    FAILED,
    FOREVER,
    PAUSED,
    RUNNING,
    Box,
    absent_box,
    box_in,
    container,
    failing_box,
)
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, alive, fails, until
from sandkeeper.wire import node_pb2

FAILED_PRECONDITION, UNAVAILABLE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAVAILABLE

MANY = 20


@rule("START-1")
async def a_start_answers_the_pid_and_when_it_was_created(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    answer = await box.call("Start")
    assert answer.sandbox_id == box.id
    assert answer.pid > 0
    record = await box.record()
    assert (record.state, record.pid) == (RUNNING, answer.pid)
    assert answer.created_at == record.created_at
    assert record.created_at.ToNanoseconds() > 0


@rule("START-1", needs=("processes",))
async def the_pid_is_that_of_a_process(server: Server) -> None:
    box = Box(server, FOREVER, FOREVER)
    pid = await box.run()
    pids = [pid, *(each.pid for each in (await box.record()).containers)]
    assert len(set(pids)) == 3
    assert alive(pids) == pids


@rule("START-2")
async def a_repeated_start_starts_nothing(server: Server) -> None:
    box = Box(server, FOREVER)
    pid = await box.run()
    before = await box.record()
    assert await box.start() == pid
    assert await box.record() == before


@rule("START-2")
async def a_start_resumes_nothing(server: Server) -> None:
    box = await box_in(server, PAUSED)
    before = await box.record()
    assert await box.start() == before.pid
    assert await box.record() == before


@rule("START-3")
async def what_is_being_prepared_is_unavailable(server: Server) -> None:
    box = absent_box(server)
    await box.ask()
    await fails(box.start(), UNAVAILABLE)
    assert (await box.record()).pid == 0


@rule("START-4")
async def what_failed_says_why(server: Server) -> None:
    box = failing_box(server)
    await box.ask()
    record = await box.until(FAILED)
    assert record.reason
    assert record.reason in await fails(box.start(), FAILED_PRECONDITION)
    assert await box.record() == record


@rule("START-5")
async def an_instance_runs_once(server: Server) -> None:
    box = Box(server, "exit 0")
    record = await box.finish()
    await fails(box.start(), FAILED_PRECONDITION)
    assert await box.record() == record


@rule("START-6")
async def many_starts_at_once_get_the_same_pid(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    pids = await asyncio.gather(*(box.start() for _ in range(MANY)))
    assert set(pids) == {(await box.record()).pid}


@rule("START-7")
async def a_container_that_cannot_be_started_ends_the_others(server: Server) -> None:
    missing = container(server, name="broken", command=["/nonexistent/program"])
    box = await Box(server, FOREVER, missing).create()
    assert "nonexistent" in await fails(box.start(), FAILED_PRECONDITION)
    record = await box.record()
    assert record.state in (EXITED, FAILED)
    assert record.pid == 0
    reason, message = (
        (record.exit.reason, record.exit.message)
        if record.state == EXITED
        else (record.reason, record.message)
    )
    assert reason == "StartError"
    assert "broken" in message
    if record.state == EXITED:
        assert [each.state for each in record.containers] == [node_pb2.CONTAINER_STATE_EXITED] * 2
        assert record.containers[1].exit.reason == "StartError"
    if server.leftovers is not None:
        # The sandbox process goes as soon as the end is on disk.
        await until(lambda: not [line for line in server.left() if line.startswith("process ")])
    await fails(box.start(), FAILED_PRECONDITION)
    assert await box.record() == record
