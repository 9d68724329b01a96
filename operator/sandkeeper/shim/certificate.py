"""This node's certificate, by the cluster's own means: asked for, kept on the disk, renewed in time.

The private key never leaves the node. The operator signs what the API server says is this node's shim
(control/signer). Who may call is read from the ConfigMap where the operator publishes its CA.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sandkeeper.api import SHIM_SIGNER
from sandkeeper.shim.kubeapi import KubeApi, KubeError, Raw
from sandkeeper.shim.settings import ShimSettings
from sandkeeper.wire.certificates import (
    PrivateKey,
    dns_names,
    issued_by,
    key_pem,
    new_key,
    renewal,
    request,
)
from sandkeeper.wire.tls import TLSFiles

log = logging.getLogger(__name__)

_REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
_USAGES = ["digital signature", "server auth"]
_LOOK_AGAIN = 60.0  # at the CA
_LEAST = 2.0  # between two looks, whatever is due
_POLL_FIRST, _POLL_MAX = 0.25, 5.0
_SAY_AGAIN = 60.0  # that nobody signs
_RETRY_FIRST, _RETRY_MAX = 1.0, 300.0


class Refused(Exception):
    """The request was denied, or what came back is no certificate of this node."""


def due(certificate: x509.Certificate | None, signer: x509.Certificate, now: datetime) -> bool:
    """Whether it is time to ask for another: there is none, its life is nearly over, or another CA signs now."""
    return certificate is None or not issued_by(certificate, signer) or now >= renewal(certificate)


class NodeCertificate:
    """`run` for ever; `ready` is set once there is something to show; `files` is what ServerTLS reads."""

    def __init__(
        self,
        settings: ShimSettings,
        api: KubeApi,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.files: TLSFiles = settings.requested_files
        self.ready = asyncio.Event()
        self._api = api
        self._clock = clock
        self._node = settings.node_name
        namespace, _, name = settings.kubernetes.ca_config_map.partition("/")
        self._config_map = f"/api/v1/namespaces/{quote(namespace)}/configmaps/{quote(name)}"
        self._current: x509.Certificate | None = None
        # A key that is not signed yet, and its request: asked for once, however often the answer is waited for.
        self._pending: tuple[PrivateKey, str] | None = None

    async def run(self) -> None:
        """Raises nothing: what fails is said, and tried again."""
        await asyncio.to_thread(self._load)
        retry = _RETRY_FIRST
        while True:
            try:
                wait = await self._look()
                retry = _RETRY_FIRST
            except (KubeError, Refused, OSError, ValueError) as error:
                log.log(
                    logging.ERROR if isinstance(error, Refused) else logging.WARNING,
                    "No new certificate for this node",
                    extra={"node": self._node, "error": str(error)},
                )
                wait, retry = retry, min(retry * 2, _RETRY_MAX)
            await asyncio.sleep(wait * random.uniform(0.8, 1.0))  # noqa: S311 - not for secrets

    async def _look(self) -> float:
        """One round; returns the seconds until the next."""
        authorities = await self._authorities()
        if due(self._current, authorities[0], self._clock()):
            await self._renew()
        if self._current is None:
            return _LEAST
        self.ready.set()
        due_at, until = renewal(self._current), self._current.not_valid_after_utc
        left = (due_at - self._clock()).total_seconds()
        # What is left after that is a third of its life: the CA is looked at ten times in all of it.
        return min(max(left, _LEAST), _LOOK_AGAIN, max(0.3 * (until - due_at).total_seconds(), _LEAST))

    async def _authorities(self) -> list[x509.Certificate]:
        """Whom to believe, the one that signs first; on disk as well."""
        try:
            data = (await self._api.get(self._config_map)).get("data") or {}
        except KubeError as error:
            if error.code != 404:
                raise
            data = {}
        text = str(data.get("ca.crt") or "")
        if not text:
            raise KubeError("the operator has not published its CA yet")
        found = x509.load_pem_x509_certificates(text.encode())
        await asyncio.to_thread(_replace, self.files.ca, text.encode())
        return found

    # A new one

    async def _renew(self) -> None:
        key, name = self._pending or await self._ask()
        pem = await self._answer(name)
        self._pending = None
        try:
            certificate = x509.load_pem_x509_certificate(pem)
        except ValueError as error:
            raise Refused(f"{name}: what was signed is no certificate: {error}") from error
        if certificate.public_key() != key.public_key() or self._node not in dns_names(certificate):
            raise Refused(f"{name}: what was signed is not this node's certificate")
        # One file for both: whoever reads it at any moment, after a power cut too, finds a pair that matches.
        await asyncio.to_thread(_replace, self.files.cert, pem + key_pem(key))
        self._current = certificate
        until = certificate.not_valid_after_utc.isoformat()
        log.info("There is a certificate for this node", extra={"node": self._node, "until": until})

    async def _ask(self) -> tuple[PrivateKey, str]:
        key = new_key()
        public = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        # The name tells of the key, so that a request whose answer was lost is not made twice.
        name = f"sandkeeper-shim-{hashlib.sha256(public).hexdigest()[:32]}"
        self._pending = key, name
        try:
            await self._api.create(_REQUESTS, request_object(name, request(key, self._node)))
        except KubeError as error:
            if error.code != 409:
                if error.code:  # it is certain that there is none
                    self._pending = None
                raise
        return key, name

    async def _answer(self, name: str) -> bytes:
        """The certificate that was signed. Raises Refused with the operator's words."""
        poll, waited, say = _POLL_FIRST, 0.0, _SAY_AGAIN
        while True:
            try:
                answer = await self._api.get(f"{_REQUESTS}/{name}")
            except KubeError as error:
                if error.code == 404:  # cleared away, or never made: the next round asks anew
                    self._pending = None
                raise
            try:
                found = verdict(answer)
            except Refused:
                self._pending = None
                raise
            if found:
                return found
            if waited >= say:
                say += _SAY_AGAIN
                log.warning(
                    "The operator has not signed this node's certificate yet",
                    extra={"node": self._node, "request": name},
                )
            await asyncio.sleep(poll)
            waited, poll = waited + poll, min(poll * 1.5, _POLL_MAX)

    # What there is from before

    def _load(self) -> None:
        folder = self.files.cert.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = kept(self.files.cert, self._node)
        self._current = found
        if found is not None and self.files.ca.exists() and self._clock() < found.not_valid_after_utc:
            self.ready.set()


