"""Requests to the API server: paths, bodies and what each answer becomes; against a real HTTP server."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from kubernetes.aio import client

from sandkeeper.control.kube import Kube, Throttled, Unavailable, load_configuration
from sandkeeper.control.metrics import Metrics
from sandkeeper.control.ports import Conflict, Gone, KubeError, Raw, Rejected

BODY: Raw = {
    "kind": "Sandbox",
    "metadata": {"namespace": "ns", "name": "a", "uid": "u", "resourceVersion": "1"},
}


class Server:
    """Answers what it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str | None, Any]] = []
        self.headers: list[Any] = []
        self.answers: list[web.Response] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        text = await request.text()
        content_type = request.headers.get("Content-Type")
        self.seen.append((request.method, request.path_qs, content_type, json.loads(text) if text else None))
        self.headers.append(request.headers)
        return self.answers.pop(0) if self.answers else web.json_response(BODY)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def connected(server: Server, **options: Any) -> AsyncIterator[Kube]:
    kube = Kube(configuration(server), **options)
    try:
        yield kube
    finally:
        await kube.close()


def configuration(server: Server, number: int = 1) -> client.Configuration:
    made = client.Configuration(host=server.url)
    made.api_key["BearerToken"] = f"Bearer token-{number}"
    return made


async def test_reads_and_writes_are_the_right_requests() -> None:
    objects: list[tuple[str, bool]] = []
    async with (
        serving() as server,
        connected(
            server, on_object=lambda body, wrote: objects.append((body["metadata"]["name"], wrote))
        ) as kube,
    ):
        await kube.get("ns", "a")
        await kube.patch_metadata("ns", "a", {"metadata": {"uid": "u"}})
        await kube.patch_status("ns", "a", {"status": {"gone": None}})
        await kube.delete("ns", "a", uid="u")
        await kube.get_node("n1")
        await kube.patch_node_status("n1", {"status": {}})
        await kube.create_event("ns", {"reason": "x"})
        await kube.patch_event("ns", "a.1", {"series": {}})
    root, events = "/apis/sandkeeper.dev/v1alpha1", "/apis/events.k8s.io/v1/namespaces/ns/events"
    merge = "application/merge-patch+json"
    assert [(method, path) for method, path, _, _ in server.seen] == [
        ("GET", f"{root}/namespaces/ns/sandboxes/a"),
        ("PATCH", f"{root}/namespaces/ns/sandboxes/a"),
        ("PATCH", f"{root}/namespaces/ns/sandboxes/a/status"),
        ("DELETE", f"{root}/namespaces/ns/sandboxes/a"),
        ("GET", f"{root}/sandboxnodes/n1"),
        ("PATCH", f"{root}/sandboxnodes/n1/status"),
        ("POST", events),
        ("PATCH", f"{events}/a.1"),
    ]
    assert all(kind == merge for method, _, kind, _ in server.seen if method == "PATCH")
    assert server.seen[2][3] == {"status": {"gone": None}}
    assert server.seen[3][3]["preconditions"] == {"uid": "u"}
    assert server.headers[0]["Authorization"] == "Bearer token-1"
    assert objects == [("a", False), ("a", True), ("a", True)]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (404, Gone),
        (409, Conflict),
        (422, Rejected),
        (400, Rejected),
        (403, Rejected),
        (429, Throttled),
        (500, Unavailable),
        (503, Unavailable),
    ],
)
async def test_an_error_becomes_its_exception_with_the_servers_words(
    status: int, expected: type[KubeError]
) -> None:
    async with serving() as server, connected(server) as kube:
        server.answers = [
            web.json_response({"message": "the reason"}, status=status, headers={"Retry-After": "7"})
        ]
        with pytest.raises(expected, match="the reason") as caught:
            await kube.get("ns", "a")
        assert type(caught.value) is expected
        if isinstance(caught.value, Throttled):
            assert caught.value.retry_after == 7


async def test_nothing_is_asked_before_the_time_that_a_429_names_is_over() -> None:
    async with serving() as server, connected(server) as kube:
        server.answers = [web.json_response({}, status=429, headers={"Retry-After": "1"})]
        with pytest.raises(Throttled):
            await kube.get("ns", "a")
        refused = time.monotonic()
        await kube.get("ns", "b")
        assert time.monotonic() - refused > 0.9


