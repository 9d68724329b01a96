"""Images in a registry, by way of skopeo: auth file, mirrors and trust policy are the usual ones
(containers-auth.json(5), containers-registries.conf(5), containers-policy.json(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images import manifest, tools
from sandkeeper.shim.engines.oci.images.reference import Reference
from sandkeeper.shim.engines.oci.images.types import ImageSettings

SHIPPED_POLICY = Path(__file__).with_name("policy.json")
TAG = "image"

# What registries and Go's network library say, and what it means to a user. Only the words shown
# depend on this: all are retried alike.
_CAUSES = (
    (("x509", "tls:", "server gave http response"), "the registry's TLS was not accepted"),
    (("manifest unknown", "name unknown", "repository name not known"), "the image was not found"),
    (("unauthorized", "authentication required", "denied", "forbidden"), "access was denied"),
    (("rejected by policy", "signature"), "the node's trust policy rejects it"),
    (("toomanyrequests", "too many requests"), "the registry limits the rate of pulls"),
    (("no space left",), "the node's disk is full"),
    (
        (
            "connection refused",
            "no such host",
            "timeout",
            "no route",
            "unreachable",
            "deadline",
            "eof",
            "reset",
        ),
        "the registry cannot be reached",
    ),
    (("http status: 5", "status code 5", "server error"), "the registry failed"),
)


@dataclass(frozen=True, slots=True)
class Registry:
    settings: ImageSettings
    platform: manifest.Platform
    run: tools.Runner = tools.run

    async def resolve(self, ref: Reference) -> str:
        """The digest of this platform's manifest: one request to the registry, or two.

        Raises EngineError `ErrImagePull` (retryable).
        """
        argv = [*self._skopeo(), "inspect", "--raw", *self._access(ref, "")]
        try:
            content = await self.run([*argv, f"docker://{ref}"], {})
        except tools.ToolError as error:
            raise _pull_error(ref, str(error)) from None
        digest = manifest.digest_of(content)
        if ref.digest and digest != ref.digest:
            raise pull_error(ref, f"the registry's answer has another digest, {digest}")
        try:
            document = manifest.parse(content)
            if isinstance(document, manifest.Manifest):
                return digest
            return manifest.choose(document, self.platform).digest
        except manifest.ManifestError as error:
            raise pull_error(ref, f"its manifest: {error}") from None

    async def fetch(self, ref: Reference, digest: str, layout: Path, tmp: Path) -> None:
        """Copies the image into the OCI layout, as its tag `image`. Blobs that the layout has are
        not fetched again. The trust policy is checked here, against the pinned reference.

        Raises EngineError `ErrImagePull` (retryable).
        """
        argv = [
            *self._skopeo(),
            "copy",
            "--quiet",
            "--format=oci",
            "--dest-compress-format=gzip",
            *self._access(ref, "src-"),
        ]
        try:
            await self.run(
                [*argv, f"docker://{ref.at(digest)}", f"oci:{layout}:{TAG}"],
                {"TMPDIR": str(tmp)},
            )
        except tools.ToolError as error:
            raise _pull_error(ref, str(error)) from None

    def _skopeo(self) -> list[str]:
        policy = self.settings.image_policy or default_policy()
        variant = next((f"--override-variant={v}" for v in self.platform.variants if v), None)
        return [
            "skopeo",
            f"--override-os={self.platform.os}",
            f"--override-arch={self.platform.architecture}",
            *([variant] if variant and self.platform.architecture.startswith("arm") else []),
            *([f"--policy={policy}"] if policy else []),
            # Hidden but old and stable; skopeo 1.9 does not know the variable yet.
            *([f"--registries-conf={conf}"] if (conf := self.settings.registries_conf) else []),
        ]

    def _access(self, ref: Reference, side: str) -> list[str]:
        flags = []
        if self.settings.image_auth_file:
            flags.append(f"--{side}authfile={self.settings.image_auth_file}")
        if ref.domain in self.settings.insecure_registries:
            flags.append(f"--{side}tls-verify=false")
        return flags


def default_policy() -> Path | None:
    """None where skopeo finds one by itself, else the one shipped here, which accepts every image:
    skopeo does nothing at all without a policy."""
    home = os.environ.get("HOME", "")
    places = [Path("/etc/containers/policy.json")]
    if home:
        places.append(Path(home) / ".config/containers/policy.json")
    return None if any(place.exists() for place in places) else SHIPPED_POLICY


def pull_error(ref: Reference, why: str) -> EngineError:
    return EngineError("ErrImagePull", f"image {str(ref)!r} cannot be pulled: {why}", retryable=True)


def _pull_error(ref: Reference, words: str) -> EngineError:
    lowered = words.lower()
    cause = next((meaning for signs, meaning in _CAUSES if any(sign in lowered for sign in signs)), "")
    return pull_error(ref, f"{cause} ({words})" if cause else words)
