"""What is checked here: a shim with each engine, and one behind a real containerd."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping

from tests.conformance.shims import ENGINES, IMAGE, OF_ITS_OWN, Shims, shims
from tests.containerds import containerd

from sandkeeper.conformance.address import Address, Found, target
from sandkeeper.conformance.registry import Ability, Check
from sandkeeper.conformance.server import Containerd, Server, namespaces

SANDBOXER = "sandkeeper"
NAMESPACE = "conformance"


class EngineTarget:
    """A shim with one engine, of which all is known and which may be killed."""

    def __init__(self, made: Shims, engine: str) -> None:
        self._made, self._engine = made, engine

    @property
    def abilities(self) -> frozenset[Ability]:
        return ENGINES[self._engine]

    @property
    def withheld(self) -> Mapping[str, str]:
        return {}

    async def server(self, check: Check) -> Server:
        return await self._made.server(own=bool(check.needs & OF_ITS_OWN))


@contextlib.contextmanager
def through_containerd(made: Shims, server: Server) -> Iterator[Address]:
    """A containerd with a shim as its sandboxer, and how to call the one through the other."""
    assert server.socket is not None
    with containerd(sandboxers={SANDBOXER: server.socket}) as it:
        yield Address(f"unix:{it.socket}", between=Containerd(NAMESPACE, SANDBOXER))
        assert not {*namespaces(NAMESPACE)} & {*it.ctr("namespaces", "list", "--quiet").split()}
    assert not made.files()


@contextlib.asynccontextmanager
async def containerd_target(engine: str) -> AsyncIterator[Found]:
    """A shim with this engine behind a containerd."""
    with shims(engine) as made, through_containerd(made, await made.server(own=False)) as at:
        async with target(at, IMAGE) as found:
            yield found
