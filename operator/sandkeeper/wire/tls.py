"""Mutual TLS between operator and shim.

Both sides show a certificate of one private CA. The client checks the node's name in the server's certificate
(or a hostile node could answer for another); the server accepts only the identities that it was told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

OPERATOR_IDENTITY = "sandkeeper-operator"
"""The operator's name: a DNS name in its certificate's subjectAltName, or the common name."""


class TLSSource(Protocol):
    """The CA, our certificate and its key, wherever they are kept."""

    def read(self) -> tuple[bytes, bytes, bytes]: ...
    def stamp(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class TLSFiles:
    """PEM files: the CA that the other side's certificate must come from, our certificate, its private key."""

    ca: Path
    cert: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """(ca, certificate, key). Raises OSError naming the file that cannot be read."""
        return Path(self.ca).read_bytes(), Path(self.cert).read_bytes(), Path(self.key).read_bytes()

    def stamp(self) -> tuple[int, ...]:
        """Differs when a file was changed or replaced. Raises OSError as `read` does."""
        stats = [Path(file).stat() for file in (self.ca, self.cert, self.key)]
        return tuple(part for stat in stats for part in (stat.st_mtime_ns, stat.st_ino))


class TLSMemory:
    """The same for what is on no disk. `replace` is seen as the replacement of files is."""

    def __init__(self) -> None:
        self._held: tuple[bytes, bytes, bytes] | None = None
        self._count = 0

    def replace(self, ca: bytes, cert: bytes, key: bytes) -> None:
        if self._held != (ca, cert, key):
            self._held, self._count = (ca, cert, key), self._count + 1

    def read(self) -> tuple[bytes, bytes, bytes]:
        """As of TLSFiles. Raises OSError where there is nothing yet."""
        if self._held is None:
            raise FileNotFoundError("there is no certificate yet")
        return self._held

    def stamp(self) -> tuple[int, ...]:
        """As of TLSFiles; raises nothing."""
        return (self._count,)


@dataclass(frozen=True, slots=True)
class ClientTLS:
    files: TLSSource

    def credentials(self) -> grpc.ChannelCredentials:
        ca, cert, key = self.files.read()
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """A server that demands a client certificate. Its own certificate is read anew when its file changes, so
    that a rotation needs no restart and cuts no stream."""

    files: TLSFiles

    def credentials(self) -> grpc.ServerCredentials:
        last = self.files.stamp()  # before reading: what changes in between is read again
        current = self._configuration()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal last
            try:
                stamp = self.files.stamp()
                if stamp == last:
                    return None
                last, renewed = stamp, self._configuration()
            except OSError:
                return None  # in mid-replacement: the old one still serves
            return renewed

        # The stubs do not know that None ("nothing new") is an answer; grpc's documentation does.
        return grpc.dynamic_ssl_server_credentials(
            current,
            fetch,  # type: ignore[arg-type]
            require_client_authentication=True,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        ca, cert, key = self.files.read()
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def identities(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """The names that a peer's verified certificate carries: the DNS names of its subjectAltName, or, where it
    has no subjectAltName at all, the common name (RFC 6125, section 6.4.4)."""
    if auth_context.get("x509_subject_alternative_name"):
        names = auth_context.get("peer_dns", ())
    else:
        names = auth_context.get("x509_common_name", ())
    return frozenset(name.decode("utf-8", "replace") for name in names)


def allowed(peer: str, auth_context: Mapping[str, Iterable[bytes]], permitted: frozenset[str]) -> bool:
    """Whether a peer may call: over a unix socket (its mode, 0600, is the guard) always, over TLS with a
    permitted identity; otherwise, plain TCP among it, never.

    peer, auth_context: what gRPC's ServicerContext says.
    """
    if b"ssl" in auth_context.get("transport_security_type", ()):
        return bool(identities(auth_context) & permitted)
    return peer.startswith("unix:")


async def require_identity(
    context: grpc.aio.ServicerContext[Any, Any], permitted: frozenset[str] = frozenset({OPERATOR_IDENTITY})
) -> None:
    """Ends a call with PERMISSION_DENIED unless its peer is `allowed`."""
    auth_context = context.auth_context()
    if not allowed(context.peer(), auth_context, permitted):
        names = ", ".join(sorted(identities(auth_context))) or "none"
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"the certificate's names are {names}; none of them may call"
        )
