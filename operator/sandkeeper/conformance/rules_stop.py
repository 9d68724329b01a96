"""Stop."""

from __future__ import annotations

import asyncio
import time

import grpc

from sandkeeper.conformance.box import (
    CREATED,
    DEAF,
    EXITED,
    FAILED,
    OBEDIENT,
    PREPARING,
    Box,
    box_in,
    state_name,
    states,
)
from sandkeeper.conformance.observed import Inapplicable
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, about, fails, until
from sandkeeper.wire import node_pb2

ALWAYS = node_pb2.RESTART_POLICY_ALWAYS
LONG = 20
"""Seconds of grace that nobody needs."""


@rule("STOP-1")
async def a_stop_asks_first_and_answers_at_the_end(server: Server) -> None:
    box = Box(server, OBEDIENT, OBEDIENT)
    await box.run()
    await box.trapping("c0", "c1")
    record = await box.stop(LONG)
    assert record.state == EXITED
    assert (record.exit.status, record.exit.signal, record.exit.reason) == (7, 0, "Stopped")
    assert [each.exit.status for each in record.containers] == [7, 7]


@rule("STOP-2")
async def what_does_not_end_is_killed(server: Server) -> None:
    box = Box(server, DEAF)
    await box.run()
    await box.trapping()
    began = time.monotonic()
    record = await box.stop(1)
    assert time.monotonic() - began >= 1  # not before its time
    assert record.state == EXITED
    assert (record.exit.status, record.exit.signal, record.exit.reason) == (137, 9, "Stopped")


@rule("STOP-3")
async def a_repeated_stop_leaves_the_exit_as_it_was(server: Server) -> None:
    for box, bring in (
        (Box(server, OBEDIENT), True),
        (Box(server, "exit 3"), False),
    ):
        await box.run()
        if bring:
            await box.trapping()
            await asyncio.gather(*(box.stop(LONG) for _ in range(5)))
        else:
            await box.wait()
        record = await box.record()
        assert record.state == EXITED
        assert record.exit.reason == ("Stopped" if bring else "Error")
        assert await box.stop() == record
        assert await box.stop(LONG) == record


@rule("STOP-4")
async def what_never_ran_is_left_alone(server: Server) -> None:
    for state in (PREPARING, CREATED, FAILED):
        if state in await states(server):
            with about(state_name(state)):
                box = await box_in(server, state)
                record = await box.stop(LONG)
                assert (record.state, record.pid) == (state, 0)


@rule("STOP-5")
async def nothing_is_restarted_after_a_stop(server: Server) -> None:
    box = Box(server, OBEDIENT, restart_policy=ALWAYS)
    await box.run()
    await box.trapping()
    await _stays_ended(box, await box.stop(LONG))


@rule("STOP-5")
async def what_waits_for_its_restart_has_ended_by_a_stop(server: Server) -> None:
    box = Box(server, "exit 3", restart_policy=ALWAYS)
    await box.run()
    waiting = node_pb2.CONTAINER_STATE_WAITING
    await until(box.record, lambda record: record.containers[0].state == waiting)
    await _stays_ended(box, await box.stop(LONG))


async def _stays_ended(box: Box, record: node_pb2.SandboxRecord) -> None:
    assert record.state == EXITED
    await box.stays(record)
    await fails(box.start(), grpc.StatusCode.FAILED_PRECONDITION)


@rule("STOP-6")
async def what_is_paused_ends_as_what_runs(server: Server) -> None:
    if not await server.offers("Pause"):
        raise Inapplicable("it cannot pause")
    obedient, deaf = Box(server, OBEDIENT), Box(server, DEAF)
    for box, grace, status in ((obedient, LONG, 7), (deaf, 0, 137)):
        await box.run()
        await box.trapping()
        await server.client.pause(box.owner)
        record = await box.stop(grace)
        assert (record.state, record.exit.status, record.exit.reason) == (EXITED, status, "Stopped")