def request_object(name: str, pem: bytes) -> Raw:
    """The CertificateSigningRequest of a PKCS #10 request."""
    spec = {"request": base64.b64encode(pem).decode(), "signerName": SHIM_SIGNER, "usages": _USAGES}
    labels = {"app.kubernetes.io/part-of": "sandkeeper"}
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
    }


def verdict(csr: Raw) -> bytes:
    """The certificate in a request; empty while there is no answer. Raises Refused."""
    status = csr.get("status") or {}
    for each in status.get("conditions") or []:
        if each.get("type") in ("Denied", "Failed"):
            name = (csr.get("metadata") or {}).get("name")
            raise Refused(f"{name}: {each['type']}: {each.get('reason')}: {each.get('message')}")
    try:
        return base64.b64decode(status.get("certificate") or "", validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refused(f"what was signed is no certificate: {error}") from error


def kept(path: Path, node: str) -> x509.Certificate | None:
    """The certificate in a file, if it is this node's and its key is there as well."""
    try:
        content = path.read_bytes()
        certificate = x509.load_pem_x509_certificate(content)
        private = content[content.index(b"-----BEGIN PRIVATE KEY-----") :]
        key = serialization.load_pem_private_key(private, password=None)
    except (OSError, ValueError, TypeError):
        return None
    fits = isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key()
    return certificate if fits and node in dns_names(certificate) else None


def _replace(path: Path, content: bytes) -> None:
    """All of it or none, for its owner alone. Leaves what is the same. Raises OSError."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)
    temporary.replace(path)
