"""What a shim in a cluster does beside its work: it gets its certificate, then listens, then registers its node."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sandkeeper.shim.certificate import NodeCertificate
from sandkeeper.shim.kubeapi import KubeApi
from sandkeeper.shim.registration import Registration
from sandkeeper.shim.settings import ShimSettings


async def run(settings: ShimSettings, listen: Callable[[], Awaitable[int]]) -> None:
    """For ever. listen: opens the shim's port and returns its number, once there is a certificate.

    Raises what `listen` raises.
    """
    api = KubeApi(settings.kubernetes)
    tasks: list[asyncio.Task[None]] = []
    try:
        if settings.certificate == "request":
            certificate = NodeCertificate(settings, api)
            tasks.append(asyncio.create_task(certificate.run(), name="certificate"))
            await certificate.ready.wait()
        port = await listen()
        if settings.register_node:
            tasks.append(asyncio.create_task(Registration(settings, api, port).run(), name="registration"))
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
