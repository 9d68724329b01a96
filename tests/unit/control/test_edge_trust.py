"""The CA in the cluster and the requests that it signs, against an API server in memory. Against a real one:
integration/test_trust."""

from __future__ import annotations

import base64
import copy
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from tests.unit.control.test_core_signer import KEY, NODE, csr

from sandkeeper.control.authority import Authority, ca_of, secret_of
from sandkeeper.control.metrics import Metrics
from sandkeeper.control.ports import Conflict, Gone, Raw
from sandkeeper.control.settings import OperatorSettings
from sandkeeper.control.trust import Trust
from sandkeeper.wire.certificates import Issuer, cert_pem, dns_names, issued_by

WEEK = timedelta(days=7)
NAME = "sandkeeper-shim-1"


class Cluster:
    """Secrets, ConfigMaps and requests with versions, as an API server has them."""

    def __init__(self) -> None:
        self.secrets: dict[str, Raw] = {}
        self.config_maps: dict[str, Raw] = {"sandkeeper-ca": {}}
        self.csrs: dict[str, Raw] = {}
        self.writes: list[str] = []
        self.meanwhile: Any = None  # done once, between somebody's read and write

    async def get_secret(self, namespace: str, name: str) -> Raw:
        if name not in self.secrets:
            raise Gone(name)
        return self.secrets[name]

    async def create_secret(self, namespace: str, body: Raw) -> Raw:
        self._other()
        name = body["metadata"]["name"]
        if name in self.secrets:
            raise Conflict(name)
        self.writes.append("make_ca")
        self.secrets[name] = body
        return body

    async def get_config_map(self, namespace: str, name: str) -> Raw:
        return self.config_maps[name]

    async def patch_config_map(self, namespace: str, name: str, body: Raw) -> Raw:
        self.writes.append("publish_ca")
        self.config_maps[name] = body
        return body

    async def requests(self, signer: str) -> list[Raw]:
        return [each for each in self.csrs.values() if each["spec"]["signerName"] == signer]

    async def get_request(self, name: str) -> Raw:
        if name not in self.csrs:
            raise Gone(name)
        return copy.deepcopy(self.csrs[name])

    async def put_request(self, name: str, part: str, body: Raw) -> Raw:
        self._other()
        there = self.csrs[name]
        if body["metadata"]["resourceVersion"] != there["metadata"]["resourceVersion"]:
            raise Conflict(name)
        self.writes.append(part)
        self.put(body)
        return copy.deepcopy(self.csrs[name])

    def put(self, body: Raw) -> None:
        metadata = {**body["metadata"], "resourceVersion": f"{len(self.writes)}"}
        self.csrs[body["metadata"]["name"]] = {**copy.deepcopy(body), "metadata": metadata}

    def _other(self) -> None:
        if self.meanwhile is not None:
            act, self.meanwhile = self.meanwhile, None
            act()


def trust_on(cluster: Cluster, **settings: Any) -> Trust:
    return Trust(OperatorSettings(ca_secret="sandkeeper-system/sandkeeper-ca", **settings), cluster)


def authority_on(cluster: Cluster, now: list[datetime]) -> Authority:
    return Authority(
        cluster,
        secret=("s", "sandkeeper-ca"),
        config_map=("n", "sandkeeper-ca"),
        life=WEEK,
        clock=lambda: now[0],
    )


def published(cluster: Cluster) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(cluster.config_maps["sandkeeper-ca"]["data"]["ca.crt"].encode())


async def test_the_first_makes_a_ca_and_all_after_it_take_that() -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    first, second = authority_on(cluster, now), authority_on(cluster, now)
    await first.refresh()
    await second.refresh()
    await first.refresh()
    assert cluster.writes == ["make_ca", "publish_ca"]
    assert first.issuer is not None
    assert second.issuer is not None
    assert first.issuer.certificate == second.issuer.certificate == published(cluster)[0]
    own = x509.load_pem_x509_certificate(second.tls.read()[1])
    assert dns_names(own) == ["sandkeeper-operator"]
    assert issued_by(own, published(cluster)[0])


async def test_of_two_at_once_one_ca_stays() -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    theirs = Issuer.make("theirs", WEEK)
    cluster.meanwhile = lambda: cluster.secrets.update({"sandkeeper-ca": secret_of("sandkeeper-ca", theirs)})
    one = authority_on(cluster, now)
    await one.refresh()
    assert one.issuer is not None
    assert one.issuer.certificate == theirs.certificate == published(cluster)[0]
    assert cluster.writes == ["publish_ca"]


@pytest.mark.parametrize("data", [{}, {"tls.crt": "eA==", "tls.key": "eA=="}, {"tls.crt": "x"}])
async def test_a_secret_that_holds_no_ca_is_left_as_it_is(data: dict[str, str]) -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    cluster.secrets["sandkeeper-ca"] = {"data": data}
    with pytest.raises(ValueError, match="Secret"):
        await authority_on(cluster, now).refresh()
    assert not cluster.writes


async def test_its_own_certificate_is_renewed_in_time_and_seldom() -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    one = authority_on(cluster, now)
    await one.refresh()
    begin, stamp, changes = now[0], one.tls.stamp(), 0
    while now[0] < begin + 3 * WEEK:
        now[0] += timedelta(hours=1)
        await one.refresh()
        assert x509.load_pem_x509_certificate(one.tls.read()[1]).not_valid_after_utc > now[0]
        changes, stamp = changes + (stamp != one.tls.stamp()), one.tls.stamp()
    assert 4 <= changes <= 5
    assert cluster.writes == ["make_ca", "publish_ca"]


