"""Which requests for a shim's certificate are signed: a row for each rule and each attack."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandkeeper.control import signer
from sandkeeper.control.ports import Raw
from sandkeeper.control.signer import Account, Approve, Deny, Fail, Leave, Sign, judge
from sandkeeper.wire.certificates import (
    BACKDATE,
    Issuer,
    cert_pem,
    dns_names,
    issued_by,
    key_pem,
    new_key,
    renewal,
    request,
    subject,
)

NODE, OTHER = "node-1", "node-2"
SHIMS = Account("sandkeeper-node", "sandkeeper-shim")
WEEK = timedelta(days=7)
KEY = new_key()
Change = Callable[[Raw], object]


def csr(node: str = NODE, **spec: Any) -> Raw:
    """As our shim makes it on `node`, or with some of it otherwise."""
    return {
        "metadata": {"name": "sandkeeper-shim-1"},
        "spec": {
            "signerName": "sandkeeper.dev/shim",
            "username": SHIMS.user,
            "groups": ["system:serviceaccounts", SHIMS.group, "system:authenticated"],
            "extra": {signer.NODE_EXTRA: [node], "authentication.kubernetes.io/pod-name": ["shim-x"]},
            "usages": ["digital signature", "server auth"],
            "request": encoded(request(KEY, node)),
            **spec,
        },
    }


def encoded(pem: bytes) -> str:
    return base64.b64encode(pem).decode()


def pkcs10(
    *names: x509.GeneralName,
    name: x509.Name | None = None,
    key: Any = KEY,
    more: tuple[x509.ExtensionType, ...] = (),
) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(NODE) if name is None else name)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    for each in more:
        builder = builder.add_extension(each, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    made = builder.sign(key, algorithm)
    return encoded(made.public_bytes(serialization.Encoding.PEM))


def forged() -> str:
    """Somebody else's public key in a request that was signed with another."""
    der = x509.load_pem_x509_csr(request(KEY, NODE)).public_bytes(serialization.Encoding.DER)
    public = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    mine, theirs = KEY.public_key().public_bytes(*public), new_key().public_key().public_bytes(*public)
    assert mine in der
    block = base64.encodebytes(der.replace(mine, theirs)).decode()
    pem = f"-----BEGIN CERTIFICATE REQUEST-----\n{block}-----END CERTIFICATE REQUEST-----\n"
    return encoded(pem.encode())


