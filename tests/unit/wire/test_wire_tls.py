"""Mutual TLS over loopback: who gets in, who is refused and by whom, and certificates that are replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tests.unit.wire.fakes import FakeShim, on_tls

from sandkeeper.localcluster.pki import CA
from sandkeeper.wire import node_pb2, node_pb2_grpc
from sandkeeper.wire.client import ShimClient, open_channel
from sandkeeper.wire.errors import PermissionDenied, Unavailable
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import (
    OPERATOR_IDENTITY,
    ClientTLS,
    ServerTLS,
    TLSFiles,
    allowed,
    identities,
)

NODE = "node-1.shim.sandkeeper"
OWNER = OwnerKey("default", "web", "0c5ac1cf", 1)


@dataclass(frozen=True)
class Site:
    """A shim that serves on TLS, with the CA of its certificates."""

    ca: CA
    shim: FakeShim
    address: str
    files: TLSFiles  # the server's

    def operator(self) -> TLSFiles:
        return self.ca.client(OPERATOR_IDENTITY, hosts=(OPERATOR_IDENTITY,))

    async def info(self, files: TLSFiles, server_name: str = NODE) -> node_pb2.InfoResponse:
        """One call on a connection of its own."""
        async with ShimClient(self.address, tls=ClientTLS(files), server_name=server_name) as client:
            return await client.info()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    ca = CA.create(tmp_path / "pki", "sandkeeper")
    files = ca.server("node-1", (NODE, "127.0.0.1"))
    shim = FakeShim()
    shim.permitted = frozenset({OPERATOR_IDENTITY})
    shim.answers("Info", node_pb2.InfoResponse(node_name="node-1"))
    async with on_tls(shim, ServerTLS(files)) as address:
        yield Site(ca, shim, address, files)


def replace(files: TLSFiles, by: TLSFiles) -> None:
    """Puts `by` where `files` are, key first, as a person with `mv` would."""
    for old, new in ((files.key, by.key), (files.cert, by.cert), (files.ca, by.ca)):
        temporary = old.with_name(f".{old.name}.new")
        temporary.write_bytes(new.read_bytes())
        temporary.replace(old)


# Who gets in


async def test_the_operator_gets_in(site: Site) -> None:
    assert (await site.info(site.operator())).node_name == "node-1"


async def test_the_common_name_counts_where_there_is_no_other(site: Site) -> None:
    files = site.ca.client(OPERATOR_IDENTITY, file="common-name-only")
    assert (await site.info(files)).node_name == "node-1"


async def test_the_host_of_the_address_is_the_name_by_default(site: Site) -> None:
    assert (await site.info(site.operator(), server_name="")).node_name == "node-1"


# Who does not


async def test_a_client_without_a_certificate_is_refused_in_the_handshake(site: Site) -> None:
    credentials = grpc.ssl_channel_credentials(root_certificates=site.ca.cert.read_bytes())
    options = (("grpc.ssl_target_name_override", NODE),)
    async with grpc.aio.secure_channel(site.address, credentials, options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await node_pb2_grpc.NodeStub(channel).Info(node_pb2.InfoRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not site.shim.calls


async def test_a_client_without_tls_is_refused(site: Site) -> None:
    async with grpc.aio.insecure_channel(site.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await node_pb2_grpc.NodeStub(channel).Info(node_pb2.InfoRequest(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not site.shim.calls


async def test_a_client_of_another_ca_is_refused_by_the_server(site: Site, tmp_path: Path) -> None:
    other = CA.create(tmp_path / "other", "sandkeeper")
    theirs = other.client(OPERATOR_IDENTITY, hosts=(OPERATOR_IDENTITY,))
    with pytest.raises(Unavailable):
        await site.info(TLSFiles(ca=site.ca.cert, cert=theirs.cert, key=theirs.key))
    assert not site.shim.calls


async def test_a_server_of_another_ca_is_refused_by_the_client(site: Site, tmp_path: Path) -> None:
    other = CA.create(tmp_path / "other", "sandkeeper")
    ours = site.operator()
    with pytest.raises(Unavailable):
        await site.info(TLSFiles(ca=other.cert, cert=ours.cert, key=ours.key))
    assert not site.shim.calls


@pytest.mark.parametrize("server_name", ["node-2.shim.sandkeeper", "localhost"])
async def test_a_node_that_answers_for_another_is_refused_by_the_client(site: Site, server_name: str) -> None:
    with pytest.raises(Unavailable):
        await site.info(site.operator(), server_name)
    assert not site.shim.calls


async def test_a_nodes_own_certificate_opens_no_other_node(site: Site) -> None:
    """It is for servers: who takes over one node must not command the rest with its key."""
    with pytest.raises(Unavailable):
        await site.info(site.ca.server("node-9", (NODE, OPERATOR_IDENTITY)))
    assert not site.shim.calls


async def test_a_client_certificate_serves_no_node(tmp_path: Path) -> None:
    ca = CA.create(tmp_path / "pki", "sandkeeper")
    shim = FakeShim()
    shim.answers("Info", node_pb2.InfoResponse())
    files = ca.client("not-a-server", hosts=(NODE,))
    async with on_tls(shim, ServerTLS(files)) as address:
        with pytest.raises(Unavailable):
            await Site(ca, shim, address, files).info(ca.client(OPERATOR_IDENTITY))
    assert not shim.calls


@pytest.mark.parametrize(
    ("common_name", "hosts"),
    [
        ("somebody", ()),
        ("somebody", ("somebody",)),
        (OPERATOR_IDENTITY, ("somebody",)),  # the subjectAltName rules where there is one
        (OPERATOR_IDENTITY, ("127.0.0.1",)),
        (f"{OPERATOR_IDENTITY}.example.com", ()),
    ],
)
async def test_another_identity_of_the_same_ca_is_denied(
    site: Site, common_name: str, hosts: tuple[str, ...]
) -> None:
    files = site.ca.client(common_name, hosts=hosts, file="stranger")
    with pytest.raises(PermissionDenied) as denied:
        await site.info(files)
    assert not denied.value.ambiguous
    assert not site.shim.calls


async def test_a_denied_change_is_not_repeated_and_has_no_effect(site: Site) -> None:
    files = site.ca.client("somebody")
    async with ShimClient(site.address, tls=ClientTLS(files), server_name=NODE) as client:
        with pytest.raises(PermissionDenied):
            await client.shutdown(OWNER)
    assert not site.shim.calls


# Rotation


async def test_a_renewed_server_certificate_is_served_without_restart(site: Site) -> None:
    """The node gets another name: only a server that read its files anew can be met under it."""
    operator, name = site.operator(), "node-1.new.sandkeeper"
    with pytest.raises(Unavailable):
        await site.info(operator, name)
    replace(site.files, site.ca.server("node-1-new", (name,)))
    assert (await site.info(operator, name)).node_name == "node-1"
    with pytest.raises(Unavailable):
        await site.info(operator, NODE)


async def test_a_replaced_ca_lets_the_new_in_and_the_old_out(site: Site, tmp_path: Path) -> None:
    old, new = site.operator(), CA.create(tmp_path / "new", "sandkeeper")
    old = TLSFiles(ca=new.cert, cert=old.cert, key=old.key)  # trusts the new server; is of the old CA
    replace(site.files, new.server("node-1", (NODE,)))
    assert (await site.info(new.client(OPERATOR_IDENTITY))).node_name == "node-1"
    with pytest.raises(Unavailable):
        await site.info(old)


async def test_a_rotation_cuts_no_connection(site: Site) -> None:
    released = asyncio.Event()

    async def watch(_request: object, _context: object) -> AsyncIterator[node_pb2.WatchResponse]:
        yield node_pb2.WatchResponse(sequence=1)
        await released.wait()
        yield node_pb2.WatchResponse(sequence=2)

    site.shim.streams["Watch"] = watch
    operator, name = site.operator(), "node-1.new.sandkeeper"
    async with ShimClient(site.address, tls=ClientTLS(operator), server_name=NODE) as client:
        changes = client.watch("e", 0)
        assert (await anext(changes)).sequence == 1
        replace(site.files, site.ca.server("node-1-new", (name,)))
        await site.info(operator, name)
        released.set()
        assert (await anext(changes)).sequence == 2


async def test_a_renewed_client_certificate_is_shown_without_restart(tmp_path: Path) -> None:
    """The operator's connection breaks after a rotation: its next one must not show the old certificate."""
    old, new = CA.create(tmp_path / "old", "sandkeeper"), CA.create(tmp_path / "new", "sandkeeper")
    files, renewed = old.client(OPERATOR_IDENTITY), new.client(OPERATOR_IDENTITY)
    shim = FakeShim()
    shim.answers("Info", node_pb2.InfoResponse())
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.AsyncExitStack()
        address = await first.enter_async_context(on_tls(shim, ServerTLS(old.server("node-1", (NODE,)))))
        client = await stack.enter_async_context(ShimClient(address, tls=ClientTLS(files), server_name=NODE))
        await client.info()
        await first.aclose()
        await stack.enter_async_context(on_tls(shim, ServerTLS(new.server("node-1", (NODE,))), address))
        with pytest.raises(Unavailable):
            await client.info()
        replace(files, renewed)
        # It is noticed by a failed call, and that one, a read, is repeated.
        await client.info()
    assert shim.count("Info") == 2


