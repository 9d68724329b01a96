"""/metrics, /healthz and /readyz over HTTP. The health answers name every check, so that one sees why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

# A check returns None while all is well, else what is wrong.
Check = Callable[[], str | None]


class HealthServer:
    """Serves until `close`. `healthz` fails: restart me. `readyz` fails: my picture of the world is old."""

    def __init__(
        self,
        metrics: Callable[[], bytes],
        healthz: Mapping[str, Check],
        readyz: Mapping[str, Check],
    ) -> None:
        self._metrics = metrics
        self._healthz = healthz
        self._readyz = readyz
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; returns the address and port that it really listens on. Raises OSError."""
        app = web.Application()
        app.router.add_get("/metrics", self._serve_metrics)
        app.router.add_get("/healthz", self._serve_healthz)
        app.router.add_get("/readyz", self._serve_readyz)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        self._runner = runner
        await web.TCPSite(runner, host, port).start()
        address: Any = runner.addresses[0]
        return str(address[0]), int(address[1])

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _serve_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _serve_healthz(self, request: web.Request) -> web.Response:
        return _answer(self._healthz)

    async def _serve_readyz(self, request: web.Request) -> web.Response:
        return _answer({**self._healthz, **self._readyz})


def _answer(checks: Mapping[str, Check]) -> web.Response:
    found = {name: check() for name, check in checks.items()}
    lines = [f"[+] {name}: ok" if wrong is None else f"[-] {name}: {wrong}" for name, wrong in found.items()]
    healthy = all(wrong is None for wrong in found.values())
    return web.Response(text="\n".join(lines) + "\n", status=200 if healthy else 503)