DNS = x509.DNSName(NODE)
CN = NameOID.COMMON_NAME
WITH_ORGANIZATION = x509.Name(
    [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters"), x509.NameAttribute(CN, NODE)]
)
SMALL_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - that is the point

REFUSED: dict[str, tuple[str, Raw]] = {
    "another user": ("NotAShim", csr(username="system:serviceaccount:default:sandkeeper-shim")),
    "the operator itself": (
        "NotAShim",
        csr(username="system:serviceaccount:sandkeeper-system:sandkeeper-operator"),
    ),
    "a user without a name": ("NotAShim", csr(username="")),
    "another account beside the shims'": (
        "NotAShim",
        csr(username="system:serviceaccount:sandkeeper-node:default"),
    ),
    "the name without the group": ("NotAShim", csr(groups=["system:authenticated"])),
    "a token of no node": ("NoNodeName", csr(extra={})),
    "no extras at all": ("NoNodeName", csr(extra=None)),
    "a token of two nodes": ("NoNodeName", csr(extra={signer.NODE_EXTRA: [NODE, OTHER]})),
    "a token of an empty node": ("NoNodeName", csr(extra={signer.NODE_EXTRA: [""]})),
    "a node of an impossible name": ("NoNodeName", csr("Node_1")),
    "a node called as the operator is": ("NoNodeName", csr("sandkeeper-operator")),
    "another node's name": ("WrongSubject", csr(request=encoded(request(KEY, OTHER)))),
    "another node's token": ("WrongSubject", csr(extra={signer.NODE_EXTRA: [OTHER]})),
    "the operator's identity": ("WrongSubject", csr(request=encoded(request(KEY, "sandkeeper-operator")))),
    "a group": ("WrongSubject", csr(request=pkcs10(DNS, name=WITH_ORGANIZATION))),
    "no subject": ("WrongSubject", csr(request=pkcs10(DNS, name=x509.Name([])))),
    "no names": ("WrongNames", csr(request=pkcs10())),
    "another node among the names": ("WrongNames", csr(request=pkcs10(DNS, x509.DNSName(OTHER)))),
    "another node for the name": ("WrongNames", csr(request=pkcs10(x509.DNSName(OTHER)))),
    "the operator's name in the names": (
        "WrongNames",
        csr(request=pkcs10(DNS, x509.DNSName("sandkeeper-operator"))),
    ),
    "every name": ("WrongNames", csr(request=pkcs10(x509.DNSName("*")))),
    "an address": (
        "WrongNames",
        csr(request=pkcs10(DNS, x509.IPAddress(IPv4Address("192.0.2.1")))),
    ),
    "a URI": ("WrongNames", csr(request=pkcs10(DNS, x509.UniformResourceIdentifier("spiffe://x/operator")))),
    "the right to sign": (
        "WrongExtensions",
        csr(request=pkcs10(DNS, more=(x509.BasicConstraints(ca=True, path_length=None),))),
    ),
    "the right to call, in the request": (
        "WrongExtensions",
        csr(request=pkcs10(DNS, more=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]),))),
    ),
    "the right to call": ("WrongUsages", csr(usages=["digital signature", "client auth"])),
    "the right to call as well": (
        "WrongUsages",
        csr(usages=["digital signature", "server auth", "client auth"]),
    ),
    "the right to sign, as a usage": (
        "WrongUsages",
        csr(usages=["digital signature", "server auth", "cert sign"]),
    ),
    "any use": ("WrongUsages", csr(usages=["any"])),
    "no usages": ("WrongUsages", csr(usages=None)),
    "a small RSA key": ("WrongKey", csr(request=pkcs10(DNS, key=SMALL_RSA))),
    "a small curve": ("WrongKey", csr(request=pkcs10(DNS, key=ec.generate_private_key(ec.SECP192R1())))),
    "a key of another kind": ("WrongKey", csr(request=pkcs10(DNS, key=ed25519.Ed25519PrivateKey.generate()))),
    "somebody else's public key": ("Unreadable", csr(request=forged())),
    "nothing": ("Unreadable", csr(request="")),
    "no base64": ("Unreadable", csr(request="-----")),
    "no request": ("Unreadable", csr(request=encoded(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"))),
    "two requests": ("Unreadable", csr(request=encoded(request(KEY, NODE) + request(KEY, OTHER)))),
    "a very long one": ("Unreadable", csr(request=encoded(request(KEY, NODE) + b" " * 20_000))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_denied_and_told_why(case: str) -> None:
    reason, body = REFUSED[case]
    verdict = judge(body, SHIMS, WEEK)
    assert isinstance(verdict, Deny), verdict
    assert verdict.reason == reason
    assert verdict.message


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_not_signed_though_somebody_approved_it(case: str) -> None:
    reason, body = REFUSED[case]
    verdict = judge({**body, "status": approved()}, SHIMS, WEEK)
    assert isinstance(verdict, Fail), verdict
    assert verdict.reason == reason


def test_where_the_api_server_names_no_node_the_denial_says_what_is_missing() -> None:
    verdict = judge(csr(extra={}), SHIMS, WEEK)
    assert isinstance(verdict, Deny)
    assert "authentication.kubernetes.io/node-name" in verdict.message
    assert "1.32" in verdict.message


def approved(*more: str) -> Raw:
    return {"conditions": [{"type": each, "status": "True"} for each in ("Approved", *more)]}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(csr(), id="as our shim makes it"),
        pytest.param(csr(".".join(["node" * 10] * 4)), id="a long name"),
        pytest.param(
            csr(usages=["key encipherment", "server auth", "digital signature"]), id="as kubelet asks"
        ),
    ],
)
def test_a_shims_own_is_approved_and_then_signed(body: Raw) -> None:
    node = body["spec"]["extra"][signer.NODE_EXTRA][0]
    assert judge(body, SHIMS, WEEK) == Approve(node)
    signed = judge({**body, "status": approved()}, SHIMS, WEEK)
    assert isinstance(signed, Sign)
    assert (signed.node, signed.life) == (node, WEEK)
    assert signed.key == KEY.public_key()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(csr(signerName="kubernetes.io/kubelet-serving"), id="another signer"),
        pytest.param({**csr(), "status": {"certificate": "LS0t", **approved()}}, id="signed"),
        pytest.param({**csr(username="x"), "status": {"certificate": "LS0t"}}, id="signed, by whomever"),
        pytest.param({**csr(), "status": {"conditions": [{"type": "Denied"}]}}, id="denied"),
        pytest.param({**csr(), "status": approved("Failed")}, id="failed"),
        pytest.param({}, id="nothing"),
    ],
)
def test_what_is_not_ours_or_done_is_left_alone(body: Raw) -> None:
    assert judge(body, SHIMS, WEEK) == Leave()


