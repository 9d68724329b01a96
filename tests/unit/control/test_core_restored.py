"""An object made from a backup: what came along of its former life says nothing of this one."""

from __future__ import annotations

import json

from tests.unit.control.fakes import World

from sandkeeper.api import ASSIGNMENT_ANNOTATION, FINALIZER


async def test_a_restored_status_of_another_object_is_not_the_end_of_this_one() -> None:
    world = World()
    former = world.kube.create()
    await world.settle(former)
    world.shim.exit(f"{former.uid}-1", 3)
    await world.settle(former)
    backup = world.kube.of(former)
    world.kube.mark_deleted(former)
    await world.settle(former)
    annotations = {ASSIGNMENT_ANNOTATION: json.dumps({"uid": former.uid, "node": "n1", "instance": 1})}
    key = world.kube.create(annotations=annotations, finalizers=[FINALIZER])
    world.kube.of(key)["status"] = backup["status"]
    await world.settle(key)
    assert world.condition(key, "Ready") == ("True", "Running")
    assert world.status(key)["sandboxID"] == f"{key.uid}-1"
    assert "exitStatus" not in world.status(key)
