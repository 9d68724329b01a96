"""Where kopf is wired: it lists and watches, and its handlers only pass the news on.

Nothing here is done *because of* an event: the queue makes a pass look at the world. kopf writes nothing at
all: with `on.event` alone it needs no finalizer, annotation or status of its own (docs/decisions/0004).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import kopf

from sandkeeper.api import GROUP, SANDBOX_NODES, SANDBOXES, VERSION
from sandkeeper.control.informer import Informer
from sandkeeper.control.ports import Raw
from sandkeeper.control.settings import OperatorSettings


class _NoDiffBase(kopf.DiffBaseStorage):
    """kopf compares every event with what it stored; nobody here asks, so nothing is copied for it."""

    def build(self, *, body: kopf.Body, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("kopf must not write")


def registry(
    informer: Informer,
    login: Callable[[], Awaitable[kopf.ConnectionInfo]],
    certificate_request: Callable[[Raw], None] | None = None,
) -> kopf.OperatorRegistry:
    """All handlers. They return at once: kopf handles the events of one object one after another."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login()

    @kopf.on.event(GROUP, VERSION, SANDBOXES, registry=handlers)
    async def sandbox(event: kopf.RawEvent, **_: Any) -> None:
        informer.sandbox_event(event["type"], dict(event["object"]))

    @kopf.on.event(GROUP, VERSION, SANDBOX_NODES, registry=handlers)
    async def node(event: kopf.RawEvent, **_: Any) -> None:
        informer.node_event(event["type"], dict(event["object"]))

    if certificate_request is not None:  # where the operator signs certificates

        @kopf.on.event("certificates.k8s.io", "v1", "certificatesigningrequests", registry=handlers)
        async def request(event: kopf.RawEvent, **_: Any) -> None:
            certificate_request(dict(event["object"]))

    return handlers


def kopf_settings(settings: OperatorSettings) -> kopf.OperatorSettings:
    """kopf's settings, each for a reason in docs/decisions/0004."""
    chosen = kopf.OperatorSettings()
    chosen.process.ultimate_exiting_timeout = None
    chosen.peering.standalone = True
    chosen.posting.enabled = False
    chosen.scanning.disabled = True
    chosen.networking.request_timeout = 15
    # Half an hour: an API server that is being restarted is met soon, and answers 5xx for a while.
    chosen.networking.error_backoffs = (0.5, 1.0, 2.0, *(3.0,) * 600)
    chosen.watching.chunk_size = 500
    chosen.watching.server_timeout = 300
    chosen.watching.client_timeout = 330
    chosen.queueing.idle_timeout = 1.0
    chosen.queueing.exit_timeout = max(2.0, settings.shutdown_grace)
    chosen.persistence.diffbase_storage = _NoDiffBase()
    return chosen
