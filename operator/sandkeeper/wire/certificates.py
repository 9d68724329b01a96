"""Certificates in memory: a CA, what it issues, and requests for it. Our keys are EC P-256; a given CA's may be RSA.

Source: RFC 5280 (certificates), RFC 2986 (requests).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATE = timedelta(days=1)
"""How long before it was made a certificate is good already: clocks differ, by hours where one was set wrongly."""
_RENEWED_AFTER = 2 / 3
"""Of a certificate's life. Less by up to a tenth, so that those that were made together are not renewed together."""

CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
PrivateKey = ec.EllipticCurvePrivateKey
_PEM = serialization.Encoding.PEM


def new_key() -> PrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def cert_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(_PEM)


def subject(common_name: str, organizations: tuple[str, ...] = ()) -> x509.Name:
    """The common name is cut to X.520's bound; what anybody looks at are the names in the subjectAltName."""
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in organizations]
    return x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA: its certificate and its key."""

    certificate: x509.Certificate
    key: PrivateKey | rsa.RSAPrivateKey

    @classmethod
    def make(cls, name: str, life: timedelta, now: datetime | None = None) -> Self:
        key, now = new_key(), now or datetime.now(UTC)
        builder = (
            _builder(subject(name), subject(name), key.public_key(), now, now + life)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes) -> Self:
        """Raises ValueError: not PEM, no CA, a key of another kind or of another certificate."""
        authority = x509.load_pem_x509_certificate(certificate)
        private = serialization.load_pem_private_key(key, password=None)
        if not isinstance(private, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
            raise ValueError("a CA's key must be EC or RSA")
        if private.public_key() != authority.public_key():
            raise ValueError("the CA's key is not that of its certificate")
        try:
            basic = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        except x509.ExtensionNotFound:
            basic = x509.BasicConstraints(ca=False, path_length=None)
        if not basic.ca:
            raise ValueError("the certificate is no CA's")
        return cls(authority, private)

    def issue(
        self,
        key: ec.EllipticCurvePublicKey,
        common_name: str,
        usage: x509.ObjectIdentifier,
        *,
        life: timedelta,
        hosts: tuple[str, ...] = (),
        organizations: tuple[str, ...] = (),
        now: datetime | None = None,
    ) -> x509.Certificate:
        """A certificate for `hosts` (DNS names or IP addresses), no longer good than the CA is.

        usage: CLIENT or SERVER.
        """
        now = now or datetime.now(UTC)
        until = min(now + life, self.certificate.not_valid_after_utc)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _builder(subject(common_name, organizations), self.certificate.subject, key, now, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())


def request(key: PrivateKey, name: str) -> bytes:
    """A request (PEM) for the certificate of one DNS name."""
    names = x509.SubjectAlternativeName([x509.DNSName(name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name))
    return builder.add_extension(names, critical=False).sign(key, hashes.SHA256()).public_bytes(_PEM)


def dns_names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def renewal(certificate: x509.Certificate) -> datetime:
    """When it is time for another: two thirds into its life or a little before, always the same for the same one."""
    issued = certificate.not_valid_before_utc + BACKDATE
    early = 0.1 * (certificate.serial_number % 1009) / 1009
    return issued + (certificate.not_valid_after_utc - issued) * (_RENEWED_AFTER - early)


def _builder(
    name: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(until)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
