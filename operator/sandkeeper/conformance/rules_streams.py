"""Pause, Resume, Logs and Exec."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from sandkeeper.conformance.box import (
    CREATED,
    EXITED,
    FAILED,
    FOREVER,
    PAUSED,
    PREPARING,
    RUNNING,
    Box,
    box_in,
    state_name,
    states,
)
from sandkeeper.conformance.observed import Inapplicable
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import MOMENT, Server, about, drained, fails, until

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
DEADLINE_EXCEEDED, NOT_FOUND = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.NOT_FOUND

SPOKEN = "echo out1; echo err1 >&2; echo out2; echo err2 >&2"


async def _offered(server: Server, feature: str) -> None:
    """Where a call is not offered there is one rule more, and it is kept."""
    if await server.offers(feature):
        return
    box = Box(server, FOREVER)
    await box.run()
    for method in ("Pause", "Resume") if feature == "Pause" else (feature,):
        await fails(box.call(method), grpc.StatusCode.UNIMPLEMENTED)
    raise Inapplicable(f"it does not offer {feature}, and says so")


# Pause and Resume


@rule("PAUSE-1", "PAUSE-2")
async def a_pause_and_a_resume_may_be_repeated(server: Server) -> None:
    await _offered(server, "Pause")
    box = Box(server, FOREVER)
    pid = await box.run()
    before = await box.record()
    for _ in range(2):
        await server.client.pause(box.owner)
        record = await box.record()
        assert (record.state, record.pid) == (PAUSED, pid)
    for _ in range(2):
        await server.client.resume(box.owner)
        assert await box.record() == before
    assert before.state == RUNNING


@rule("PAUSE-1", needs=("processes",))
async def what_is_paused_uses_no_cpu(server: Server) -> None:
    await _offered(server, "Pause")
    box = Box(server, "while :; do :; done")
    await box.run()

    async def used() -> int:
        return (await server.client.metrics(box.owner)).cpu_usage_usec

    async def grows() -> None:
        before = await used()
        await until(used, lambda now: now > before + 10_000)

    await grows()
    await server.client.pause(box.owner)
    before = await used()
    await fails(box.call("Wait", timeout=MOMENT), DEADLINE_EXCEEDED)
    assert await used() - before < 10_000
    await server.client.resume(box.owner)
    await grows()


@rule("PAUSE-3")
async def what_does_not_run_is_neither_paused_nor_resumed(server: Server) -> None:
    await _offered(server, "Pause")
    for state in (PREPARING, CREATED, EXITED, FAILED):
        if state in await states(server):
            with about(state_name(state)):
                box = await box_in(server, state)
                for method in ("Pause", "Resume"):
                    await fails(box.call(method), FAILED_PRECONDITION)
                assert (await box.record()).state == state


# Logs


@rule("LOGS-1")
async def both_streams_arrive_each_in_its_order(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, SPOKEN, "echo another")
    await box.finish()
    lines = (await box.log("c0")).splitlines()
    assert sorted(lines) == ["err1", "err2", "out1", "out2"]
    assert lines.index("out1") < lines.index("out2")
    assert lines.index("err1") < lines.index("err2")
    assert await box.log("c1") == "another\n"


@rule("LOGS-1")
async def without_follow_the_call_ends_at_the_end(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, f"echo one; {FOREVER}")
    await box.run()
    await box.said("one")
    assert await box.log() == "one\n"
    assert (await box.record()).state == RUNNING


@rule("LOGS-1")
async def with_follow_it_ends_when_the_sandbox_has(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, "echo one; sleep 0.3; echo two", FOREVER)
    await box.run()
    following = asyncio.create_task(box.log("c0", follow=True))
    await until(box.record, lambda record: record.containers[0].HasField("exit"))
    # The other container goes on, so the sandbox has not ended.
    await fails(box.call("Logs", container="c1", follow=True, timeout=MOMENT), DEADLINE_EXCEEDED)
    assert not following.done()
    await box.stop()
    async with asyncio.timeout(30):
        assert await following == "one\ntwo\n"


@rule("LOGS-2")
async def a_log_can_be_read_until_shutdown(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, "echo one; echo two; exit 3")
    await box.finish()
    for follow in (False, True):
        assert await box.log(follow=follow) == "one\ntwo\n"
    await box.shutdown()
    await fails(box.log(), NOT_FOUND)


@rule("LOGS-3")
async def the_last_lines_can_be_asked_for(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, "echo one; echo two; echo three")
    await box.finish()
    for number, text in (
        (1, "three\n"),
        (2, "two\nthree\n"),
        (100, "one\ntwo\nthree\n"),
        (0, "one\ntwo\nthree\n"),
    ):
        with about(number):
            assert await box.log(tail_lines=number) == text


@rule("LOGS-4")
async def a_container_that_is_not_there_is_not_found(server: Server) -> None:
    await _offered(server, "Logs")
    box = Box(server, FOREVER)
    await box.run()
    await fails(box.log("another"), NOT_FOUND)


# Exec


@rule("EXEC-1")
async def output_comes_on_its_stream_and_the_status_last(server: Server) -> None:
    await _offered(server, "Exec")
    box = Box(server, FOREVER)
    await box.run()
    answers = await _exec(box, ["sh", "-c", f"{SPOKEN}; exit 3"])
    assert answers[-1] == 3
    streams = {"stdout": b"", "stderr": b""}
    for stream, data in answers[:-1]:
        streams[stream] += data
    assert streams == {"stdout": b"out1\nout2\n", "stderr": b"err1\nerr2\n"}
    assert (await box.record()).state == RUNNING


@rule("EXEC-2")
async def what_is_sent_is_its_input_and_so_is_the_end(server: Server) -> None:
    await _offered(server, "Exec")
    box = Box(server, FOREVER)
    await box.run()

    async def sent() -> AsyncIterator[bytes]:
        for line in (b"one\n", b"two\n"):
            yield line

    answers = await _exec(box, ["cat"], stdin=sent())
    assert answers[-1] == 0
    assert b"".join(data for _, data in answers[:-1]) == b"one\ntwo\n"
    # Without stdin the input is at its end from the start.
    assert await _exec(box, ["cat"]) == [0]


async def _exec(box: Box, command: list[str], **options: Any) -> list[Any]:
    return await drained(box.server.client.exec(box.owner, command, **options))


@rule("EXEC-3")
async def nothing_is_run_in_what_does_not_run(server: Server) -> None:
    await _offered(server, "Exec")
    for state in (PREPARING, CREATED, PAUSED, EXITED, FAILED):
        if state in await states(server):
            with about(state_name(state)):
                await fails((await box_in(server, state)).call("Exec"), FAILED_PRECONDITION)


@rule("EXEC-4", needs=("processes",))
async def a_caller_that_leaves_takes_its_process_along(server: Server) -> None:
    await _offered(server, "Exec")
    box = Box(server, FOREVER)
    await box.run()

    async def processes() -> int:
        return (await server.client.metrics(box.owner)).pids

    before = await processes()
    for leave in (_by_closing, _by_deadline):
        with about(leave.__name__):
            await leave(box, processes, before)
            await until(processes, lambda now: now == before)
    assert (await box.record()).state == RUNNING


async def _by_closing(box: Box, processes: Callable[[], Awaitable[int]], before: int) -> None:
    stream = box.server.client.exec(box.owner, ["sh", "-c", f"echo ready; {FOREVER}"])
    async for answer in stream:
        assert answer == ("stdout", b"ready\n")
        break
    assert await processes() > before
    await stream.aclose()  # type: ignore[attr-defined]


async def _by_deadline(box: Box, processes: Callable[[], Awaitable[int]], before: int) -> None:
    command = ["sh", "-c", f"trap '' TERM HUP INT; {FOREVER}"]
    await fails(box.call("Exec", command=command, timeout=1), DEADLINE_EXCEEDED)
