"""Fencing."""

from __future__ import annotations

import grpc

from sandkeeper.conformance.box import CREATED, EXITED, FOREVER, RUNNING, Box, fresh_owner, packed
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, about, fails
from sandkeeper.wire.ids import OWNER_INSTANCE, OWNER_UID, OwnerKey

FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
INVALID_ARGUMENT, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def _instance(server: Server, of: OwnerKey, number: int) -> Box:
    return Box(server, FOREVER, owner=OwnerKey(of.namespace, of.name, of.uid, number))


@rule("FENCE-1")
async def an_older_instance_is_refused(server: Server) -> None:
    second = await _instance(server, fresh_owner(), 2).create()
    first = _instance(server, second.owner, 1)
    await fails(first.ask(), FAILED_PRECONDITION)
    await fails(first.call("Status"), NOT_FOUND)
    other = await _instance(server, fresh_owner(), 1).create()
    assert (await other.record()).state == CREATED


@rule("FENCE-1", "FENCE-2")
async def an_older_instance_is_refused_after_shutdown(server: Server) -> None:
    second = await _instance(server, fresh_owner(), 2).create()
    await second.shutdown()
    await fails(_instance(server, second.owner, 1).ask(), FAILED_PRECONDITION)
    # The highest itself is no older one.
    await second.create()
    await second.shutdown()
    await _instance(server, second.owner, 3).create()


@rule("FENCE-2", needs=("restart",))
async def an_older_instance_is_refused_after_a_restart(server: Server) -> None:
    """For 24 hours: the clock is the unit tests' to turn."""
    gone = await _instance(server, fresh_owner(), 2).create()
    await gone.shutdown()
    kept = await _instance(server, fresh_owner(), 2).create()
    await server.restart()
    for box in (gone, kept):
        await fails(_instance(server, box.owner, 1).ask(), FAILED_PRECONDITION)


@rule("FENCE-3")
async def a_call_for_another_owner_has_no_effect(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    before = await box.record()
    others = (
        OwnerKey(box.owner.namespace, box.owner.name, fresh_owner().uid, box.owner.instance),
        OwnerKey(box.owner.namespace, box.owner.name, box.owner.uid, box.owner.instance + 1),
    )
    for other in others:
        for method in await server.sandbox_calls():
            with about(f"{method} as instance {other.instance}"):
                await fails(server.call(method, box.id, other), FAILED_PRECONDITION)
    assert await box.record() == before
    assert before.state == RUNNING


@rule("FENCE-4")
async def an_owner_that_is_named_by_halves_is_invalid(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    before = await box.record()
    halves = (
        ((OWNER_UID, box.owner.uid),),
        ((OWNER_INSTANCE, "1"),),
        ((OWNER_UID, ""), (OWNER_INSTANCE, "1")),
        *(
            ((OWNER_UID, box.owner.uid), (OWNER_INSTANCE, number))
            for number in ("", "one", "-1", "0", "1.0", "1_0")
        ),
    )
    for metadata in halves:
        with about(metadata):
            await fails(server.create(box.id, metadata, options=packed(box.config)), INVALID_ARGUMENT)
            for method in await server.sandbox_calls():
                with about(method):
                    await fails(server.call(method, box.id, metadata), INVALID_ARGUMENT)
    assert await box.record() == before


@rule("FENCE-5")
async def a_call_without_an_owner_is_not_fenced(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    await server.create(box.id, options=packed(box.config))
    offered = await server.sandbox_calls()
    for method in ("Start", "Metrics", "Update", "Logs", "Exec", "Pause", "Resume", "Status", "Stop", "Wait"):
        if method in offered:
            with about(method):
                await server.call(method, box.id)
    assert (await box.record()).state == EXITED
    await server.call("Shutdown", box.id)


@rule("FENCE-6")
async def a_configuration_for_another_owner_is_invalid(server: Server) -> None:
    box = Box(server, FOREVER)
    for other in (fresh_owner(), OwnerKey(box.owner.namespace, box.owner.name, box.owner.uid, 2)):
        with about(f"instance {other.instance}"):
            options = packed(Box(server, FOREVER, owner=other).config)
            await fails(server.create(box.id, box.owner, options=options), INVALID_ARGUMENT)
            await fails(box.call("Status"), NOT_FOUND)
    assert box.id not in await server.ids()


@rule("FENCE-7")
async def an_id_that_is_not_the_owners_is_invalid(server: Server) -> None:
    box = Box(server, FOREVER)
    for sandbox_id in (f"{box.owner.uid}-2", box.owner.uid, fresh_owner().sandbox_id):
        with about(sandbox_id):
            asked = server.create(sandbox_id, box.owner, options=packed(box.config))
            await fails(asked, INVALID_ARGUMENT)
            await fails(server.call("Status", sandbox_id), NOT_FOUND)


@rule("FENCE-8")
async def the_next_instance_waits_for_the_one_before(server: Server) -> None:
    first = Box(server, FOREVER)
    await first.run()
    second = _instance(server, first.owner, 2)
    await fails(second.ask(), UNAVAILABLE)
    await fails(second.call("Status"), NOT_FOUND)
    assert (await first.record()).state == RUNNING
    await first.shutdown()
    await second.create()
