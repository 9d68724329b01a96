"""Watch."""

from __future__ import annotations

import asyncio
from itertools import groupby, pairwise

import grpc

from sandkeeper.conformance.box import CREATED, EXITED, FOREVER, PREPARING, RUNNING, Box
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import PATIENCE, Server, drained, fails, until
from sandkeeper.wire import node_pb2
from sandkeeper.wire.errors import OutOfRange


@rule("WATCH-1")
async def every_change_arrives_in_order(server: Server) -> None:
    box = Box(server, FOREVER)
    async with server.watching() as changes:
        await box.create()
        await _arrives(changes, await box.record())
        await box.start()
        await _arrives(changes, await box.record())
        await box.stop()
        await _arrives(changes, await box.record())
    assert all(before.sequence < after.sequence for before, after in pairwise(changes))
    mine = [c.sandbox for c in changes if c.sandbox.sandbox_id == box.id]
    assert [state for state, _ in groupby(mine, lambda record: record.state)] == [
        PREPARING,
        CREATED,
        RUNNING,
        EXITED,
    ]


async def _arrives(changes: list[node_pb2.WatchResponse], record: node_pb2.SandboxRecord) -> None:
    await until(lambda: [change.sandbox for change in changes], lambda seen: record in seen)


@rule("WATCH-1")
async def what_changes_between_list_and_watch_arrives(server: Server) -> None:
    listed = await server.client.list()
    box = await Box(server, FOREVER).create()
    await box.start()
    record = await box.record()
    seen = await _seen(server, listed.epoch, listed.sequence, record)
    # Two who watch from the same place see the same.
    assert await _seen(server, listed.epoch, listed.sequence, record) == seen


async def _seen(
    server: Server, epoch: str, after: int, last: node_pb2.SandboxRecord
) -> list[node_pb2.WatchResponse]:
    """What arrives up to a record."""
    seen: list[node_pb2.WatchResponse] = []
    async with asyncio.timeout(PATIENCE):
        async for change in server.client.watch(epoch, after):
            seen.append(change)
            if change.sandbox == last:
                return seen
    raise AssertionError("the stream ended")


@rule("WATCH-2")
async def another_epoch_is_out_of_range(server: Server) -> None:
    listed = await server.client.list()
    for epoch in ("", "another", listed.epoch + "x"):
        for after in (0, listed.sequence):
            await fails(drained(server.client.watch(epoch, after)), grpc.StatusCode.OUT_OF_RANGE)


@rule("WATCH-3")
async def an_older_sequence_goes_on_or_is_out_of_range(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    record = await box.record()
    listed = await server.client.list()
    await box.stop()
    ended = await box.record()
    for after in (0, 1, listed.sequence // 2, listed.sequence):
        try:
            seen = await _seen(server, listed.epoch, after, ended)
        except OutOfRange:
            assert after < listed.sequence  # what List said a moment ago is not forgotten
            continue
        sequences = [change.sequence for change in seen]
        assert sequences == list(range(after + 1, sequences[-1] + 1))
        if after == 0:
            assert record in [change.sandbox for change in seen]


@rule("WATCH-4")
async def a_shutdown_arrives_as_removed(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    async with server.watching() as changes:
        await box.shutdown()
        await until(lambda: [change for change in changes if change.removed])
    last = changes[-1]
    assert last.removed
    assert (last.sandbox.sandbox_id, last.sandbox.owner) == (box.id, box.config.owner)
    assert [change.removed for change in changes].count(True) == 1
