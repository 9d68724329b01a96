"""Applies Sandboxes and watches them: what a user of the API sees, and when."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

RESOURCE = "/apis/sandkeeper.dev/v1alpha1/namespaces/{namespace}/sandboxes"


def manifest(name: str, *, command: list[str] | None = None, image: str = "busybox:1.37", **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": image, "command": command or ["sleep", "1000"]}
    return {
        "apiVersion": "sandkeeper.dev/v1alpha1",
        "kind": "Sandbox",
        "metadata": {"name": name},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 0, **spec},
    }


def condition(body: dict[str, Any], kind: str) -> str:
    conditions = body.get("status", {}).get("conditions", [])
    return next((item["status"] for item in conditions if item["type"] == kind), "")


class Watcher:
    """One connection that writes and one that watches, on one clock (`time.perf_counter`)."""

    def __init__(self, session: aiohttp.ClientSession, server: str, namespace: str) -> None:
        self._session = session
        self._url = server + RESOURCE.format(namespace=namespace)
        self.seen: dict[str, dict[str, Any]] = {}
        self.writes: dict[str, int] = {}
        self._waiting: dict[str, list[tuple[Callable[[dict[str, Any] | None], bool], asyncio.Future[float]]]] = {}

    async def follow(self, started: asyncio.Event) -> None:
        async with self._session.get(self._url) as answer:
            version = (await answer.json())["metadata"]["resourceVersion"]
        query = {"watch": "1", "resourceVersion": version}
        async with self._session.get(self._url, params=query, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            started.set()
            buffer = b""
            async for chunk in answer.content.iter_any():
                now = time.perf_counter()
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    self._note(json.loads(line), now)

    def _note(self, event: dict[str, Any], now: float) -> None:
        body = event["object"]
        name = body["metadata"]["name"]
        gone = event["type"] == "DELETED"
        self.writes[name] = self.writes.get(name, 0) + 1
        if gone:
            self.seen.pop(name, None)
        else:
            self.seen[name] = body
        still = []
        for wanted, future in self._waiting.pop(name, []):
            if future.done():
                continue
            if wanted(None if gone else body):
                future.set_result(now)
            else:
                still.append((wanted, future))
        if still:
            self._waiting[name] = still

    def when(self, name: str, wanted: Callable[[dict[str, Any] | None], bool]) -> asyncio.Future[float]:
        """The moment at which the watch first shows what is wanted (None: the object is gone)."""
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append((wanted, future))
        return future

    async def create(self, body: dict[str, Any]) -> None:
        async with self._session.post(self._url, json=body) as answer:
            if answer.status >= 300:
                raise RuntimeError(await answer.text())
            await answer.read()

    async def delete(self, name: str) -> None:
        async with self._session.delete(f"{self._url}/{name}") as answer:
            await answer.read()

    async def apply_until_ready(self, body: dict[str, Any], *, timeout: float = 60) -> float:
        """Seconds from the request to the moment at which the watch shows Ready=True."""
        ready = self.when(body["metadata"]["name"], lambda seen: seen is not None and condition(seen, "Ready") == "True")
        began = time.perf_counter()
        await self.create(body)
        async with asyncio.timeout(timeout):
            return await ready - began

    async def delete_until_gone(self, name: str, *, timeout: float = 60) -> float:
        gone = self.when(name, lambda seen: seen is None)
        began = time.perf_counter()
        await self.delete(name)
        async with asyncio.timeout(timeout):
            return await gone - began


@asynccontextmanager
async def watching(kubeconfig: Path, namespace: str) -> AsyncIterator[Watcher]:
    """A Watcher on the cluster of `kubeconfig` (client certificate and CA by file or inline data)."""
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cafile=cluster["certificate-authority"])
    context.load_cert_chain(user["client-certificate"], user["client-key"])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context, limit=0)) as session:
        watcher = Watcher(session, cluster["server"], namespace)
        started = asyncio.Event()
        task = asyncio.create_task(watcher.follow(started))
        try:
            await asyncio.wait_for(started.wait(), 30)
            yield watcher
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
