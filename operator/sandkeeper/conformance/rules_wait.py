"""Wait."""

from __future__ import annotations

import asyncio
import contextlib

import grpc

from sandkeeper.conformance.box import EXITED, FAILED, FOREVER, RUNNING, Box, failing_box
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import CUT_OFF, MOMENT, PATIENCE, Server, fails
from sandkeeper.wire import node_pb2

NOT_FOUND = grpc.StatusCode.NOT_FOUND

MANY = 20


@rule("WAIT-1")
async def a_wait_answers_at_the_end_with_status_and_time(server: Server) -> None:
    box = Box(server, FOREVER, "exit 3")
    await box.run()
    # One container goes on: the sandbox has not ended.
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)
    waiting = asyncio.create_task(box.call("Wait"))
    record = await box.stop()
    answer = await waiting
    assert answer.exit_status == record.exit.status
    assert answer.exited_at == record.exit.exited_at
    assert answer.exited_at.ToNanoseconds() >= record.created_at.ToNanoseconds() > 0


@rule("WAIT-2")
async def after_the_end_the_answer_is_always_the_same(server: Server) -> None:
    box = Box(server, "exit 3")
    await box.run()
    first = await box.call("Wait")
    await box.call("Stop")
    assert [await box.call("Wait") for _ in range(3)] == [first] * 3
    await box.shutdown()
    await fails(box.call("Wait"), NOT_FOUND)


@rule("WAIT-3")
async def many_who_wait_get_the_same_answer(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    waiting = [asyncio.create_task(box.call("Wait")) for _ in range(MANY)]
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)  # they wait by now
    await box.stop()
    answers = await asyncio.gather(*waiting)
    assert answers == [answers[0]] * MANY


@rule("WAIT-4")
async def before_start_it_waits(server: Server) -> None:
    box = await Box(server, "exit 5").create()
    waiting = asyncio.create_task(box.call("Wait"))
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)
    assert not waiting.done()
    await box.start()
    assert (await waiting).exit_status == 5


@rule("WAIT-5")
async def a_shutdown_answers_who_waits_for_what_ran(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    waiting = [asyncio.create_task(box.call("Wait")) for _ in range(3)]
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)  # they wait by now
    await box.shutdown()
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*waiting)
    assert {answer.exit_status for answer in answers} == {137}


@rule("WAIT-5")
async def a_shutdown_ends_a_wait_for_what_never_ran(server: Server) -> None:
    box = await Box(server, FOREVER).create()
    waiting = asyncio.create_task(box.call("Wait"))
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)  # it waits by now
    await box.shutdown()
    await fails(waiting, NOT_FOUND)


@rule("WAIT-6")
async def a_caller_that_leaves_disturbs_nobody(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    staying = asyncio.create_task(box.call("Wait"))
    leaving = asyncio.create_task(box.call("Wait"))
    await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    assert (await box.record()).state == RUNNING
    assert not staying.done()
    record = await box.stop()
    assert (await staying).exit_status == record.exit.status


@rule("WAIT-7")
async def the_status_is_the_exit_code(server: Server) -> None:
    for code in (0, 1, 77):
        box = Box(server, f"exit {code}")
        await box.run()
        assert (await box.wait())[0] == code


@rule("WAIT-7")
async def the_status_is_128_and_the_signal(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    record = await box.stop(0)
    assert (await box.wait())[0] == 128 + 9
    assert (record.exit.status, record.exit.signal) == (128 + 9, 9)


@rule("WAIT-8")
async def the_first_to_fail_decides(server: Server) -> None:
    box = Box(server, "sleep 0.4; exit 4", "exit 0", "sleep 0.1; exit 5")
    record = await box.finish()
    failed = [each.exit for each in record.containers if each.exit.status]
    first = min(failed, key=lambda ended: ended.exited_at.ToNanoseconds())
    assert len(failed) == 2
    assert (await box.wait())[0] == first.status == record.exit.status


@rule("WAIT-8")
async def where_none_fails_the_first_in_the_list_decides(server: Server) -> None:
    box = Box(server, "sleep 0.2", "exit 0")
    record = await box.finish()
    assert (await box.wait())[0] == 0
    assert (record.exit.status, record.exit.reason) == (0, "Completed")
    assert record.state == EXITED
    assert all(each.state == node_pb2.CONTAINER_STATE_EXITED for each in record.containers)


@rule("WAIT-9")
async def what_failed_has_no_exit_to_wait_for(server: Server) -> None:
    box = failing_box(server)
    waiting = asyncio.create_task(_wait(box))
    await fails(waiting, grpc.StatusCode.FAILED_PRECONDITION)
    await box.until(FAILED)
    await fails(box.call("Wait"), grpc.StatusCode.FAILED_PRECONDITION)


async def _wait(box: Box) -> object:
    await box.ask()
    return await box.call("Wait")
