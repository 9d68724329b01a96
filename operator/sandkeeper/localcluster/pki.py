"""The local cluster's own CA and the certificates of it: API server, administrator, operator, shims.

EC P-256; for one machine and a short life. Source: RFC 5280; Kubernetes' "PKI certificates and requirements".
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from sandkeeper.wire.certificates import CLIENT, SERVER, Issuer, cert_pem, key_pem, new_key
from sandkeeper.wire.tls import TLSFiles

CA_LIFE = timedelta(days=3653)
LIFE = timedelta(days=365)


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
            made = Issuer.make(name, CA_LIFE)
            _write(ca.key, key_pem(made.key))
            _write(ca.cert, cert_pem(made.certificate))
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
        return self._issue(file or name, name, (), hosts, SERVER)

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
        return self._issue(file or name, name, organizations, hosts, CLIENT)

    def _issue(
        self,
        file: str,
        common_name: str,
        organizations: tuple[str, ...],
        hosts: tuple[str, ...],
        usage: x509.ObjectIdentifier,
    ) -> TLSFiles:
        files = TLSFiles(ca=self.cert, cert=self.folder / f"{file}.crt", key=self.folder / f"{file}.key")
        if files.cert.exists() and files.key.exists():
            return files
        issuer, key = Issuer.from_pem(self.cert.read_bytes(), self.key.read_bytes()), new_key()
        certificate = issuer.issue(
            key.public_key(), common_name, usage, life=LIFE, hosts=hosts, organizations=organizations
        )
        _write(files.key, key_pem(key))
        _write(files.cert, cert_pem(certificate))
        return files


def signing_key(path: Path) -> Path:
    """A private key for service account tokens; the API server derives the public one, of SEC 1 files only."""
    if not path.exists():
        sec1 = serialization.PrivateFormat.TraditionalOpenSSL
        _write(path, new_key().private_bytes(serialization.Encoding.PEM, sec1, serialization.NoEncryption()))
    return path


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    temporary.replace(path)
