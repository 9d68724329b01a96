"""What containerd's protocol alone has: a sandbox without options, as containerd makes it, and no call of Node.

The rules are the same ones. These checks of them can be run against any server of the protocol.
"""

from __future__ import annotations

import asyncio

import grpc

from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import CUT_OFF, MOMENT, PATIENCE, Server, alive, code_of, fails, unknown_id
from sandkeeper.wire.times import to_datetime

NOT_FOUND, FAILED_PRECONDITION = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION
READY, NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"
MANY = 20


async def _made(server: Server) -> str:
    """The id of a sandbox that was created."""
    sandbox_id = unknown_id()
    assert (await server.create(sandbox_id)).sandbox_id == sandbox_id
    return sandbox_id


async def _running(server: Server) -> tuple[str, int]:
    """Id and pid of one that runs."""
    sandbox_id = await _made(server)
    return sandbox_id, (await server.call("Start", sandbox_id)).pid


@rule("CREATE-2")
async def a_repeated_plain_create_changes_nothing(server: Server) -> None:
    sandbox_id, pid = await _running(server)
    assert (await server.create(sandbox_id)).sandbox_id == sandbox_id
    answer = await server.call("Status", sandbox_id)
    assert (answer.pid, answer.state) == (pid, READY)


@rule("START-1")
async def a_plain_start_answers_the_pid_and_when_it_was_created(server: Server) -> None:
    sandbox_id = await _made(server)
    answer = await server.call("Start", sandbox_id)
    assert answer.sandbox_id == sandbox_id
    assert answer.pid > 0
    assert to_datetime(answer.created_at) is not None


@rule("START-1", needs=("processes",))
async def a_plain_sandboxs_pid_is_that_of_a_process(server: Server) -> None:
    _, pid = await _running(server)
    assert alive([pid]) == [pid]


@rule("START-2", "START-6")
async def plain_starts_repeated_or_at_once_get_the_same_pid(server: Server) -> None:
    sandbox_id = await _made(server)
    answers = await asyncio.gather(*(server.call("Start", sandbox_id) for _ in range(MANY)))
    pids = {answer.pid for answer in answers}
    assert len(pids) == 1
    assert (await server.call("Start", sandbox_id)).pid in pids


