"""The API server as a shim in a Pod uses it: a few requests a minute, by its ServiceAccount's token.

Made of the standard library: the operator's client would cost each node 19 MiB for that.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import ssl
from typing import Any
from urllib.parse import urlsplit

from sandkeeper.shim.settings import KubernetesSettings

Raw = dict[str, Any]
APPLY = "application/apply-patch+yaml"
"""Server-side apply."""
_TIMEOUT = 15.0
_LONGEST = 16 * 1024 * 1024


class KubeError(Exception):
    """The API server did not answer (code 0) or refused; the message is what it said."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class KubeApi:
    """One connection per request: they are minutes apart. The token is read each time, as kubelet replaces it."""

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings

    async def get(self, path: str) -> Raw:
        """Raises KubeError, as all of these do."""
        return await self._call("GET", path)

    async def create(self, path: str, body: Raw) -> Raw:
        return await self._call("POST", path, body)

    async def apply(self, path: str, body: Raw) -> Raw:
        return await self._call("PATCH", path, body, APPLY)

    async def _call(
        self, verb: str, path: str, body: Raw | None = None, kind: str = "application/json"
    ) -> Raw:
        return await asyncio.to_thread(self._blocking, verb, path, body, kind)

    def _blocking(self, verb: str, path: str, body: Raw | None, kind: str) -> Raw:
        what = f"{verb} {path.partition('?')[0]}"
        try:
            status, data = self._exchange(verb, path, body, kind)
            answer = json.loads(data) if data else {}
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise KubeError(f"{what}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, dict):
            raise KubeError(f"{what}: {status}: the answer is no object")
        if not 200 <= status < 300:
            raise KubeError(f"{what}: {status}: {answer.get('message', '')}", status)
        return answer

    def _exchange(self, verb: str, path: str, body: Raw | None, kind: str) -> tuple[int, bytes]:
        token = self._settings.token_file.read_text().strip()
        host, port = self._address()
        trust = ssl.create_default_context(cafile=str(self._settings.ca_file))
        connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=trust)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": kind, "Accept": "application/json"}
        try:
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_LONGEST)
        finally:
            connection.close()

    def _address(self) -> tuple[str, int]:
        if self._settings.server:
            parts = urlsplit(self._settings.server)
            return parts.hostname or "", parts.port or 443
        host = os.environ.get("KUBERNETES_SERVICE_HOST", "")
        if not host:
            raise ValueError("no API server: set kubernetes.server, or run in a Pod")
        return host, int(os.environ.get("KUBERNETES_SERVICE_PORT", "443"))