async def test_an_error_that_is_no_json_is_told_too() -> None:
    async with serving() as server, connected(server) as kube:
        server.answers = [web.Response(status=502, text="<html>bad gateway")]
        with pytest.raises(Unavailable, match="bad gateway"):
            await kube.get("ns", "a")


async def test_no_server_is_unavailable_and_nothing_was_answered() -> None:
    async with serving() as server:
        config = configuration(server)
    kube = Kube(config)
    with pytest.raises(Unavailable):
        await kube.get("ns", "a")
    assert kube.answered_at is None
    await kube.close()


async def test_a_list_goes_on_over_its_pages() -> None:
    def page(names: list[str], following: str) -> web.Response:
        items = [{"metadata": {"name": name}} for name in names]
        return web.json_response(
            {"kind": "SandboxList", "apiVersion": "v", "metadata": {"continue": following}, "items": items}
        )

    async with serving() as server, connected(server) as kube:
        server.answers = [page(["a", "b"], "next/token"), page(["c"], "")]
        found = [item async for item in kube.sandboxes("ns", limit=2)]
        assert [item["metadata"]["name"] for item in found] == ["a", "b", "c"]
        assert found[0]["kind"] == "Sandbox"
        assert server.seen[1][1].endswith("/namespaces/ns/sandboxes?limit=2&continue=next/token")
        server.answers = [page([], "")]
        assert [item async for item in kube.sandboxes()] == []
        assert server.seen[2][1].startswith("/apis/sandkeeper.dev/v1alpha1/sandboxes?")


async def test_credentials_that_ran_out_are_read_anew_once() -> None:
    async with serving() as server:

        async def reload() -> client.Configuration:
            return configuration(server, 2)

        async with connected(server, reload=reload) as kube:
            server.answers = [web.Response(status=401)]
            await kube.get("ns", "a")
            assert [headers["Authorization"] for headers in server.headers] == [
                "Bearer token-1",
                "Bearer token-2",
            ]
            server.answers = [web.Response(status=401), web.Response(status=401)]
            with pytest.raises(Rejected):
                await kube.get("ns", "a")


async def test_a_name_cannot_leave_its_place_in_the_path() -> None:
    async with serving() as server, connected(server) as kube:
        await kube.get_node("../x?y#z")
        assert server.seen[0][1] == "/apis/sandkeeper.dev/v1alpha1/sandboxnodes/..%2Fx%3Fy%23z"


async def test_requests_are_measured() -> None:
    metrics = Metrics()
    async with serving() as server, connected(server, observer=metrics) as kube:
        server.answers = [web.Response(status=409, text="{}")]
        with pytest.raises(Conflict):
            await kube.patch_status("ns", "a", {})
    labels = {"verb": "PATCH", "resource": "sandboxes/status", "code": "409"}
    assert metrics.registry.get_sample_value("sandkeeper_api_request_seconds_count", labels) == 1


def kubeconfig(path: Path) -> Path:
    """One of two clusters, one and two; one is the current."""
    entries = {"one": "https://one:1", "two": "https://two:2"}
    path.write_text(
        yaml.safe_dump(
            {
                "current-context": "one",
                "contexts": [{"name": n, "context": {"cluster": n, "user": "u"}} for n in entries],
                "clusters": [{"name": n, "cluster": {"server": server}} for n, server in entries.items()],
                "users": [{"name": "u", "user": {"token": "secret"}}],
            }
        )
    )
    return path


async def test_the_kubeconfig_and_context_that_are_named_are_used(tmp_path: Path) -> None:
    path = kubeconfig(tmp_path / "kubeconfig")
    assert (await load_configuration(str(path))).host == "https://one:1"
    chosen = await load_configuration(str(path), "two")
    assert chosen.host == "https://two:2"
    assert (await chosen.auth_settings())["BearerToken"]["value"] == "Bearer secret"


async def test_the_environments_proxy_is_used_but_for_what_it_excepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kubeconfig(tmp_path / "kubeconfig")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "two")
    assert (await load_configuration(str(path))).proxy == "http://proxy:3128"
    assert (await load_configuration(str(path), "two")).proxy is None


async def test_a_request_goes_through_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("no_proxy", "")
        config = yaml.safe_load(kubeconfig(tmp_path / "kubeconfig").read_text())
        config["clusters"][0]["cluster"]["server"] = "http://api.invalid"
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        kube = Kube(await load_configuration(str(tmp_path / "kubeconfig")))
        try:
            await kube.get("ns", "a")
        finally:
            await kube.close()
        assert len(server.seen) == 1
