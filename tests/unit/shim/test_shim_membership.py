"""A shim's part in its cluster, without one: what it asks for, keeps and says of itself. With one:
integration/test_trust."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from tests.unit.control.test_core_signer import SHIMS

from sandkeeper.control.signer import NODE_EXTRA, Approve, judge
from sandkeeper.shim.certificate import NodeCertificate, Refused, due, kept, request_object, verdict
from sandkeeper.shim.kubeapi import KubeApi, KubeError, Raw
from sandkeeper.shim.registration import address, sandbox_node
from sandkeeper.shim.settings import KubernetesSettings, ShimSettings
from sandkeeper.wire.certificates import SERVER, Issuer, cert_pem, key_pem, new_key, renewal, request

NODE = "node-1"
WEEK = timedelta(days=7)
NOW = datetime.now(UTC)


def of(issuer: Issuer, node: str = NODE, now: datetime = NOW) -> tuple[Any, Any]:
    key = new_key()
    return issuer.issue(key.public_key(), node, SERVER, life=WEEK, hosts=(node,), now=now), key


def test_what_the_shim_asks_for_is_what_the_operator_signs() -> None:
    body = request_object("name", request(new_key(), NODE))
    body["spec"] |= {"username": SHIMS.user, "groups": [SHIMS.group], "extra": {NODE_EXTRA: [NODE]}}
    assert judge(body, SHIMS, WEEK) == Approve(NODE)


def test_another_certificate_is_due_where_there_is_none_or_an_old_one_or_one_of_another_ca() -> None:
    ca, other = Issuer.make("ca", 10 * WEEK), Issuer.make("ca", 10 * WEEK)
    certificate, _ = of(ca)
    assert due(None, ca.certificate, NOW)
    assert not due(certificate, ca.certificate, NOW)
    assert not due(certificate, ca.certificate, renewal(certificate) - timedelta(seconds=1))
    assert due(certificate, ca.certificate, renewal(certificate))
    assert due(certificate, other.certificate, NOW)


def test_an_answer_is_a_certificate_or_a_refusal_or_none_yet() -> None:
    pem = base64.b64encode(b"pem").decode()
    assert verdict({"status": {"certificate": pem}}) == b"pem"
    assert verdict({"status": {"conditions": [{"type": "Approved"}]}}) == b""
    assert verdict({}) == b""
    denied = {"type": "Denied", "reason": "WrongSubject", "message": "not yours"}
    with pytest.raises(Refused, match="one: Denied: WrongSubject: not yours"):
        verdict({"metadata": {"name": "one"}, "status": {"conditions": [denied]}})
    with pytest.raises(Refused, match="no certificate"):
        verdict({"status": {"certificate": "%"}})


@pytest.mark.parametrize(
    "case",
    ["whole", "of another node", "without its key", "with another's key", "cut off", "empty", "absent"],
)
def test_what_is_kept_on_the_disk_is_taken_only_whole(tmp_path: Path, case: str) -> None:
    ca = Issuer.make("ca", WEEK)
    certificate, key = of(ca, "node-2" if case == "of another node" else NODE)
    content = cert_pem(certificate) + key_pem(new_key() if case == "with another's key" else key)
    content = cert_pem(certificate) if case == "without its key" else content
    content = content[: {"cut off": -40, "empty": 0}.get(case, len(content))]
    path = tmp_path / "shim.pem"
    if case != "absent":
        path.write_bytes(content)
    assert kept(path, NODE) == (certificate if case == "whole" else None)


class Cluster(KubeApi):
    """An API server whose operator signs what it is asked, with whichever CA it has."""

    def __init__(self) -> None:
        super().__init__(KubernetesSettings())
        self.ca = Issuer.make("ca", 10 * WEEK, NOW)
        self.requests: dict[str, Raw] = {}
        self.failing: list[KubeError | None] = []  # for the next requests, one each
        self.answer = "sign"

    async def get(self, path: str) -> Raw:
        self._fail()
        if "configmaps" in path:
            return {"data": {"ca.crt": cert_pem(self.ca.certificate).decode()}}
        name = path.rpartition("/")[2]
        if name not in self.requests:
            raise KubeError("gone", 404)
        return self.requests[name]

    async def create(self, path: str, body: Raw) -> Raw:
        self._fail()
        if body["metadata"]["name"] in self.requests:
            raise KubeError("there", 409)
        csr = x509.load_pem_x509_csr(base64.b64decode(body["spec"]["request"]))
        key: Any = csr.public_key()
        if self.answer == "somebody else's":
            key = new_key().public_key()
        made = self.ca.issue(key, NODE, SERVER, life=WEEK, hosts=(NODE,), now=NOW)
        status = {"certificate": base64.b64encode(cert_pem(made)).decode()}
        self.requests[body["metadata"]["name"]] = {**body, "status": status}
        self._fail()
        return body

    def _fail(self) -> None:
        if self.failing and (error := self.failing.pop(0)):
            raise error


def member(cluster: Cluster, folder: Path) -> NodeCertificate:
    settings = ShimSettings(
        node_name=NODE, state_dir=folder, listen="127.0.0.1:0", certificate="request", run_dir=folder
    )
    made = NodeCertificate(settings, cluster, clock=lambda: NOW)
    made._load()
    return made


async def test_it_is_asked_for_once_kept_and_found_again(tmp_path: Path) -> None:
    cluster = Cluster()
    first = member(cluster, tmp_path)
    assert not first.ready.is_set()
    await first._look()
    await first._look()
    assert first.ready.is_set()
    again = member(cluster, tmp_path)
    assert again.ready.is_set()
    await again._look()
    assert len(cluster.requests) == 1


async def test_a_request_whose_answer_was_lost_is_not_made_twice(tmp_path: Path) -> None:
    cluster = Cluster()
    one = member(cluster, tmp_path)
    cluster.failing = [None, None, KubeError("connection reset")]
    with pytest.raises(KubeError, match="reset"):
        await one._look()
    await one._look()
    assert one.ready.is_set()
    assert len(cluster.requests) == 1


async def test_another_ca_means_another_certificate(tmp_path: Path) -> None:
    cluster = Cluster()
    one = member(cluster, tmp_path)
    await one._look()
    cluster.ca = Issuer.make("next", 10 * WEEK, NOW)
    await one._look()
    await one._look()
    assert len(cluster.requests) == 2
    found = kept(one.files.cert, NODE)
    assert found is not None
    assert not due(found, cluster.ca.certificate, NOW)
    assert one.files.ca.read_bytes() == cert_pem(cluster.ca.certificate)


async def test_a_certificate_of_somebody_elses_key_is_not_taken(tmp_path: Path) -> None:
    cluster = Cluster()
    cluster.answer = "somebody else's"
    one = member(cluster, tmp_path)
    with pytest.raises(Refused, match="not this node's"):
        await one._look()
    assert not one.ready.is_set()
    assert not one.files.cert.exists()


def test_a_node_says_where_it_is_and_its_nodes_labels_but_not_those_of_administrators() -> None:
    labels = {"zone": "a", "node-restriction.kubernetes.io/x": "1", "a.node-restriction.kubernetes.io/y": "1"}
    made = sandbox_node(NODE, address("2001:db8::1", 7443), labels)
    assert made["metadata"] == {"name": NODE, "labels": {"kubernetes.io/hostname": NODE, "zone": "a"}}
    assert made["spec"] == {"address": "[2001:db8::1]:7443", "serverName": NODE}
    assert address("192.0.2.1", 7443) == "192.0.2.1:7443"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"certificate": "request"}, "listen"),
        (
            {"certificate": "request", "listen": "a:1", "tls_ca": "x", "tls_cert": "x", "tls_key": "x"},
            "tls_ca",
        ),
        ({"certificate": "request", "listen": "a:1", "register_node": True}, "advertise_host"),
        ({"register_node": True, "advertise_host": "a"}, "listen"),
        ({"kubernetes": {"server": "http://a"}}, "server"),
        ({"kubernetes": {"ca_config_map": "a"}}, "ca_config_map"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ShimSettings(node_name="n", **given)


async def test_without_an_api_server_it_is_said_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeError, match="token"):
        await KubeApi(KubernetesSettings(token_file=tmp_path / "token")).get("/x")
    (tmp_path / "token").write_text("t")
    with pytest.raises(KubeError, match=r"kubernetes\.server"):
        await KubeApi(KubernetesSettings(token_file=tmp_path / "token")).get("/x")