@rule("START-5")
async def a_plain_sandbox_runs_once(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    await server.call("Stop", sandbox_id)
    await fails(server.call("Start", sandbox_id), FAILED_PRECONDITION)


@rule("WAIT-1", "WAIT-3", "WAIT-4")
async def who_waits_for_a_plain_sandbox_waits_for_its_end(server: Server) -> None:
    sandbox_id = await _made(server)
    waiting = [asyncio.create_task(server.call("Wait", sandbox_id)) for _ in range(MANY // 2)]
    await fails(server.call("Wait", sandbox_id, timeout=MOMENT), *CUT_OFF)
    await server.call("Start", sandbox_id)
    waiting += [asyncio.create_task(server.call("Wait", sandbox_id)) for _ in range(MANY // 2)]
    await fails(server.call("Wait", sandbox_id, timeout=MOMENT), *CUT_OFF)
    assert not [each for each in waiting if each.done()]
    await server.call("Stop", sandbox_id)
    async with asyncio.timeout(PATIENCE):
        answers = await asyncio.gather(*waiting)
    ends = {(answer.exit_status, to_datetime(answer.exited_at)) for answer in answers}
    assert len(ends) == 1


@rule("WAIT-2")
async def after_a_plain_sandboxs_end_the_answer_is_always_the_same(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    await server.call("Stop", sandbox_id)
    answers = [await server.call("Wait", sandbox_id) for _ in range(3)]
    assert answers == [answers[0]] * 3
    assert to_datetime(answers[0].exited_at) is not None
    await server.call("Shutdown", sandbox_id)
    await fails(server.call("Wait", sandbox_id), NOT_FOUND)


@rule("WAIT-5")
async def a_shutdown_ends_every_wait_for_a_plain_sandbox(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    waiting = [asyncio.create_task(code_of(server.call("Wait", sandbox_id))) for _ in range(3)]
    await fails(server.call("Wait", sandbox_id, timeout=MOMENT), *CUT_OFF)  # they wait by now
    await server.call("Shutdown", sandbox_id)
    codes = {code for code, _ in await asyncio.gather(*waiting)}
    assert codes == {grpc.StatusCode.OK}


@rule("WAIT-6")
async def a_caller_that_leaves_a_plain_wait_disturbs_nobody(server: Server) -> None:
    sandbox_id, pid = await _running(server)
    staying = asyncio.create_task(server.call("Wait", sandbox_id))
    await fails(server.call("Wait", sandbox_id, timeout=MOMENT), *CUT_OFF)
    answer = await server.call("Status", sandbox_id)
    assert (answer.pid, answer.state) == (pid, READY)
    assert not staying.done()
    await server.call("Stop", sandbox_id)
    await staying


@rule("STATUS-2", "STATUS-3", "STATUS-4")
async def a_plain_status_follows_its_life(server: Server) -> None:
    sandbox_id = await _made(server)
    before = await server.call("Status", sandbox_id)
    assert before.sandbox_id == sandbox_id
    assert (before.state, before.pid, to_datetime(before.exited_at)) == (NOT_READY, 0, None)
    pid = (await server.call("Start", sandbox_id)).pid
    running = await server.call("Status", sandbox_id)
    assert (running.state, running.pid, to_datetime(running.exited_at)) == (READY, pid, None)
    await server.call("Stop", sandbox_id)
    ended = await server.call("Status", sandbox_id)
    assert (ended.state, ended.pid) == (NOT_READY, 0)
    assert to_datetime(ended.exited_at) == to_datetime((await server.call("Wait", sandbox_id)).exited_at)
    created = [to_datetime(each.created_at) for each in (before, running, ended)]
    assert created == [created[0]] * 3
    assert created[0] is not None


@rule("STOP-3")
async def a_repeated_plain_stop_leaves_the_exit_as_it_was(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    await server.call("Stop", sandbox_id)
    first = await server.call("Wait", sandbox_id)
    await server.call("Stop", sandbox_id, timeout_secs=5)
    assert await server.call("Wait", sandbox_id) == first


@rule("STOP-4")
async def a_plain_sandbox_that_never_ran_is_left_alone(server: Server) -> None:
    sandbox_id = await _made(server)
    await server.call("Stop", sandbox_id)
    answer = await server.call("Status", sandbox_id)
    assert (answer.state, answer.pid) == (NOT_READY, 0)


@rule("METRICS-1")
async def plain_metrics_are_of_the_sandbox(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    metrics = (await server.call("Metrics", sandbox_id)).metrics
    assert metrics.id == sandbox_id
    assert to_datetime(metrics.timestamp) is not None


@rule("SHUTDOWN-2")
async def a_repeated_plain_shutdown_finds_nothing(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    await server.call("Shutdown", sandbox_id)
    await fails(server.call("Shutdown", sandbox_id), NOT_FOUND)


@rule("SHUTDOWN-1", "SHUTDOWN-3", needs=("processes",))
async def no_plain_process_outlives_a_shutdown(server: Server) -> None:
    sandbox_id, pid = await _running(server)
    await server.call("Shutdown", sandbox_id)
    assert alive([pid]) == []


@rule("SHUTDOWN-4")
async def a_plain_shutdown_works_in_every_state(server: Server) -> None:
    created = await _made(server)
    running, _ = await _running(server)
    ended, _ = await _running(server)
    await server.call("Stop", ended)
    for sandbox_id in (created, running, ended):
        await server.call("Shutdown", sandbox_id)
        await fails(server.call("Shutdown", sandbox_id), NOT_FOUND)


@rule("SHUTDOWN-5")
async def many_plain_shutdowns_at_once_succeed_or_find_nothing(server: Server) -> None:
    sandbox_id, _ = await _running(server)
    answers = await asyncio.gather(*(code_of(server.call("Shutdown", sandbox_id)) for _ in range(MANY // 2)))
    codes = {code for code, _ in answers}
    assert grpc.StatusCode.OK in codes
    assert codes <= {grpc.StatusCode.OK, NOT_FOUND}
