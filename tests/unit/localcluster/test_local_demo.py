"""The demo states only what holds."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sandkeeper.localcluster.demo import DemoFailed, _end
from sandkeeper.localcluster.watching import Body, Watcher, manifest

EXPECTED = {"exitStatus": 3, "exitReason": "Error"}


class Ended:
    """A watcher whose Sandbox ends as it is told."""

    def __init__(self, ready: str, **status: Any) -> None:
        self._status = {"conditions": [{"type": "Ready", "status": ready}], **status}

    async def create_until_finished(self, body: Body) -> Body:
        return {**body, "status": self._status}


async def end(ended: Ended) -> list[str]:
    said: list[str] = []
    await _end(cast("Watcher", ended), said.append, manifest("exit3"), EXPECTED)
    return said


async def test_what_holds_is_said() -> None:
    assert await end(Ended("False", **EXPECTED)) == [
        "    status.exitStatus   3\n    status.exitReason   Error"
    ]


@pytest.mark.parametrize(
    "ended",
    [
        Ended("False", exitStatus=0, exitReason="Completed"),
        Ended("False", exitReason="Error"),
        Ended("True", **EXPECTED),
    ],
)
async def test_what_does_not_hold_fails(ended: Ended) -> None:
    with pytest.raises(DemoFailed, match="exit3: expected"):
        await end(ended)
