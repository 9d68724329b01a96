"""The operator, assembled: its parts, how they know of each other, in which order they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import time
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any

import kopf
from kubernetes.aio import client

from sandkeeper import logs
from sandkeeper.control import app
from sandkeeper.control.events import Recorder
from sandkeeper.control.faults import EFFECTS, TRUST_EFFECTS, FaultyKube, FaultyShim
from sandkeeper.control.garbage import GarbageCollector
from sandkeeper.control.health import Check, HealthServer
from sandkeeper.control.informer import ECHO_LATE, Informer
from sandkeeper.control.kube import Kube, load_configuration
from sandkeeper.control.metrics import Metrics, Snapshot
from sandkeeper.control.nodelink import Timing
from sandkeeper.control.nodes import Nodes
from sandkeeper.control.nodestatus import NodeStatusWriter
from sandkeeper.control.observation import Key
from sandkeeper.control.ports import KubeError, Raw
from sandkeeper.control.queue import Queue
from sandkeeper.control.reconciler import Reconciler
from sandkeeper.control.settings import OperatorSettings
from sandkeeper.control.store import Store
from sandkeeper.control.trust import Trust
from sandkeeper.failpoints import Effects
from sandkeeper.wire.client import ShimClient
from sandkeeper.wire.tls import ClientTLS, TLSFiles

log = logging.getLogger(__name__)

_FIRST_LOOK = 5.0  # for all nodes to be tried once before the first pass
_CANARY = 10.0  # between two proofs that the API server answers
_WATCH_AGAIN = 3.0  # after kopf gave up
_STUCK = 120.0  # a key that waited this long for a pass: the queue does not move


class Operator:
    """One operator in this event loop: `run` until `stop`, or until a part that it needs fails."""

    def __init__(self, settings: OperatorSettings, configuration: client.Configuration) -> None:
        self.settings = settings
        self.metrics = metrics = Metrics()
        self.store = Store()
        self._effects = self._traced(settings)
        options: dict[str, Any] = {
            "observer": metrics,
            "on_object": self._answered,
            "reload": self._load_configuration,
        }
        self.kube = (
            FaultyKube(configuration, effects=self._effects, **options)
            if self._effects
            else Kube(configuration, **options)
        )
        self.trust = Trust(settings, self.kube, metrics) if settings.ca_secret else None
        self.nodes = Nodes(
            connect=self._connect,
            read=self.kube.get_node,
            timing=Timing(relist=settings.relist_interval, unreachable=settings.node_unreachable_after),
            outage_fraction=settings.mass_outage_fraction,
            outage_min_nodes=settings.mass_outage_min_nodes,
            on_records=lambda uids: self.informer.records_changed(uids),
            on_node=self._node_changed,
            on_status=lambda name: self.node_queue.add(name),
            observe=metrics.shim_call,
        )
        self.recorder = Recorder(self.kube, metrics, settings.events)
        self.reconciler = Reconciler(
            self.store,
            self.kube,
            self.nodes,
            self.recorder,
            metrics,
            wake=lambda key: self.queue.add(key),
            aside=lambda key: self.queue.step_aside(key),
            retention_seconds=settings.retention,
            usage_interval=settings.usage_interval,
        )
        self.queue: Queue[Key] = Queue(self._pass, concurrency=settings.concurrency, observer=metrics)
        self.node_status = NodeStatusWriter(self.nodes, self.kube, self.store.count_on)
        self.node_queue: Queue[str] = Queue(self.node_status.write, concurrency=4)
        self.garbage = GarbageCollector(
            self.store,
            self.nodes,
            self.kube,
            metrics,
            min_age=settings.garbage_min_age,
            namespaces=settings.namespaces,
        )
        self.informer = Informer(self.store, self.nodes, self.queue, self.kube, metrics, settings.namespaces)
        metrics.registry.register(Snapshot(self.store.counts(), self.nodes))
        self.http_address: tuple[str, int] | None = None
        self._health = HealthServer(metrics.exposition, self._healthz(), self._readyz())
        self._watching = asyncio.Event()  # kopf's ready flag
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def stop(self) -> None:
        """Ask `run` to end: running passes get the grace that the settings give."""
        self._stop.set()

    async def run(self) -> None:
        """Raises what a part that must never end has ended with; the process is then best started anew."""
        settings = self.settings
        try:
            if settings.http_enabled:
                self.http_address = await self._health.start(settings.http_host, settings.http_port)
                log.info("Serving metrics and health", extra={"address": "{}:{}".format(*self.http_address)})
            self._spawn("events", self.recorder.run())
            if self.trust is not None:
                if not await self._until(self.trust.prepare()):
                    return
                self._spawn("certificates", self.trust.run())
                self._spawn("certificate requests", self.trust.queue.run())
            if not await self._until(self._fill()):
                return
            self._spawn("queue", self.queue.run())
            self._spawn("nodes' statuses", self.node_queue.run())
            self._spawn("resync", self.informer.resync(settings.resync_interval))
            self._spawn("compare", self.informer.compare(settings.list_interval))
            self._spawn("garbage", self._every(settings.garbage_interval, self.garbage.sweep))
            self._spawn("node counts", self._every(30.0, self._count_nodes))
            self._spawn("canary", self._every(_CANARY, self._sing))
            self._spawn("watch", self._watch())
            if not await self._until(self._watching.wait()):
                return
            log.info("Watching", extra={"sandboxes": len(self.store), "nodes": len(self.nodes.links())})
            await self._until()
        finally:
            await self._shut_down()

    # Parts

    async def _pass(self, key: Key) -> float | None:
        with logs.bound(namespace=key.namespace, name=key.name, uid=key.uid):
            return await self.reconciler.reconcile(key)

    def _node_changed(self, name: str) -> None:
        self.informer.node_changed(name)
        self.reconciler.nodes_changed()

    def _answered(self, body: Raw, wrote: bool) -> None:
        self.informer.answered(body, wrote)

    def _connect(self, address: str, server_name: str) -> ShimClient:
        options: dict[str, Any] = {"tls": self._tls(address), "server_name": server_name}
        if self._effects:
            return FaultyShim(address, effects=self._effects, **options)
        return ShimClient(address, **options)

    @staticmethod
    def _traced(settings: OperatorSettings) -> Effects | None:
        """Raises ValueError naming a failpoint that cannot be read, OSError."""
        if not settings.failpoints and settings.effects_file is None:
            return None
        log.warning(
            "faults are injected or effects traced: for tests", extra={"failpoints": settings.failpoints}
        )
        return Effects({**EFFECTS, **TRUST_EFFECTS}, settings.failpoints, settings.effects_file)

    def _tls(self, address: str) -> ClientTLS | None:
        files = self.settings
        if self.trust is not None and not address.startswith("unix:"):
            return ClientTLS(self.trust.authority.tls)
        if address.startswith("unix:") or not (files.tls_ca and files.tls_cert and files.tls_key):
            return None
        return ClientTLS(TLSFiles(ca=files.tls_ca, cert=files.tls_cert, key=files.tls_key))

    async def _load_configuration(self) -> client.Configuration:
        path = self.settings.kubeconfig
        return await load_configuration(str(path) if path else None, self.settings.context)

    async def _log_in(self) -> kopf.ConnectionInfo:
        found = await self._load_configuration()
        auth = (await found.auth_settings()).get("BearerToken", {}).get("value") or ""
        scheme, _, token = auth.partition(" ")
        return kopf.ConnectionInfo(
            server=found.host,
            ca_path=found.ssl_ca_cert,
            insecure=not found.verify_ssl,
            scheme=scheme.capitalize() or None,
            token=token.strip() or None,
            certificate_path=found.cert_file,
            private_key_path=found.key_file,
            proxy_url=found.proxy,
        )

    async def _watch(self) -> None:
        """Keep kopf watching. It gives up on what may pass (a 403 while an API server starts); we do not."""
        while True:
            try:
                await self._run_kopf()
                raise RuntimeError("kopf ended without a word")
            except Exception:
                log.exception("The watch broke; it begins anew")
            self._watching.clear()
            await asyncio.sleep(_WATCH_AGAIN)
            self.informer.compare_soon()

    async def _run_kopf(self) -> None:
        namespaces = self.settings.namespaces
        # For peers, of which we have none. kopf's own guess asks for the user's name, and a Pod's user has none.
        identity: Any = socket.gethostname()
        # Not kopf.operator: at its end it cancels every task in the loop that is younger than itself, ours too.
        tasks = await kopf.spawn_tasks(
            registry=app.registry(
                self.informer, self._log_in, self.trust.event if self.trust is not None else None
            ),
            settings=app.kopf_settings(self.settings),
            clusterwide=not namespaces,
            namespaces=namespaces,
            standalone=True,
            identity=identity,
            ready_flag=self._watching,
        )
        self._take_signals()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _fill(self) -> None:
        """The first picture: objects, then nodes. Waits for an API server that is not there, and says so."""
        delay = 0.5
        while True:
            try:
                await self.informer.fill()
                break
            except KubeError as error:
                log.warning("Waiting for the API server and the CRDs", extra={"error": str(error)})
                await asyncio.sleep(delay)
                delay = min(delay * 2, 10.0)
        await self.nodes.settled(_FIRST_LOOK)

    async def _count_nodes(self) -> None:
        for name in self.nodes.links():
            self.node_queue.add(name)

    async def _sing(self) -> None:
        """Prove that the API server answers, where nothing else has lately; find a watch that is dead."""
        if self.kube.answered_at is None or time.monotonic() - self.kube.answered_at > _CANARY:
            with contextlib.suppress(KubeError):
                await self.kube.nodes()
        if self.informer.watch_lag() > ECHO_LATE:
            log.error(
                "The watch has not shown a write of ours", extra={"seconds": round(self.informer.watch_lag())}
            )
            self.informer.compare_soon()

    async def _every(self, interval: float, work: Any) -> None:
        while True:
            await asyncio.sleep(interval)
            await work()

    # Starting and stopping

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work, name=name))

    async def _until(self, work: Coroutine[Any, Any, Any] | None = None) -> bool:
        """Do `work` (None: nothing, for ever); False where `stop` came first.

        Raises what a part has ended with: none of them ever should.
        """
        stop = asyncio.create_task(self._stop.wait())
        task = asyncio.create_task(work) if work is not None else None
        own = {stop} if task is None else {stop, task}
        try:
            done, _ = await asyncio.wait({*own, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done - own:
                ended.result()
                raise RuntimeError(f"{ended.get_name()} ended")
            if task is not None and task.done():
                task.result()
                return True
            return False
        finally:
            for pending in own:
                pending.cancel()
            await asyncio.gather(*own, return_exceptions=True)

    def _take_signals(self) -> None:
        # kopf takes them for itself, and would cancel running passes two seconds later.
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.stop)

    async def _shut_down(self) -> None:
        log.info("Stopping", extra={"running": self.queue.running})
        if not await self.queue.stop(self.settings.shutdown_grace):
            log.warning(
                "Passes were cut off; the next operator takes them up", extra={"passes": self.queue.running}
            )
        await self.reconciler.close()
        await self.node_queue.stop(1.0)
        if self.trust is not None:
            await self.trust.queue.stop(1.0)
        await self.recorder.drain(1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self.nodes.close(), self._health.close(), return_exceptions=True)
        await self.kube.close()

    # Health

    def _healthz(self) -> dict[str, Check]:
        def queue() -> str | None:
            waited = self.queue.oldest_waiting()
            return f"a key has waited {waited:.0f} s" if waited > _STUCK else None

        def parts() -> str | None:
            ended = [task.get_name() for task in self._tasks if task.done()]
            return f"ended: {', '.join(ended)}" if ended else None

        return {"queue": queue, "parts": parts}

    def _readyz(self) -> dict[str, Check]:
        def watch() -> str | None:
            if not self._watching.is_set():
                return "not watching yet"
            lag = self.informer.watch_lag()
            return f"has not shown a write of {lag:.0f} s ago" if lag > ECHO_LATE else None

        def api() -> str | None:
            answered = self.kube.answered_at
            if answered is None:
                return "never answered"
            age = time.monotonic() - answered
            return f"last answered {age:.0f} s ago" if age > 3 * _CANARY else None

        def relists() -> str | None:
            if self.nodes.mass_outage:
                return "most nodes are unreachable"
            return None

        return {"watch": watch, "api": api, "nodes": relists}


async def run(settings: OperatorSettings) -> None:
    """Run an operator until SIGTERM or SIGINT. Raises what made it end otherwise."""
    path = settings.kubeconfig
    operator = Operator(settings, await load_configuration(str(path) if path else None, settings.context))
    operator._take_signals()
    began = datetime.now(UTC)
    try:
        await operator.run()
    finally:
        log.info("Stopped", extra={"ran": str(datetime.now(UTC) - began)})


def main(settings: OperatorSettings) -> None:
    """Set up logging and run: what `sandkeeper operator` does."""
    logs.configure(settings.log_format, settings.log_level)
    # The cache is very many objects that live long; at the defaults the search for cycles takes a twelfth of the
    # CPU. What is imported by now stays for good.
    gc.set_threshold(10_000, 20, 20)
    gc.freeze()
    asyncio.run(run(settings))
