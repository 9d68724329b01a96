"""Create, of what can never run or finds no room."""

from __future__ import annotations

from typing import Any

import grpc

from sandkeeper.conformance.box import CREATED, FAILED, FOREVER, Box, container, failing_box
from sandkeeper.conformance.observed import Inapplicable
from sandkeeper.conformance.registry import rule
from sandkeeper.conformance.server import Server, about, code_of, fails, until
from sandkeeper.wire import node_pb2

INVALID_ARGUMENT, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND

MUCH = 100
"""Sandboxes: nobody waits until more have been made."""


@rule("CREATE-10")
async def what_can_never_run_is_invalid_or_fails(server: Server) -> None:
    twice = [node_pb2.Volume(name="data"), node_pb2.Volume(name="data")]
    cases: list[tuple[str, Box]] = [
        ("runtime", Box(server, FOREVER, runtime="no-such-runtime")),
        ("containers", Box(server, *("exit 0" for _ in range(100)))),
        ("name", Box(server, container(server, name="a/b"))),
        ("name", Box(server, container(server), container(server))),
        ("volumes", Box(server, FOREVER, volumes=twice)),
        ("image", Box(server, container(server, image=""))),
        ("image", Box(server, container(server, image="an invalid image"))),
        ("image", failing_box(server)),
    ]
    if not await server.offers("HostNetwork"):
        cases.append(("network", Box(server, FOREVER, network=node_pb2.NETWORK_HOST)))
    for field, box in cases:
        await _never_runs(field, box)


@rule("CREATE-10", needs=("processes",))
async def what_no_process_can_be_made_of_is_invalid_or_fails(server: Server) -> None:
    def mounted(*mounts: node_pb2.VolumeMount) -> Box:
        return Box(
            server,
            container(server, volume_mounts=mounts),
            volumes=[node_pb2.Volume(name="data")],
        )

    def secured(**fields: Any) -> Box:
        return Box(server, container(server, security_context=node_pb2.SecurityContext(**fields)))

    mount = node_pb2.VolumeMount
    for field, box in (
        ("volumeMounts", mounted(mount(name="nothing", mount_path="/data"))),
        ("mountPath", mounted(mount(name="data", mount_path="data"))),
        ("mountPath", mounted(mount(name="data", mount_path="/"))),
        ("mountPath", mounted(mount(name="data", mount_path="/proc/self"))),
        ("mountPath", mounted(mount(name="data", mount_path="/a"), mount(name="data", mount_path="/a"))),
        ("subPath", mounted(mount(name="data", mount_path="/data", sub_path="../.."))),
        ("workingDir", Box(server, container(server, working_dir="tmp"))),
        ("workingDir", Box(server, container(server, working_dir="/proc/self/fd/7"))),
        ("env", Box(server, container(server, env=[node_pb2.EnvVar(name="A=B")]))),
        ("runAsNonRoot", secured(run_as_non_root=True)),
        ("capabilities", secured(capabilities_add=["SYS_ADMIN"])),
        ("capabilities", secured(capabilities_add=["NO_SUCH_CAPABILITY"])),
    ):
        await _never_runs(field, box)


async def _never_runs(field: str, box: Box) -> None:
    """Refused, or FAILED with a reason; either way the field is named."""
    with about(f"{field}: {box.config}"):
        code, message = await code_of(box.ask())
        if code == grpc.StatusCode.OK:
            record = await box.until(FAILED, CREATED)
            assert record.state == FAILED
            assert record.reason
            message = record.message
            await box.shutdown()
        else:
            assert code == INVALID_ARGUMENT, f"{code.name}: {message}"
            await fails(box.call("Status"), NOT_FOUND)
        assert field.lower() in message.lower().replace("_", ""), f"the message names no {field}: {message}"


@rule("CREATE-13", needs=("restart",))
async def a_full_node_takes_no_more(server: Server) -> None:
    room = (await server.client.info()).allocatable.sandboxes
    if room > MUCH:
        raise Inapplicable(f"it has room for {room}")
    boxes = [Box(server, FOREVER) for _ in range(room)]
    for box in boxes:
        await box.create()
    one_more = Box(server, FOREVER)
    await fails(one_more.ask(), grpc.StatusCode.RESOURCE_EXHAUSTED)
    await fails(one_more.call("Status"), NOT_FOUND)
    await boxes[0].ask()  # what is there already is no more
    await boxes[0].shutdown()
    await until(server.ids, lambda ids: len(ids) < room)
    await one_more.create()