async def test_half_a_rotation_keeps_the_old_certificate(site: Site) -> None:
    """The key is away for a moment: who calls then is served with what was there before."""
    key = site.files.key.read_bytes()
    site.files.cert.touch()
    site.files.key.unlink()
    operator = site.operator()
    assert (await site.info(operator)).node_name == "node-1"
    site.files.key.write_bytes(key)
    assert (await site.info(operator)).node_name == "node-1"


async def test_rubbish_in_a_file_keeps_the_old_certificate_until_it_is_mended(site: Site) -> None:
    operator, good = site.operator(), site.files.cert.read_bytes()
    site.files.cert.write_bytes(b"not PEM")
    # Whether a server in this state answers is gRPC's own matter; that it recovers is ours.
    with contextlib.suppress(Unavailable):
        await site.info(operator)
    site.files.cert.write_bytes(good)
    assert (await site.info(operator)).node_name == "node-1"


# Files, addresses


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    files = TLSFiles(ca=tmp_path / "ca.crt", cert=tmp_path / "x.crt", key=tmp_path / "x.key")
    for make in (ServerTLS(files).credentials, ClientTLS(files).credentials):
        with pytest.raises(FileNotFoundError, match=r"ca\.crt"):
            make()


@pytest.mark.parametrize("address", ["127.0.0.1:7443", "node-1:7443", "dns:///node-1:7443"])
def test_tcp_without_tls_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match="TLS only"):
        open_channel(address)


