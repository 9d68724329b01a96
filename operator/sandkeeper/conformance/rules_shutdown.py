"""Shutdown."""

from __future__ import annotations

import asyncio
import functools

import grpc

from sandkeeper.conformance.box import DEAF, FOREVER, OBEDIENT, Box, box_in, container, state_name, states
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import CUT_OFF, MOMENT, Server, about, alive, code_of, fails, until
from sandkeeper.wire import node_pb2

NOT_FOUND = grpc.StatusCode.NOT_FOUND

MANY = 10


@rule("SHUTDOWN-1", "SHUTDOWN-4", needs=("leaks",))
async def nothing_is_left_from_whatever_state(server: Server) -> None:
    before = server.left()
    for state in await states(server):
        with about(state_name(state)):
            box = await box_in(server, state)
            await box.shutdown()
            assert server.left() == before
            assert box.id not in await server.ids()


@rule("SHUTDOWN-1", needs=("leaks",))
async def nothing_is_left_of_several_containers_and_volumes(server: Server) -> None:
    before = server.left()
    mounts = [node_pb2.VolumeMount(name=name, mount_path=f"/{name}") for name in ("disk", "memory")]
    box = Box(
        server,
        *(container(server, FOREVER, name=f"c{number}", volume_mounts=mounts) for number in range(3)),
        volumes=[node_pb2.Volume(name="disk"), node_pb2.Volume(name="memory", memory=True)],
    )
    await box.run()
    assert server.left() > before  # or nothing would be found at all
    await box.shutdown()
    assert server.left() == before


@rule("SHUTDOWN-1", needs=("processes",))
async def no_process_outlives_it(server: Server) -> None:
    box = Box(server, FOREVER, DEAF)
    pids = [await box.run(), *(each.pid for each in (await box.record()).containers)]
    await box.shutdown()
    assert alive(pids) == []


@rule("SHUTDOWN-2")
async def a_repeated_shutdown_finds_nothing(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()
    await box.shutdown()
    await fails(box.call("Shutdown"), NOT_FOUND)


@rule("SHUTDOWN-3")
async def what_runs_is_stopped_with_its_grace_period(server: Server) -> None:
    for script, grace, status in ((OBEDIENT, 20, 7), (DEAF, 1, 137), (OBEDIENT, 0, 137)):
        with about(f"{script}, {grace} s"):
            box = Box(server, script, termination_grace_period_seconds=grace)
            await box.run()
            await box.trapping()
            waiting = asyncio.create_task(box.wait())
            if server.has_node:
                async with server.watching() as changes:
                    await box.shutdown()
                    await until(functools.partial(_removed, changes))
                ended = [change.sandbox.exit for change in changes if change.sandbox.HasField("exit")]
                assert (ended[-1].status, ended[-1].reason) == (status, "Stopped")
            else:
                await fails(box.call("Wait", timeout=MOMENT), *CUT_OFF)  # both wait by now
                await box.shutdown()
            assert (await waiting)[0] == status


def _removed(changes: list[node_pb2.WatchResponse]) -> bool:
    return bool(changes) and changes[-1].removed


@rule("SHUTDOWN-5")
async def many_at_once_succeed_or_find_nothing(server: Server) -> None:
    box = Box(server, FOREVER)
    await box.run()

    answers = await asyncio.gather(*(code_of(box.call("Shutdown")) for _ in range(MANY)))
    codes = {code for code, _ in answers}
    assert grpc.StatusCode.OK in codes
    assert codes <= {grpc.StatusCode.OK, NOT_FOUND}
    await fails(box.call("Status"), NOT_FOUND)
