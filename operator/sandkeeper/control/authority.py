"""The CA by which operator and shims know each other, kept in the cluster, and the operator's own certificate.

The CA is in a Secret, made once by whichever operator comes first, or by somebody else beforehand. Its certificate is
published in a ConfigMap, where shims read whom to believe. The operator signs itself a certificate that is on no disk.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol

from cryptography import x509

from sandkeeper.control.ports import Conflict, Gone, Raw
from sandkeeper.wire.certificates import CLIENT, Issuer, cert_pem, issued_by, key_pem, new_key, renewal
from sandkeeper.wire.tls import OPERATOR_IDENTITY, TLSMemory

log = logging.getLogger(__name__)

CA_LIFE = timedelta(days=3653)
BUNDLE = "ca.crt"
"""Key of the ConfigMap: the CAs to believe, in PEM; the first is the one that signs."""
Name = tuple[str, str]
"""Namespace and name."""


class Kube(Protocol):
    async def get_secret(self, namespace: str, name: str) -> Raw: ...
    async def create_secret(self, namespace: str, body: Raw) -> Raw: ...
    async def get_config_map(self, namespace: str, name: str) -> Raw: ...
    async def patch_config_map(self, namespace: str, name: str, body: Raw) -> Raw: ...


class Authority:
    """`refresh` brings all of it up to date; one that was cut off, wherever, is mended by the next."""

    def __init__(
        self,
        kube: Kube,
        *,
        secret: Name,
        config_map: Name,
        life: timedelta,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """life: of the operator's own certificate."""
        self._kube = kube
        self._secret = secret
        self._config_map = config_map
        self._life = life
        self._clock = clock
        self._own: x509.Certificate | None = None
        self.issuer: Issuer | None = None
        self.tls = TLSMemory()

    async def refresh(self) -> None:
        """Reads the CA, or makes it; publishes it; renews the operator's certificate.

        Raises KubeError, and ValueError for a Secret that holds no CA: it is never written over.
        """
        issuer, bundle = ca_of(await self._ca())
        if self.issuer is not None and self.issuer.certificate != issuer.certificate:
            log.warning("There is another CA: certificates are made anew")
        # Before anybody shows a certificate of it.
        await self._publish(bundle)
        self.issuer = issuer
        self._renew(issuer, bundle)

    def ends(self) -> dict[str, datetime]:
        """When the CA's certificate and the operator's own run out."""
        held = {"ca": self.issuer.certificate if self.issuer else None, "operator": self._own}
        return {which: each.not_valid_after_utc for which, each in held.items() if each is not None}

    async def _ca(self) -> Raw:
        try:
            return await self._kube.get_secret(*self._secret)
        except Gone:
            pass
        namespace, name = self._secret
        made = Issuer.make("sandkeeper", CA_LIFE, self._clock())
        try:
            answer = await self._kube.create_secret(namespace, secret_of(name, made))
        except Conflict:
            return await self._kube.get_secret(*self._secret)  # another operator was quicker
        log.info("Made a CA", extra={"namespace": namespace, "object_name": name})
        return answer

    async def _publish(self, bundle: bytes) -> None:
        there = await self._kube.get_config_map(*self._config_map)
        text = bundle.decode()
        if (there.get("data") or {}).get(BUNDLE) != text:
            await self._kube.patch_config_map(*self._config_map, {"data": {BUNDLE: text}})

    def _renew(self, issuer: Issuer, bundle: bytes) -> None:
        own, now = self._own, self._clock()
        if own is not None and issued_by(own, issuer.certificate) and now < renewal(own):
            _, cert, key = self.tls.read()
        else:
            fresh = new_key()
            self._own = issuer.issue(
                fresh.public_key(),
                OPERATOR_IDENTITY,
                CLIENT,
                life=self._life,
                hosts=(OPERATOR_IDENTITY,),
                now=now,
            )
            cert, key = cert_pem(self._own), key_pem(fresh)
        self.tls.replace(bundle, cert, key)


def secret_of(name: str, ca: Issuer) -> Raw:
    """The Secret of a CA, as cert-manager has it as well."""
    certificate = cert_pem(ca.certificate)
    data = {"tls.crt": certificate, "tls.key": key_pem(ca.key), "ca.crt": certificate}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "sandkeeper"}},
        "type": "kubernetes.io/tls",
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }


def ca_of(secret: Raw) -> tuple[Issuer, bytes]:
    """The CA that signs, and the bundle of those to believe: itself first, then what else is in `ca.crt`.

    Raises ValueError saying what is wrong with it.
    """
    data = secret.get("data") or {}
    try:
        parts = {key: base64.b64decode(data.get(key) or "") for key in ("tls.crt", "tls.key", "ca.crt")}
        issuer = Issuer.from_pem(parts["tls.crt"], parts["tls.key"])
        others = x509.load_pem_x509_certificates(parts["ca.crt"]) if parts["ca.crt"] else []
    except (ValueError, TypeError, binascii.Error) as error:
        raise ValueError(f"the CA's Secret cannot be used: {error}") from error
    believed = dict.fromkeys([issuer.certificate, *others])
    return issuer, b"".join(cert_pem(each) for each in believed)