# Who may call, from what gRPC says of the peer

TLS = {"transport_security_type": [b"ssl"]}
PERMITTED = frozenset({OPERATOR_IDENTITY})
ME = OPERATOR_IDENTITY.encode()


@pytest.mark.parametrize(
    ("peer", "auth_context", "expected"),
    [
        ("unix:", {}, True),
        ("unix:/run/sandkeeper/shim.sock", {}, True),
        ("ipv4:127.0.0.1:1", {}, False),
        ("ipv6:[::1]:1", {}, False),
        ("", {}, False),
        ("ipv4:127.0.0.1:1", TLS, False),
        ("ipv4:127.0.0.1:1", {**TLS, "x509_common_name": [ME]}, True),
        ("ipv4:127.0.0.1:1", {**TLS, "x509_common_name": [b"somebody"]}, False),
        ("ipv4:127.0.0.1:1", {"x509_common_name": [ME]}, False),  # nobody has verified it
        ("unix:", {**TLS, "x509_common_name": [b"somebody"]}, False),
        (
            "ipv4:127.0.0.1:1",
            {**TLS, "x509_subject_alternative_name": [b"a", ME], "peer_dns": [b"a", ME]},
            True,
        ),
        # An address or a URI of that spelling is no DNS name.
        ("ipv4:127.0.0.1:1", {**TLS, "x509_subject_alternative_name": [ME], "peer_uri": [ME]}, False),
        (
            "ipv4:127.0.0.1:1",
            {**TLS, "x509_subject_alternative_name": [b"x"], "peer_dns": [b"x"], "x509_common_name": [ME]},
            False,
        ),
    ],
)
def test_allowed(peer: str, auth_context: dict[str, list[bytes]], expected: bool) -> None:
    assert allowed(peer, auth_context, PERMITTED) is expected


def test_with_nobody_permitted_nobody_calls_over_tls() -> None:
    assert not allowed("ipv4:127.0.0.1:1", {**TLS, "x509_common_name": [ME]}, frozenset())


def test_a_name_that_is_no_text_harms_nothing() -> None:
    assert identities({"x509_common_name": [b"\xff"]}) == {"\ufffd"}
