"""Image references, parsed and normalized as Docker and containerd do.

Source: github.com/distribution/reference (regexp.go, normalize.go). Where that
accepts any digest algorithm, only sha256 is accepted here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sandkeeper.shim.engines.base import EngineError

MAX_NAME_LENGTH = 255  # reference.RepositoryNameTotalLengthMax
MAX_REFERENCE_LENGTH = MAX_NAME_LENGTH + 1 + 128 + 1 + len("sha256:") + 64

_DOMAIN_COMPONENT = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_HOST = rf"(?:{_DOMAIN_COMPONENT}(?:\.{_DOMAIN_COMPONENT})*|\[(?:[a-fA-F0-9:]+)\])"
_DOMAIN = re.compile(rf"{_HOST}(?::[0-9]+)?", re.ASCII)
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|[-]+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[a-f0-9]{64}", re.ASCII)
_ANONYMOUS = re.compile(r"[a-f0-9]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A fully qualified reference. With a digest, the tag says nothing any more and is empty."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.path}"

    def __str__(self) -> str:
        return self.at(self.digest) if self.digest else f"{self.name}:{self.tag}"

    def at(self, digest: str) -> str:
        """The same repository, pinned."""
        return f"{self.name}@{digest}"


def parse(text: str) -> Reference:
    """`busybox` -> docker.io/library/busybox:latest. Raises EngineError(`InvalidImageName`)."""
    if not text:
        raise _invalid(text, "it must not be empty")
    if len(text) > MAX_REFERENCE_LENGTH:
        raise _invalid(text, f"it must have at most {MAX_REFERENCE_LENGTH} characters")
    if _ANONYMOUS.fullmatch(text):
        raise _invalid(text, "a repository name must not be 64 hexadecimal characters")
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise _invalid(text, "the digest must be sha256: and 64 lower-case hexadecimal characters")
    domain, remote = _split_domain(rest)
    # A colon in what is left can only begin a tag: ports belong to the domain.
    path, colon, tag = remote.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise _invalid(
            text, "the tag must be 1 to 128 letters, digits, '_', '.' and '-', not beginning with '.' or '-'"
        )
    if not _DOMAIN.fullmatch(domain):
        raise _invalid(text, "the registry must be a host name or address, with or without a port")
    if path != path.lower():
        raise _invalid(text, "the repository name must be lower case")
    if not _PATH.fullmatch(path):
        raise _invalid(
            text,
            "each part of the repository name must be letters and digits, joined by '.', '_', '__' or '-'",
        )
    if len(domain) + 1 + len(path) > MAX_NAME_LENGTH:
        raise _invalid(text, f"the repository name must have at most {MAX_NAME_LENGTH} characters")
    return Reference(domain, path, tag="" if digest else tag or "latest", digest=digest)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def _split_domain(name: str) -> tuple[str, str]:
    """splitDockerDomain of normalize.go: the first part is a registry only if it looks like one."""
    first, slash, remote = name.partition("/")
    looks_like_host = any(c in first for c in ".:") or first == "localhost" or first != first.lower()
    if not slash or not looks_like_host:
        first, remote = "docker.io", name
    if first == "index.docker.io":
        first = "docker.io"
    if first == "docker.io" and "/" not in remote:
        remote = f"library/{remote}"
    return first, remote


def _invalid(text: str, why: str) -> EngineError:
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return EngineError("InvalidImageName", f"image {shown!r} is not a valid reference: {why}")
