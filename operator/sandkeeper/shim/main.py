"""A shim as a process: from its settings to its end by SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from sandkeeper import logs
from sandkeeper.shim import faults
from sandkeeper.shim.engines.base import Engine, EngineError
from sandkeeper.shim.server import ShimServer
from sandkeeper.shim.settings import ShimSettings

log = logging.getLogger(__name__)


def make_engine(settings: ShimSettings) -> Engine:
    """The engine that the settings name."""
    if settings.engine == "simulated":
        from sandkeeper.shim.engines.simulated import SimulatedEngine

        return SimulatedEngine(settings)
    if settings.engine == "containerd":
        from sandkeeper.shim.engines.containerd import ContainerdEngine

        return ContainerdEngine(settings)
    from sandkeeper.shim.engines.oci import OCIEngine

    return OCIEngine(settings)


def make_server(settings: ShimSettings) -> ShimServer:
    """A shim as the settings want it. Raises ValueError naming a failpoint that cannot be read, OSError."""
    engine = make_engine(settings)
    if not settings.failpoints and settings.effects_file is None:
        return ShimServer(settings, engine)
    effects = faults.effects(settings.failpoints, settings.effects_file)
    log.warning("faults are injected or effects traced: for tests", extra={"failpoints": settings.failpoints})
    records = faults.FaultyRecords(settings.state_dir, effects)
    return ShimServer(settings, faults.FaultyEngine(engine, effects), records)


async def run(settings: ShimSettings) -> None:
    """Serves until SIGTERM or SIGINT. Raises EngineError, OSError, RuntimeError where it cannot start."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    server = make_server(settings)
    try:
        await server.start()
        where = [f"unix:{settings.socket_path}", *([settings.listen] if settings.listen else [])]
        log.info("serving", extra={"node": settings.node_name, "engine": settings.engine, "on": where})
        await _until(asked_to_stop, settings, server)
    finally:
        await server.stop()


async def _until(asked_to_stop: asyncio.Event, settings: ShimSettings, server: ShimServer) -> None:
    """Raises what the shim's part in its cluster ends with: it never should."""
    if settings.certificate == "files" and not settings.register_node:
        await asked_to_stop.wait()
        return
    from sandkeeper.shim import membership  # needs libraries that no other shim does

    tasks = {
        asyncio.create_task(asked_to_stop.wait()),
        asyncio.create_task(membership.run(settings, server.listen)),
    }
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main(settings: ShimSettings) -> None:
    """Set up logging and run: what `sandkeeper shim` does. Exit status 1 with a message where it cannot."""
    # gRPC's fork handlers start threads in whichever thread of ours has forked; it may be one that must not.
    # A child of ours is another program at once, and needs none of them.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    logs.configure(settings.log_format, settings.log_level)
    try:
        asyncio.run(run(settings))
    except BlockingIOError:
        log.error("another shim uses the state directory", extra={"state_dir": str(settings.state_dir)})
        sys.exit(1)
    except (EngineError, OSError, RuntimeError, ValueError) as error:
        log.error("cannot serve", extra={"error": str(error)})
        sys.exit(1)
