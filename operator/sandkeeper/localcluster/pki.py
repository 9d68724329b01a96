"""The local cluster's own CA and the certificates of it: API server, administrator, operator, shims.

EC P-256; for one machine and a short life. Source: RFC 5280; Kubernetes' "PKI certificates and requirements".
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandkeeper.wire.tls import TLSFiles

LIFE = timedelta(days=365)
_CLIENT, _SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class CA:
    """A certificate authority whose files are in `folder` (ca.crt, ca.key)."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, name: str) -> CA:
        """Makes the CA, or takes the one that is in `folder` already."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        ca = cls(folder)
        if not (ca.cert.exists() and ca.key.exists()):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = _name(name)
            certificate = (
                _builder(subject, subject, key.public_key())
                .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
                .add_extension(_key_usage(signs_certificates=True), critical=True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                .sign(key, hashes.SHA256())
            )
            _write(ca.key, _pem(key))
            _write(ca.cert, certificate.public_bytes(serialization.Encoding.PEM))
        return ca

    @property
    def cert(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        return self.folder / "ca.key"

    def server(self, name: str, hosts: tuple[str, ...], *, file: str | None = None) -> TLSFiles:
        """A server's certificate for `hosts` (DNS names or IP addresses), as <file>.crt and <file>.key; default:
        `name`."""
        # X.520's bound; what clients look at is `hosts`.
        return self._issue(file or name, name[:64], (), hosts, (_SERVER,))

    def client(
        self,
        name: str,
        *,
        organizations: tuple[str, ...] = (),
        hosts: tuple[str, ...] = (),
        file: str | None = None,
    ) -> TLSFiles:
        """A client's certificate: to Kubernetes `name` is the user and `organizations` the groups; `hosts` are
        the names that a shim looks at. file: <file>.crt and <file>.key; default: `name`."""
        return self._issue(file or name, name, organizations, hosts, (_CLIENT,))

    def _issue(
        self,
        file: str,
        common_name: str,
        organizations: tuple[str, ...],
        hosts: tuple[str, ...],
        usages: tuple[x509.ObjectIdentifier, ...],
    ) -> TLSFiles:
        files = TLSFiles(ca=self.cert, cert=self.folder / f"{file}.crt", key=self.folder / f"{file}.key")
        if files.cert.exists() and files.key.exists():
            return files
        issuer = x509.load_pem_x509_certificate(self.cert.read_bytes())
        issuer_key = serialization.load_pem_private_key(self.key.read_bytes(), password=None)
        if not isinstance(issuer_key, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{self.key} must hold an EC key")
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(common_name, organizations), issuer.subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
            )
        )
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        _write(files.key, _pem(key))
        _write(files.cert, builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return files


def signing_key(path: Path) -> Path:
    """A private key for service account tokens; the API server derives the public one, of SEC 1 files only."""
    if not path.exists():
        key, sec1 = ec.generate_private_key(ec.SECP256R1()), serialization.PrivateFormat.TraditionalOpenSSL
        _write(path, key.private_bytes(serialization.Encoding.PEM, sec1, serialization.NoEncryption()))
    return path


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks differ, by hours where one was set wrongly
        .not_valid_after(now + LIFE)
    )


def _name(common_name: str, organizations: tuple[str, ...] = ()) -> x509.Name:
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in organizations]
    return x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


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


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
