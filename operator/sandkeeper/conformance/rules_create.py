"""Create, of what can run."""

from __future__ import annotations

import asyncio

import grpc
from google.protobuf import any_pb2

from sandkeeper.conformance.box import (
    CREATED,
    EXITED,
    FOREVER,
    PREPARING,
    RUNNING,
    Box,
    absent_box,
    container,
    fresh_owner,
    packed,
)
from sandkeeper.conformance.observed import Inapplicable
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import CUT_OFF, NAMESPACE, Server, about, fails, unknown_id, until
from sandkeeper.wire import node_pb2

ALREADY_EXISTS, INVALID_ARGUMENT = grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND

MANY = 20


@rule("CREATE-1")
async def create_makes_a_record(server: Server) -> None:
    box = Box(server, FOREVER)
    assert (await box.ask()).sandbox_id == box.id
    assert (await box.record()).sandbox_id == box.id
    assert not server.has_node or box.id in await server.ids()


@rule("CREATE-1", needs=("restart",))
async def the_record_outlives_a_kill_right_after_the_answer(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.ask()
    await server.restart()
    await box.until(CREATED)


@rule("CREATE-2")
async def a_repeated_create_changes_nothing(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    for state, bring in ((CREATED, None), (RUNNING, box.start), (EXITED, box.stop)):
        if bring is not None:
            await bring()
        before = await box.record()
        assert before.state == state
        assert (await box.ask()).sandbox_id == box.id
        assert await box.record() == before
    if server.has_node:
        listed = [record.sandbox_id for record in (await server.client.list()).sandboxes]
        assert listed.count(box.id) == 1


@rule("CREATE-3")
async def another_digest_changes_nothing(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    before = await box.record()
    other = Box(server, FOREVER, owner=box.owner, hostname="another")
    assert other.config.digest != box.config.digest
    await fails(other.ask(), ALREADY_EXISTS)
    assert await box.record() == before


@rule("CREATE-4")
async def an_id_that_is_no_identifier_is_invalid(server: Server) -> None:
    before = await server.ids() if server.has_node else set()
    left = server.left() if server.leftovers else set()
    bad = ("", ".", "..", "../x", "a/b", "/a", "a b", "a\n", "-a", "a-", "_a", "a..b", "a.-b", "ä", "a" * 77)
    for sandbox_id in bad:
        with about(repr(sandbox_id)):
            for caller in ((), ((NAMESPACE, server.namespaces[0]),)):
                await fails(server.create(sandbox_id, caller), INVALID_ARGUMENT)
                await fails(server.call("Status", sandbox_id, caller), NOT_FOUND)
    assert not server.has_node or await server.ids() == before
    assert not server.leftovers or server.left() == left


@rule("CREATE-4")
async def an_identifier_of_any_form_is_an_id(server: Server) -> None:
    unique = unknown_id()
    for sandbox_id in (f"a.b_c-{unique}", f"{unique}".ljust(76, "z")):
        with about(sandbox_id):
            assert (await server.create(sandbox_id)).sandbox_id == sandbox_id
            await server.call("Status", sandbox_id)


@rule("CREATE-5")
async def options_of_another_kind_are_invalid(server: Server) -> None:
    box = Box(server, FOREVER)
    for options in (
        packed(box.config.owner),  # type: ignore[arg-type]
        any_pb2.Any(type_url=packed(box.config).type_url, value=b"\xff\xff\xff"),
        any_pb2.Any(value=b"nothing says what this is"),
    ):
        with about(options):
            await fails(server.create(box.id, box.owner, options=options), INVALID_ARGUMENT)
            await fails(box.call("Status"), NOT_FOUND)


@rule("CREATE-6")
async def no_process_runs_before_start(server: Server) -> None:
    processes = _processes(server)
    box = await Box(server, FOREVER, FOREVER).create()
    response = await box.call("Status")
    record = await box.record()
    assert response.pid == record.pid == 0
    for each in record.containers:
        assert (each.pid, each.state) == (0, node_pb2.CONTAINER_STATE_WAITING)
    assert _processes(server) == processes


def _processes(server: Server) -> set[str]:
    return {line for line in server.left() if line.startswith("process ")} if server.leftovers else set()


@rule("CREATE-7")
async def what_is_on_the_node_is_created_at_once(server: Server) -> None:
    await Box(server, FOREVER).create()  # its image is there from now on
    box = Box(server, FOREVER)
    await box.ask()
    assert (await box.record()).state == CREATED


@rule("CREATE-8")
async def a_create_does_not_wait_for_an_image(server: Server) -> None:
    box = absent_box(server)
    await box.ask()
    assert (await box.record()).state == PREPARING


@rule("CREATE-8")
async def an_image_is_fetched_without_another_call(server: Server) -> None:
    if server.images.fetched is None:
        raise Inapplicable("no image is known that must be fetched")
    box = Box(server, container(server, image=server.images.fetched()))
    async with server.watching() as changes:
        await box.ask()
        await until(lambda: _states(changes, box), lambda states: states[-1:] == [CREATED])
        assert _states(changes, box)[0] == PREPARING
    assert await box.start() > 0


def _states(changes: list[node_pb2.WatchResponse], box: Box) -> list[int]:
    return [change.sandbox.state for change in changes if change.sandbox.sandbox_id == box.id]


@rule("CREATE-9")
async def an_image_that_cannot_be_had_is_tried_again(server: Server) -> None:
    for number in range(max(1, len(server.images.absent))):
        box = absent_box(server, number)
        with about(box.config.containers[0].image):
            async with server.watching() as changes:
                await box.ask()

                def reasons(of: Box = box, among: list[node_pb2.WatchResponse] = changes) -> list[str]:
                    mine = [change.sandbox for change in among if change.sandbox.sandbox_id == of.id]
                    assert all(record.state == PREPARING for record in mine)
                    return [record.reason for record in mine if record.reason != "PullingImage"]

                # Back-off: the waits are told, and grow.
                await until(reasons, lambda seen: seen.count("ImagePullBackOff") >= 2)
                told = reasons()
                # ErrImagePull may be over by then: nothing is told before the record is on disk.
                assert all(told), told
                assert (await box.record()).containers[0].reason != ""
            await box.shutdown()


@rule("CREATE-9", needs=("registry",))
async def an_image_that_comes_later_is_had(server: Server) -> None:
    assert server.images.awaited is not None
    image, publish = server.images.awaited()
    box = Box(server, container(server, image=image))
    await box.ask()
    await until(box.record, lambda record: record.reason in ("ErrImagePull", "ImagePullBackOff"))
    await asyncio.to_thread(publish)
    record = await box.until(CREATED)
    assert record.reason == ""
    assert record.containers[0].image_id.startswith("sha256:")


@rule("CREATE-11")
async def without_options_there_is_a_sandbox_process_alone(server: Server) -> None:
    sandbox_id = unknown_id()
    await server.create(sandbox_id)
    record = await _record(server, sandbox_id)
    assert (record.state, record.pid, len(record.containers)) == (CREATED, 0, 0)
    pid = (await server.call("Start", sandbox_id)).pid
    assert pid > 0
    assert (await _record(server, sandbox_id)).pid == pid
    await fails(server.call("Wait", sandbox_id, timeout=0.2), *CUT_OFF)
    await server.call("Stop", sandbox_id, timeout_secs=10)
    record = await _record(server, sandbox_id)
    assert (record.state, record.exit.reason) == (EXITED, "Stopped")
    ended = await server.call("Wait", sandbox_id)
    assert ended.exit_status == record.exit.status
    await server.call("Shutdown", sandbox_id)
    await fails(server.call("Status", sandbox_id), NOT_FOUND)


async def _record(server: Server, sandbox_id: str) -> node_pb2.SandboxRecord:
    record = node_pb2.SandboxRecord()
    assert (await server.call("Status", sandbox_id)).extra.Unpack(record)
    return record


@rule("CREATE-12")
async def many_at_once_make_one(server: Server) -> None:
    owner = fresh_owner()
    boxes = [Box(server, FOREVER, owner=owner) for _ in range(MANY)]
    async with server.watching() as changes:
        answers = await asyncio.gather(*(box.ask() for box in boxes))
        assert {answer.sandbox_id for answer in answers} == {owner.sandbox_id}
        await boxes[0].until(CREATED)
        await until(lambda: _states(changes, boxes[0])[-1:] == [CREATED])
        made = {c.sandbox.created_at.ToNanoseconds() for c in changes if c.sandbox.owner.uid == owner.uid}
        assert len(made) == 1
    assert [record.sandbox_id for record in (await server.client.list()).sandboxes].count(
        owner.sandbox_id
    ) == 1
