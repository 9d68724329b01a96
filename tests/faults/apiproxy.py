"""A kube-apiserver that fails on command: an HTTPS reverse proxy before the real one.

Whoever uses the kubeconfig that it writes goes through it. It shows the real kubeconfig's client certificate
upstream and passes on all headers, an Authorization among them. Every control may be used while it runs, from any
thread but its own, and returns when it has taken effect.

A fault that is asked for is a `Fault`: `met` counts how often it struck, `end` takes it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
import yaml
from aiohttp import web
from tests.faults.loops import LoopThread, Port

from sandkeeper.localcluster.pki import CA
from sandkeeper.wire.tls import TLSFiles

Object = dict[str, Any]
HOSTS = ("127.0.0.1", "localhost")
_REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired"}
_REASONS |= {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}
_HOP = {"host", "connection", "keep-alive", "accept-encoding", "content-length", "transfer-encoding"}
_PATH = re.compile(
    r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)


@dataclass(frozen=True, slots=True)
class Request:
    """resource: with its subresource, as RBAC has it: `sandboxes/status`."""

    method: str
    path: str
    resource: str = ""
    namespace: str = ""
    name: str = ""
    watch: bool = False

    @property
    def writes(self) -> bool:
        return self.method not in ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True, slots=True)
class Served:
    """A request and what became of it. forwarded: it reached the API server; code: what that, or else we, said."""

    request: Request
    code: int
    forwarded: bool
    at: float


@dataclass(eq=False, slots=True)
class Fault:
    """left: how often it will strike; None for always."""

    strikes: Callable[[Any], bool]
    left: int | None = None
    met: int = 0
    kind: str = ""
    code: int = 0
    lost: bool = False
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    held: list[tuple[_Stream, bytes]] = field(default_factory=list)

    def end(self) -> None:
        self.left = 0

    def take(self, about: Any) -> bool:
        """Whether it strikes this one, which is then counted."""
        if self.left == 0 or not self.strikes(about):
            return False
        self.met += 1
        if self.left is not None:
            self.left -= 1
        return True


class ApiProxy:
    """A proxy for the API server of `kubeconfig`; its own kubeconfig and certificates are in `folder`."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.ca = CA.create(folder / "pki", "sandkeeper test proxy")
        self._real = yaml.safe_load(kubeconfig.read_text())
        self._tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.present(self.ca.server("apiproxy", HOSTS))
        self._port = Port()
        self._write_kubeconfig()
        self._faults: list[Fault] = []
        self._event_faults: list[Fault] = []
        self._streams: set[_Stream] = set()
        self._served: list[Served] = []
        self._events: list[tuple[Object, bytes]] = []
        self._listener: asyncio.Server | None = None
        self._loop = LoopThread("apiproxy")
        self._loop.call(self._open())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.call(self._close())
        self._loop.close()
        self._port.close()

    # The whole server

    def down(self) -> None:
        """Connections are refused, open ones are cut. A request that is under way upstream may have its effect."""
        self._loop.call(self._down())

    def up(self) -> None:
        self._loop.call(self._listen())

    def present(self, files: TLSFiles) -> None:
        """Shows this certificate from the next connection on."""
        self._tls.load_cert_chain(files.cert, files.key)

    def heal(self) -> None:
        """Nothing goes wrong any more; what was held of the watches is forgotten."""
        for fault in (*self._faults, *self._event_faults):
            fault.end()
        self._faults, self._event_faults = [], []
        self.up()

    # Requests. `matching` says which: a method, a resource (`sandboxes/status`), a name, a part of the path.

    def answer(
        self,
        code: int,
        *,
        times: int | None = None,
        lost: bool = False,
        retry_after: int = 0,
        **matching: str,
    ) -> Fault:
        """Says `code` instead of what was asked for; with `lost` after it was done: the reply is lost."""
        headers = {"Retry-After": str(retry_after)} if retry_after else {}
        return self._ask(
            Fault(_request_filter(**matching), times, kind="answer", code=code, lost=lost, headers=headers)
        )

    def reset(self, *, times: int | None = None, lost: bool = False, **matching: str) -> Fault:
        """Cuts the connection instead of answering; with `lost` after it was done."""
        return self._ask(Fault(_request_filter(**matching), times, kind="reset", lost=lost))

    def delay(self, seconds: float, *, times: int | None = None, **matching: str) -> Fault:
        """Forwards after a while."""
        return self._ask(Fault(_request_filter(**matching), times, kind="delay", seconds=seconds))

    def served(self, **matching: str) -> list[Served]:
        """What has been asked, in the order of the answers; a watch when it was opened."""
        wanted = _request_filter(**matching)
        return [each for each in tuple(self._served) if wanted(each.request)]

    def writes(self, **matching: str) -> list[Served]:
        """Of these, what the API server was asked to change, with or without success."""
        return [each for each in self.served(**matching) if each.request.writes and each.forwarded]

    # Watches. `matching` says which events: type, kind, name, namespace, or `wanted`, a function of the event.

    def drop(self, *, times: int | None = None, **matching: Any) -> Fault:
        """The events do not arrive."""
        return self._spoil(Fault(_event_filter(**matching), times, kind="drop"))

    def repeat(self, *, times: int | None = None, **matching: Any) -> Fault:
        """Each event arrives three times."""
        return self._spoil(Fault(_event_filter(**matching), times, kind="repeat"))

    def slow(self, seconds: float, *, times: int | None = None, **matching: Any) -> Fault:
        """Each event, and what comes after it, arrives later."""
        return self._spoil(Fault(_event_filter(**matching), times, kind="slow", seconds=seconds))

    def hold(self, *, times: int | None = None, **matching: Any) -> Fault:
        """The events are kept back, until `release`; others overtake them."""
        return self._spoil(Fault(_event_filter(**matching), times, kind="hold"))

    def release(self, fault: Fault, *, backwards: bool = False) -> int:
        """Ends a `hold` and sends what it kept, last one first if asked; returns how many events that were."""
        return self._loop.call(self._release(fault, backwards))

    def replay(self, **matching: Any) -> int:
        """Sends old events once more, on every watch of their resource; returns how many."""
        return self._loop.call(self._replay(_event_filter(**matching)))

    def passed(self, **matching: Any) -> int:
        """How many events the API server has sent so far, on all watches."""
        wanted = _event_filter(**matching)
        return sum(wanted(event) for event, _ in tuple(self._events))

    def cut(self, resource: str = "sandboxes") -> int:
        """Open watches end, as they do when their time is over; returns how many."""
        return self._loop.call(self._end(resource, b""))

    def gone(self, resource: str = "sandboxes") -> int:
        """Open watches end with an ERROR event of 410: the version that they go on from is too old."""
        status = {"kind": "Status", "apiVersion": "v1", **_status(410, "too old resource version")}
        return self._loop.call(self._end(resource, _line({"type": "ERROR", "object": status})))

    def watches(self, resource: str = "sandboxes") -> int:
        """How many are open."""
        return sum(stream.resource == resource for stream in tuple(self._streams))

    # In the loop

    async def _open(self) -> None:
        cluster, user = self._real["clusters"][0]["cluster"], self._real["users"][0]["user"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        context.load_cert_chain(user["client-certificate"], user["client-key"])
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
        )
        self._upstream = cluster["server"]
        self._server = web.Server(self._handle, access_log=None)
        await self._listen()

    async def _close(self) -> None:
        await self._down()
        await asyncio.sleep(0.05)  # a handshake that was under way has ended by now
        await self._server.shutdown(0.1)
        await self._session.close()

    async def _listen(self) -> None:
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(
                self._server, sock=self._port.socket(), ssl=self._tls, backlog=1024
            )

    async def _down(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for stream in self._streams:
            stream.ended.set()
        for connection in self._server.connections:
            if connection.transport is not None:
                connection.transport.abort()

    async def _handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        request, body = _parse(raw), await raw.read()
        try:
            for fault in tuple(self._faults):
                if fault.kind == "delay" and fault.take(request):
                    await asyncio.sleep(fault.seconds)
            for fault in tuple(self._faults):
                if fault.kind != "delay" and fault.take(request):
                    return await self._fail(raw, request, body, fault)
            if request.watch:
                return await self._watch(raw, request)
            return await self._forward(raw, request, body)
        except (aiohttp.ClientError, OSError):
            return _reset(raw)  # the API server is not there: neither are we

    async def _fail(
        self, raw: web.BaseRequest, request: Request, body: bytes, fault: Fault
    ) -> web.StreamResponse:
        if fault.lost:
            await self._forward(raw, request, body)
        else:
            self._note(request, fault.code, forwarded=False)
        if fault.kind == "reset":
            return _reset(raw)
        status = {"kind": "Status", "apiVersion": "v1", **_status(fault.code, "a test asked for this")}
        return web.json_response(status, status=fault.code, headers=fault.headers)

    async def _forward(self, raw: web.BaseRequest, request: Request, body: bytes) -> web.StreamResponse:
        async with self._ask_upstream(raw, body) as answer:
            data = await answer.read()
            self._note(request, answer.status, forwarded=True)
            return web.Response(status=answer.status, headers=_passed_on(answer.headers), body=data)

    @contextlib.asynccontextmanager
    async def _ask_upstream(self, raw: web.BaseRequest, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._session.request(
            raw.method, self._upstream + raw.raw_path, headers=_passed_on(raw.headers), data=body or None
        ) as answer:
            yield answer

    async def _watch(self, raw: web.BaseRequest, request: Request) -> web.StreamResponse:
        async with self._ask_upstream(raw, b"") as answer:
            self._note(request, answer.status, forwarded=True)
            if answer.status != 200:
                return web.Response(
                    status=answer.status, headers=_passed_on(answer.headers), body=await answer.read()
                )
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.enable_chunked_encoding()
            await response.prepare(raw)
            stream = _Stream(request.resource, response)
            self._streams.add(stream)
            tasks = [
                asyncio.create_task(self._pump(stream, answer)),
                asyncio.create_task(stream.ended.wait()),
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._streams.discard(stream)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            await response.write_eof()
        return response

    async def _pump(self, stream: _Stream, answer: aiohttp.ClientResponse) -> None:
        buffer = b""
        async for chunk in answer.content.iter_any():
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                await self._pass_event(stream, line + b"\n")

    async def _pass_event(self, stream: _Stream, line: bytes) -> None:
        event, copies = json.loads(line), 1
        if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
            self._events.append((event, line))
            for fault in tuple(self._event_faults):
                if not fault.take(event):
                    continue
                if fault.kind == "hold":
                    fault.held.append((stream, line))
                if fault.kind in ("hold", "drop"):
                    return
                if fault.kind == "slow":
                    await asyncio.sleep(fault.seconds)
                if fault.kind == "repeat":
                    copies = 3
        for _ in range(copies):
            await stream.send(line)

    async def _release(self, fault: Fault, backwards: bool) -> int:
        fault.end()
        held, fault.held = fault.held, []
        for stream, line in reversed(held) if backwards else held:
            await stream.send(line)
        return len(held)

    async def _replay(self, wanted: Callable[[Object], bool]) -> int:
        count = 0
        for event, line in tuple(self._events):
            if wanted(event):
                for stream in tuple(self._streams):
                    if stream.resource == _resource(event):
                        await stream.send(line)
                        count += 1
        return count

    async def _end(self, resource: str, last: bytes) -> int:
        ended = [stream for stream in self._streams if stream.resource == resource]
        for stream in ended:
            if last:
                await stream.send(last)
            stream.ended.set()
            self._streams.discard(stream)
        return len(ended)

    def _note(self, request: Request, code: int, *, forwarded: bool) -> None:
        self._served.append(Served(request, code, forwarded, time.monotonic()))

    # Parts

    def _ask(self, fault: Fault) -> Fault:
        self._faults = [*self._faults, fault]
        return fault

    def _spoil(self, fault: Fault) -> Fault:
        self._event_faults = [*self._event_faults, fault]
        return fault

    def _write_kubeconfig(self) -> None:
        document = json.loads(json.dumps(self._real))
        document["clusters"][0]["cluster"] = {
            "server": f"https://127.0.0.1:{self._port.number}",
            "certificate-authority": str(self.ca.cert),
        }
        self.kubeconfig.write_text(yaml.safe_dump(document))
        self.kubeconfig.chmod(0o600)


class _Stream:
    """One watch that a client follows."""

    def __init__(self, resource: str, response: web.StreamResponse) -> None:
        self.resource = resource
        self.ended = asyncio.Event()
        self._response = response
        self._lock = asyncio.Lock()

    async def send(self, line: bytes) -> None:
        """Whoever has left gets nothing."""
        async with self._lock:
            try:
                await self._response.write(line)
            except OSError:
                self.ended.set()


def _parse(raw: web.BaseRequest) -> Request:
    found = _PATH.fullmatch(raw.path)
    part = found.groupdict() if found else {}
    resource = "/".join(each for each in (part.get("resource"), part.get("sub")) if each)
    return Request(
        method=raw.method,
        path=raw.path,
        resource=resource,
        namespace=part.get("namespace") or "",
        name=part.get("name") or "",
        watch=raw.query.get("watch", "") in ("1", "true"),
    )


def _request_filter(
    method: str = "", resource: str = "", name: str = "", path: str = "", verb: str = ""
) -> Callable[[Request], bool]:
    """verb: `watch` for watches alone, `read` for all other reading."""

    def wanted(request: Request) -> bool:
        return (
            method in ("", request.method)
            and resource in ("", request.resource)
            and name in ("", request.name)
            and path in request.path
            and (verb != "watch" or request.watch)
            and (verb != "read" or not (request.watch or request.writes))
        )

    return wanted


def _event_filter(
    type: str = "",  # noqa: A002 - the API's word
    kind: str = "Sandbox",
    name: str = "",
    namespace: str = "",
    wanted: Callable[[Object], Any] | None = None,
) -> Callable[[Object], bool]:
    def matches(event: Object) -> bool:
        metadata = event["object"]["metadata"]
        return (
            type in ("", event["type"])
            and kind in ("", event["object"].get("kind"))
            and name in ("", metadata.get("name"))
            and namespace in ("", metadata.get("namespace"))
            and (wanted is None or bool(wanted(event)))
        )

    return matches


def _resource(event: Object) -> str:
    return f"{event['object']['kind'].lower()}s" if event["object"]["kind"] != "Sandbox" else "sandboxes"


def _status(code: int, message: str) -> Object:
    reason = _REASONS.get(code, "")
    return {"status": "Failure", "code": code, "reason": reason, "message": message, "metadata": {}}


def _line(event: Object) -> bytes:
    return json.dumps(event).encode() + b"\n"


def _passed_on(headers: Iterable[Any]) -> dict[str, str]:
    return {name: value for name, value in dict(headers).items() if name.lower() not in _HOP}


def _reset(raw: web.BaseRequest) -> web.StreamResponse:
    if raw.transport is not None:
        raw.transport.abort()
    return web.Response(status=502)