@pytest.mark.parametrize(
    ("asked", "given"),
    [(None, WEEK), (600, timedelta(seconds=600)), (2**31 - 1, WEEK), (-1, WEEK), ("long", WEEK)],
)
def test_no_certificate_is_good_for_longer_than_we_give_any(asked: Any, given: timedelta) -> None:
    verdict = judge({**csr(expirationSeconds=asked), "status": approved()}, SHIMS, WEEK)
    assert isinstance(verdict, Sign)
    assert verdict.life == given


def signed(issuer: Issuer, **spec: Any) -> x509.Certificate:
    verdict = judge({**csr(**spec), "status": approved()}, SHIMS, WEEK)
    assert isinstance(verdict, Sign)
    return signer.certificate(verdict, issuer)


def test_the_certificate_is_that_nodes_and_may_only_serve() -> None:
    issuer = Issuer.make("test", timedelta(days=365))
    made = signed(issuer)
    assert dns_names(made) == [NODE]
    assert made.subject == subject(NODE)
    assert issued_by(made, issuer.certificate)
    assert made.public_key() == KEY.public_key()
    uses = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_certificate_ends_with_its_ca() -> None:
    issuer = Issuer.make("test", timedelta(days=1))
    assert signed(issuer).not_valid_after_utc == issuer.certificate.not_valid_after_utc


def test_a_replayed_request_gives_its_sender_no_key() -> None:
    """Others of the cluster can read requests; whoever sends one again must be that node, and has no key of it."""
    body = csr()
    assert judge(body, SHIMS, WEEK) == judge(body, SHIMS, WEEK) == Approve(NODE)
    assert isinstance(judge(csr(OTHER, request=body["spec"]["request"]), SHIMS, WEEK), Deny)


def test_renewal_is_due_well_before_the_end_and_not_for_all_at_once() -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    issuer = Issuer.make("test", timedelta(days=365), now)
    due = [
        renewal(issuer.issue(KEY.public_key(), NODE, ExtendedKeyUsageOID.SERVER_AUTH, life=WEEK, now=now))
        for _ in range(50)
    ]
    assert now + WEEK * 0.56 < min(due) < max(due) <= now + WEEK * 2 / 3
    assert len(set(due)) > 10
    assert timedelta(hours=1) < BACKDATE


@pytest.mark.parametrize("which", ["another CA's key", "no CA", "no PEM"])
def test_what_cannot_sign_is_no_issuer(which: str) -> None:
    one, two = Issuer.make("one", WEEK), Issuer.make("two", WEEK)
    cert, key = cert_pem(one.certificate), key_pem(two.key)
    if which == "no CA":
        own = new_key()
        leaf = one.issue(own.public_key(), NODE, ExtendedKeyUsageOID.SERVER_AUTH, life=WEEK)
        cert, key = cert_pem(leaf), key_pem(own)
    if which == "no PEM":
        cert = b"x"
    with pytest.raises(ValueError, match=r".+"):
        Issuer.from_pem(cert, key)
