"""Which CertificateSigningRequests of ours are signed: a pure function of the object, and the certificate itself.

Who asks is the API server's word (`spec.username`, `groups`, `extra`), and for which node their token is too. What is
in the request itself is anybody's: it must be what our shim writes, to the letter, and of what is signed only the
public key is taken from it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from sandkeeper.api import SHIM_SIGNER
from sandkeeper.control.ports import Raw
from sandkeeper.wire.certificates import SERVER, Issuer, subject
from sandkeeper.wire.ids import valid_node_name
from sandkeeper.wire.tls import OPERATOR_IDENTITY

NODE_EXTRA = "authentication.kubernetes.io/node-name"
"""What the API server adds to a token that is bound to a Pod (ServiceAccountTokenPodNodeInfo, Kubernetes 1.32)."""
USAGES = frozenset({"digital signature", "server auth"})
_LONGEST = 16 * 1024


@dataclass(frozen=True, slots=True)
class Leave:
    """Not ours, or done."""


@dataclass(frozen=True, slots=True)
class Deny:
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Approve:
    node: str


@dataclass(frozen=True, slots=True)
class Sign:
    """It is approved. life: as asked for, or as long as we give any."""

    node: str
    key: ec.EllipticCurvePublicKey
    life: timedelta


@dataclass(frozen=True, slots=True)
class Fail:
    """It is approved, by somebody else, and must not be signed."""

    reason: str
    message: str


Verdict = Leave | Deny | Approve | Sign | Fail


@dataclass(frozen=True, slots=True)
class Account:
    """The shims' ServiceAccount."""

    namespace: str
    name: str

    @property
    def user(self) -> str:
        return f"system:serviceaccount:{self.namespace}:{self.name}"

    @property
    def group(self) -> str:
        return f"system:serviceaccounts:{self.namespace}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request taken apart. node: of the token. parsed: None, where it is no request at all."""

    account: Account
    user: str
    groups: tuple[str, ...]
    nodes: tuple[str, ...]
    usages: tuple[str, ...]
    parsed: _Parsed | None

    @property
    def node(self) -> str:
        return self.nodes[0]


@dataclass(frozen=True, slots=True)
class _Parsed:
    key: Any
    subject: x509.Name
    signed: bool
    names: tuple[x509.GeneralName, ...]
    others: tuple[str, ...]


def judge(csr: Raw, account: Account, longest: timedelta) -> Verdict:
    """What is to be done about a CertificateSigningRequest. Pure; raises nothing, whatever is in it."""
    spec, status = csr.get("spec") or {}, csr.get("status") or {}
    if spec.get("signerName") != SHIM_SIGNER or status.get("certificate"):
        return Leave()
    told = {each.get("type") for each in status.get("conditions") or []}
    if told & {"Denied", "Failed"}:
        return Leave()
    asked = _taken_apart(spec, account)
    # In this order: what a rule looks at, those before it have found to be there.
    for reason, rule in _RULES:
        message = rule(asked)
        if message:
            return Fail(reason, message) if "Approved" in told else Deny(reason, message)
    if "Approved" not in told:
        return Approve(asked.node)
    assert asked.parsed is not None  # noqa: S101 - a rule has looked
    wanted = spec.get("expirationSeconds")
    life = timedelta(seconds=wanted) if isinstance(wanted, int) and wanted > 0 else longest
    return Sign(asked.node, asked.parsed.key, min(life, longest))


def certificate(sign: Sign, issuer: Issuer) -> x509.Certificate:
    """What the shim of a node shows: that node's name, and the right to serve."""
    return issuer.issue(sign.key, sign.node, SERVER, life=sign.life, hosts=(sign.node,))


# The rules: each says what is wrong, or nothing.


def _account(asked: _Asked) -> str:
    if asked.user == asked.account.user and asked.account.group in asked.groups:
        return ""
    return f"only {asked.account.user} may ask for a shim's certificate"


def _of_a_node(asked: _Asked) -> str:
    if len(asked.nodes) == 1 and asked.node:
        return ""
    return f"the token says nothing of its node (`{NODE_EXTRA}`): it must be a Pod's, of Kubernetes 1.32 or newer"


def _name_of_a_node(asked: _Asked) -> str:
    if not valid_node_name(asked.node):
        return f"{asked.node!r} cannot be the name of a SandboxNode"
    # A shim must never have the name by which shims know their operator.
    return f"no node may be called {OPERATOR_IDENTITY}" if asked.node == OPERATOR_IDENTITY else ""


def _usages(asked: _Asked) -> str:
    given = set(asked.usages)
    if USAGES <= given <= USAGES | {"key encipherment"}:
        return ""
    return "usages must be `digital signature` and `server auth`"


def _readable(asked: _Asked) -> str:
    if asked.parsed is None:
        return "request must be one PKCS #10 request in PEM"
    return "" if asked.parsed.signed else "request must be signed with the key that it holds"


def _key(asked: _Asked) -> str:
    key = asked.parsed and asked.parsed.key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return ""
    return "the key must be EC P-256"


def _subject(asked: _Asked) -> str:
    if asked.parsed and asked.parsed.subject == subject(asked.node):
        return ""
    return f"subject must be the common name {asked.node} alone: the token is of that node"


def _names(asked: _Asked) -> str:
    if asked.parsed and asked.parsed.names == (x509.DNSName(asked.node),):
        return ""
    return f"subjectAltName must be the DNS name {asked.node} alone: the token is of that node"


def _extensions(asked: _Asked) -> str:
    others = asked.parsed.others if asked.parsed else ()
    return f"no extension but subjectAltName may be asked for: {', '.join(others)}" if others else ""


_RULES: tuple[tuple[str, Callable[[_Asked], str]], ...] = (
    # reason of the denial   what is wrong
    ("NotAShim", _account),
    ("NoNodeName", _of_a_node),
    ("NoNodeName", _name_of_a_node),
    ("WrongUsages", _usages),
    ("Unreadable", _readable),
    ("WrongKey", _key),
    ("WrongSubject", _subject),
    ("WrongNames", _names),
    ("WrongExtensions", _extensions),
)


def _taken_apart(spec: Raw, account: Account) -> _Asked:
    extra = spec.get("extra") or {}
    return _Asked(
        account=account,
        user=str(spec.get("username") or ""),
        groups=tuple(spec.get("groups") or ()),
        nodes=tuple(extra.get(NODE_EXTRA) or ()),
        usages=tuple(spec.get("usages") or ()),
        parsed=_parsed(str(spec.get("request") or "")),
    )


def _parsed(encoded: str) -> _Parsed | None:
    if len(encoded) > _LONGEST:
        return None
    try:
        pem = base64.b64decode(encoded, validate=True)
        if pem.count(b"-----BEGIN ") != 1:
            return None
        found = x509.load_pem_x509_csr(pem)
        names: tuple[x509.GeneralName, ...] = ()
        others = []
        for extension in found.extensions:
            if isinstance(extension.value, x509.SubjectAlternativeName):
                names = tuple(extension.value)
            else:
                others.append(extension.oid.dotted_string)
        return _Parsed(found.public_key(), found.subject, found.is_signature_valid, names, tuple(others))
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
        binascii.Error,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        return None
