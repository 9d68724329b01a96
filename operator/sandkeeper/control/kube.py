"""The API server, as the operator uses it: a dozen requests over the official client's aiohttp transport.

`kubernetes.aio` brings the configuration (kubeconfig, exec plugins, service account), TLS and connections;
the requests are made by path, with plain dictionaries, because its generated methods cost about a
millisecond more per call and make classes of objects that nobody here needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio import client
from kubernetes.aio import config as kube_config

from sandkeeper import __version__
from sandkeeper.api import GROUP, VERSION
from sandkeeper.control.ports import Conflict, Gone, KubeError, Raw, Rejected

_MERGE_PATCH = "application/merge-patch+json"
_TIMEOUT = aiohttp.ClientTimeout(total=15, sock_connect=5)
_LONGEST_WAIT = 30.0  # that an API server may ask for
_ROOT = f"/apis/{GROUP}/{VERSION}"
_REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_TOKEN_FILE = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path


class Throttled(KubeError):
    """HTTP 429: the API server asks to wait `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(KubeError):
    """The API server did not answer, or answered 5xx: the request may or may not have had its effect."""


class RequestObserver(Protocol):
    """Told of every request."""

    def api_request(self, verb: str, resource: str, code: str, seconds: float) -> None: ...


async def load_configuration(
    kubeconfig: str | None = None, context: str | None = None
) -> client.Configuration:
    """Where the API server is and who we are; also what kopf's login is made from.

    In the order of other controllers: the named kubeconfig, $KUBECONFIG, the Pod's service account,
    ~/.kube/config. Raises kubernetes.aio.config.ConfigException where none of them serves.
    """
    configuration = client.Configuration()
    named = kubeconfig or context or os.environ.get("KUBECONFIG")
    config: Any = kube_config  # untyped functions
    if not named and os.environ.get("KUBERNETES_SERVICE_HOST") and os.path.exists(_TOKEN_FILE):  # noqa: PTH110, ASYNC240
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(
            config_file=kubeconfig, context=context, client_configuration=configuration
        )
    # aiohttp would look into the environment and ~/.netrc, in a thread, for every request.
    configuration.proxy = configuration.proxy or _environment_proxy(configuration.host)
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration


def _environment_proxy(url: str) -> str | None:
    """What HTTPS_PROXY and NO_PROXY say of an address."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


class Kube:
    """Requests to the API server. Implements ports.KubePort.

    Every method is one request (a list: one per page) and raises ports.Conflict, Gone, Rejected or another
    KubeError. `on_object(body, wrote)` gets every Sandbox that a read or write of a single one answers with.
    """

    def __init__(
        self,
        configuration: client.Configuration,
        *,
        observer: RequestObserver | None = None,
        on_object: Callable[[Raw, bool], object] | None = None,
        reload: Callable[[], Any] | None = None,
    ) -> None:
        self._api: Any = client.ApiClient(configuration)
        self._observer = observer
        self._on_object = on_object
        self._reload = reload
        self._reloading = asyncio.Lock()
        # When the API server last answered anything at all: what readiness is told from.
        self.answered_at: float | None = None
        # Until when it asked to be left alone; by the clock of time.monotonic.
        self._not_before = 0.0

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    # Sandboxes

    async def get(self, namespace: str, name: str) -> Raw:
        """A live read of a Sandbox."""
        return self._seen(await self._call("GET", _sandbox(namespace, name), "sandboxes"), wrote=False)

    async def patch_metadata(self, namespace: str, name: str, body: Raw) -> Raw:
        """Merge patch of a Sandbox; `body.metadata` carries uid and resourceVersion."""
        return self._seen(await self._call("PATCH", _sandbox(namespace, name), "sandboxes", body), wrote=True)

    async def patch_status(self, namespace: str, name: str, body: Raw) -> Raw:
        """Merge patch of a Sandbox's status; a key that is to go must be there as null (RFC 7396)."""
        path = _sandbox(namespace, name) + "/status"
        return self._seen(await self._call("PATCH", path, "sandboxes/status", body), wrote=True)

    async def delete(self, namespace: str, name: str, *, uid: str) -> None:
        """Delete a Sandbox, if it is still the one with this UID; Conflict if it is not."""
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        await self._call("DELETE", _sandbox(namespace, name), "sandboxes", body)

    async def sandboxes(self, namespace: str | None = None, *, limit: int = 500) -> AsyncIterator[Raw]:
        """Every Sandbox of a namespace, or of the cluster, page by page."""
        path = f"{_ROOT}/namespaces/{quote(namespace)}/sandboxes" if namespace else f"{_ROOT}/sandboxes"
        async for item in self._list(path, "sandboxes", limit):
            yield item

    # SandboxNodes

    async def get_node(self, name: str) -> Raw:
        """A live read of a SandboxNode."""
        return await self._call("GET", f"{_ROOT}/sandboxnodes/{quote(name, safe='')}", "sandboxnodes")

    async def nodes(self) -> list[Raw]:
        """Every SandboxNode."""
        return [item async for item in self._list(f"{_ROOT}/sandboxnodes", "sandboxnodes", 500)]

    async def patch_node_status(self, name: str, body: Raw) -> Raw:
        """Merge patch of a SandboxNode's status."""
        path = f"{_ROOT}/sandboxnodes/{quote(name, safe='')}/status"
        return await self._call("PATCH", path, "sandboxnodes/status", body)

    # Certificates

    async def get_secret(self, namespace: str, name: str) -> Raw:
        """A live read of a Secret."""
        return await self._call("GET", _namespaced(namespace, "secrets", name), "secrets")

    async def create_secret(self, namespace: str, body: Raw) -> Raw:
        """Create a Secret; Conflict if there is one of its name."""
        return await self._call("POST", _namespaced(namespace, "secrets"), "secrets", body)

    async def get_config_map(self, namespace: str, name: str) -> Raw:
        """A live read of a ConfigMap."""
        return await self._call("GET", _namespaced(namespace, "configmaps", name), "configmaps")

    async def patch_config_map(self, namespace: str, name: str, body: Raw) -> Raw:
        """Merge patch of a ConfigMap."""
        return await self._call("PATCH", _namespaced(namespace, "configmaps", name), "configmaps", body)

    async def requests(self, signer: str) -> list[Raw]:
        """Every CertificateSigningRequest of a signer."""
        path = f"{_REQUESTS}?{urlencode({'fieldSelector': f'spec.signerName={signer}'})}"
        return (await self._call("GET", path, "certificatesigningrequests")).get("items") or []

    async def get_request(self, name: str) -> Raw:
        """A live read of a CertificateSigningRequest."""
        return await self._call("GET", f"{_REQUESTS}/{quote(name, safe='')}", "certificatesigningrequests")

    async def put_request(self, name: str, part: str, body: Raw) -> Raw:
        """Replace a CertificateSigningRequest's `approval` or `status`; `body` carries its resourceVersion."""
        path = f"{_REQUESTS}/{quote(name, safe='')}/{part}"
        return await self._call("PUT", path, f"certificatesigningrequests/{part}", body)

    # Events

    async def create_event(self, namespace: str, body: Raw) -> Raw:
        """Create an Event (events.k8s.io/v1)."""
        path = f"/apis/events.k8s.io/v1/namespaces/{quote(namespace)}/events"
        return await self._call("POST", path, "events", body)

    async def patch_event(self, namespace: str, name: str, body: Raw) -> Raw:
        """Merge patch of an Event: its series."""
        path = f"/apis/events.k8s.io/v1/namespaces/{quote(namespace)}/events/{quote(name, safe='')}"
        return await self._call("PATCH", path, "events", body)

    # How

    def _seen(self, body: Raw, *, wrote: bool) -> Raw:
        if self._on_object is not None:
            self._on_object(body, wrote)
        return body

    async def _list(self, path: str, resource: str, limit: int) -> AsyncIterator[Raw]:
        following = ""
        while True:
            query = {"limit": str(limit)} | ({"continue": following} if following else {})
            page = await self._call("GET", f"{path}?{urlencode(query)}", resource)
            kind = page.get("kind", "List").removesuffix("List")
            for item in page.get("items") or []:
                # The items of a list carry neither of these.
                item.setdefault("kind", kind)
                item.setdefault("apiVersion", page.get("apiVersion"))
                yield item
            following = (page.get("metadata") or {}).get("continue") or ""
            if not following:
                return

    async def _call(self, verb: str, path: str, resource: str, body: Raw | None = None) -> Raw:
        # It says 429 of us as a whole: no request, whatever it is about, is sent before the time is over.
        if (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        status, headers, data = await self._request(verb, path, resource, body)
        if status == 401 and self._reload is not None:
            # A token or certificate that has run out: read the credentials anew, once.
            await self._renew()
            status, headers, data = await self._request(verb, path, resource, body)
        if 200 <= status < 300:
            return json.loads(data) if data else {}
        error = _error(status, headers, data, f"{verb} {path}")
        if isinstance(error, Throttled):
            self._not_before = time.monotonic() + min(error.retry_after, _LONGEST_WAIT)
        raise error

    async def _request(self, verb: str, path: str, resource: str, body: Raw | None) -> tuple[int, Any, bytes]:
        headers = {
            "Accept": "application/json",
            "User-Agent": f"sandkeeper-operator/{__version__}",
            "Content-Type": _MERGE_PATCH if verb == "PATCH" else "application/json",
        }
        for auth in (await self._api.configuration.auth_settings()).values():
            if auth["in"] == "header" and auth["value"]:
                headers[auth["key"]] = auth["value"]
        began, code = time.perf_counter(), "error"
        try:
            response = await self._api.rest_client.request(
                verb,
                self._api.configuration.host + path,
                headers=headers,
                body=body,
                _request_timeout=_TIMEOUT,
            )
            data = await response.read()
            code = str(response.status)
            self.answered_at = time.monotonic()
            return response.status, response.headers, data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{verb} {path}: {type(error).__name__}: {error}") from error
        finally:
            if self._observer is not None:
                self._observer.api_request(verb, resource, code, time.perf_counter() - began)

    async def _renew(self) -> None:
        async with self._reloading:
            assert self._reload is not None  # noqa: S101 - for the type checker
            old, self._api = self._api, client.ApiClient(await self._reload())
            await old.close()


def _namespaced(namespace: str, resource: str, *name: str) -> str:
    parts = (quote(part, safe="") for part in (namespace, resource, *name))
    return f"/api/v1/namespaces/{'/'.join(parts)}"


def _sandbox(namespace: str, name: str) -> str:
    return f"{_ROOT}/namespaces/{quote(namespace, safe='')}/sandboxes/{quote(name, safe='')}"


def _error(status: int, headers: Any, data: bytes, what: str) -> KubeError:
    try:
        message = json.loads(data).get("message") or ""
    except (ValueError, AttributeError):
        message = data[:200].decode(errors="replace")
    text = f"{what}: {status}: {message}"
    if status == 404:
        return Gone(text)
    if status == 409:
        return Conflict(text)
    if status == 429:
        try:
            wait = float(headers.get("Retry-After", 1))
        except ValueError:
            wait = 1.0
        return Throttled(text, wait)
    if status in (400, 401, 403, 405, 413, 415, 422):
        return Rejected(text)
    return Unavailable(text)