async def test_another_ca_is_taken_up_and_believed_beside_the_old_where_the_secret_says_so() -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    one = authority_on(cluster, now)
    await one.refresh()
    (old,) = published(cluster)
    new = Issuer.make("new", 10 * WEEK)
    secret = secret_of("sandkeeper-ca", new)
    secret["data"]["ca.crt"] = base64.b64encode(cert_pem(old) + cert_pem(new.certificate)).decode()
    cluster.secrets["sandkeeper-ca"] = secret
    await one.refresh()
    assert published(cluster) == [new.certificate, old]
    assert issued_by(x509.load_pem_x509_certificate(one.tls.read()[1]), new.certificate)
    assert x509.load_pem_x509_certificates(one.tls.read()[0]) == [new.certificate, old]


async def test_a_ca_that_is_deleted_is_followed_by_another() -> None:
    cluster, now = Cluster(), [datetime.now(UTC)]
    one = authority_on(cluster, now)
    await one.refresh()
    (old,) = published(cluster)
    del cluster.secrets["sandkeeper-ca"]
    await one.refresh()
    (new,) = published(cluster)
    assert new != old
    assert issued_by(x509.load_pem_x509_certificate(one.tls.read()[1]), new)


def test_what_is_believed_begins_with_what_signs() -> None:
    ca = Issuer.make("a", WEEK)
    issuer, bundle = ca_of(secret_of("x", ca))
    assert issuer.certificate == ca.certificate
    assert bundle == cert_pem(ca.certificate)


# Requests


async def prepared(cluster: Cluster, **body: Any) -> Trust:
    trust = trust_on(cluster)
    await trust.prepare()
    cluster.put(csr(**body))
    cluster.writes.clear()
    return trust


def signed(cluster: Cluster) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(cluster.csrs[NAME]["status"]["certificate"]))


async def test_a_good_request_is_approved_and_signed_once() -> None:
    cluster = Cluster()
    trust = await prepared(cluster)
    assert await trust.handle(NAME) is None
    assert await trust.handle(NAME) is None
    assert cluster.writes == ["approval", "status"]
    assert dns_names(signed(cluster)) == [NODE]
    assert signed(cluster).public_key() == KEY.public_key()
    (condition,) = cluster.csrs[NAME]["status"]["conditions"]
    assert (condition["type"], condition["status"]) == ("Approved", "True")


async def test_what_was_decided_and_when_certificates_end_can_be_graphed() -> None:
    cluster, metrics = Cluster(), Metrics()
    trust = Trust(OperatorSettings(ca_secret="s/sandkeeper-ca"), cluster, metrics)
    await trust.prepare()
    cluster.put(csr())
    await trust.handle(NAME)
    cluster.put(csr(username="mallory"))
    await trust.handle(NAME)
    text = metrics.exposition().decode()
    for outcome in ("signed", "denied"):
        assert f'sandkeeper_certificate_requests_total{{outcome="{outcome}"}} 1.0' in text
    ends = trust.authority.ends()
    assert ends["ca"] - ends["operator"] > 100 * WEEK
    for which in ends:
        assert f'expiry_timestamp_seconds{{certificate="{which}"}}' in text


async def test_a_bad_one_is_denied_once_with_the_reason() -> None:
    cluster = Cluster()
    trust = await prepared(cluster, usages=["client auth"])
    await trust.handle(NAME)
    await trust.handle(NAME)
    assert cluster.writes == ["approval"]
    (condition,) = cluster.csrs[NAME]["status"]["conditions"]
    assert (condition["type"], condition["reason"]) == ("Denied", "WrongUsages")
    assert "certificate" not in cluster.csrs[NAME]["status"]


async def test_one_that_somebody_else_approved_fails_if_it_is_bad() -> None:
    cluster = Cluster()
    trust = await prepared(cluster, username="mallory")
    body = await cluster.get_request(NAME)
    cluster.put({**body, "status": {"conditions": [{"type": "Approved", "status": "True"}]}})
    await trust.handle(NAME)
    assert cluster.writes == ["status"]
    assert [each["type"] for each in cluster.csrs[NAME]["status"]["conditions"]] == ["Approved", "Failed"]
    assert "certificate" not in cluster.csrs[NAME]["status"]


async def test_where_another_operator_was_quicker_the_request_is_looked_at_again() -> None:
    cluster = Cluster()
    trust = await prepared(cluster)
    body = await cluster.get_request(NAME)
    approved = {**body, "status": {"conditions": [{"type": "Approved", "status": "True"}]}}

    def other() -> None:
        cluster.writes.append("theirs")
        cluster.put(approved)

    cluster.meanwhile = other
    assert await trust.handle(NAME) == 0.0
    assert await trust.handle(NAME) is None
    assert cluster.writes == ["theirs", "status"]
    assert dns_names(signed(cluster)) == [NODE]


async def test_one_that_is_gone_is_no_failure() -> None:
    trust = await prepared(Cluster())
    assert await trust.handle("other") is None


@pytest.mark.parametrize(
    "given",
    [
        {"ca_secret": "no-namespace"},
        {"ca_secret": "a/b", "ca_config_map": ""},
        {"ca_secret": "a/b", "tls_ca": "x", "tls_cert": "x", "tls_key": "x"},
        {"ca_secret": "a/b", "certificate_life": 1},
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ca_|certificate_life"):
        OperatorSettings(**given)
