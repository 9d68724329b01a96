"""Where etcd, kube-apiserver and kubectl come from: first match wins.

$KUBEBUILDER_ASSETS, PATH, our cache, a download of the upstream envtest archive, a build from the pinned Go modules.
`python -m sandkeeper.localcluster.binaries` says where each was found, and makes what is missing; with `--tests`
also what only the tests need: two containerds (`containerd_sources`) and kind's reader of configurations.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from sandkeeper.localcluster import gobuild

NAMES = ("etcd", "kube-apiserver", "kubectl")
KUBECTL_MINIMUM = (1, 29)  # selectable fields and `kubectl wait --for=jsonpath` without a value came by then
ENVTEST_RELEASE = "v1.36.0"
ENVTEST_INDEX = (
    "https://raw.githubusercontent.com/kubernetes-sigs/controller-tools/HEAD/envtest-releases.yaml"
)
CONNECT_TIMEOUT = 5.0

Say = Callable[[str], None]


class BinariesError(Exception):
    """A binary is missing and could not be had. The message says what was tried and what would help."""


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    path: Path
    origin: str


def cache_root() -> Path:
    """${XDG_CACHE_HOME:-~/.cache}/sandkeeper."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sandkeeper"


def cache_dir(module: Path = gobuild.MODULE) -> Path:
    """The folder of binaries that the pins in go.mod and go.sum, and programs of ours, ask for: another pin, another
    folder."""
    digest = hashlib.sha256()
    for path in (module / "go.mod", module / "go.sum", *sorted(module.glob("*.go"))):
        digest.update(path.read_bytes())
    return cache_root() / "bin" / digest.hexdigest()[:16]


def find(name: str, *, environ: Mapping[str, str] | None = None) -> Found | None:
    """The binary as it is there already, or None."""
    environ = os.environ if environ is None else environ
    assets = environ.get("KUBEBUILDER_ASSETS")
    if assets and executable(Path(assets) / name):
        return Found(name, Path(assets) / name, "$KUBEBUILDER_ASSETS")
    on_path = shutil.which(name, path=environ.get("PATH"))
    if on_path and (name != "kubectl" or _kubectl_fits(Path(on_path))):
        return Found(name, Path(on_path), "PATH")
    if executable(cached := cache_dir() / name):
        return Found(name, cached, "cache")
    return None


def ensure(names: tuple[str, ...] = NAMES, *, say: Say | None = None) -> dict[str, Found]:
    """name -> where it is; what is missing is downloaded or built first. Raises BinariesError."""
    say = say or (lambda _line: None)
    found = {name: hit for name in names if (hit := find(name))}
    if len(found) == len(names):
        return found
    with lock(say):  # whoever held it may have made what is missing here
        found = {name: hit for name in names if (hit := find(name))}
        missing = [name for name in names if name not in found]
        for origin, make in (("downloaded", _download), ("built", gobuild.build)):
            if not missing:
                break
            made = make(missing, cache_dir(), say)
            found |= {name: Found(name, cache_dir() / name, origin) for name in made}
            missing = [name for name in missing if name not in made]
        if missing:
            raise BinariesError(
                f"{', '.join(missing)} not found, and neither a download nor a build from Go modules worked."
                " Set KUBEBUILDER_ASSETS to a folder that holds etcd, kube-apiserver and kubectl."
            )
    return found


def built(name: str, module: gobuild.Module, *, say: Say | None = None) -> Path:
    """A program of a pinned Go module; it is built first where it is missing. Raises BinariesError.

    PATH is not looked at: which version is used is decided here.
    """
    say = say or (lambda _line: None)
    path = cache_dir(module.folder) / name
    if not executable(path):
        with lock(say):  # whoever held it may have made it
            if not executable(path):
                gobuild.build([name], path.parent, say, module)
    if not executable(path):
        raise BinariesError(f"{name} could not be built from its Go module; what go said is above")
    return path


@contextlib.contextmanager
def lock(say: Say) -> Iterator[None]:
    """Held by the one process that makes what is missing in the cache."""
    cache_root().mkdir(parents=True, exist_ok=True)
    with (cache_root() / "bin.lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another process is making the binaries: waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def executable(path: Path) -> bool:
    """Whether it is a file that can be run."""
    return path.is_file() and os.access(path, os.X_OK)


def _kubectl_fits(path: Path) -> bool:
    try:
        answer = subprocess.run(
            [str(path), "version", "--client", "-o", "json"],
            check=True,
            capture_output=True,
            timeout=20,
            cwd="/",
        )
        version = json.loads(answer.stdout)["clientVersion"]
        return (int(version["major"]), int(version["minor"].rstrip("+"))) >= KUBECTL_MINIMUM
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return False


# The envtest archive


def _download(names: list[str], target: Path, say: Say) -> list[str]:
    """What of `names` the archive brought: none where upstream cannot be reached or has no such archive."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    wanted = f"envtest-{ENVTEST_RELEASE}-linux-{architecture}.tar.gz"
    try:
        with urllib.request.urlopen(ENVTEST_INDEX, timeout=CONNECT_TIMEOUT) as answer:
            index: dict[str, Any] = yaml.safe_load(answer.read())
        entry = index["releases"][ENVTEST_RELEASE][wanted]
        with tempfile.TemporaryFile() as archive:
            _fetch(entry["selfLink"], entry["hash"], archive, say)
            return _extract(archive, names, target)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, tarfile.TarError) as error:
        reason = f"no {wanted} in its index" if isinstance(error, KeyError) else str(error)
        say(f"No download of the envtest archive ({reason}): building from Go modules instead")
        return []


def _fetch(url: str, sha512: str, into: Any, say: Say) -> None:
    digest, size, last = hashlib.sha512(), 0, time.monotonic()
    say(f"Downloading {url}")
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as answer:  # noqa: S310 (https, from the index)
        total = int(answer.headers.get("Content-Length") or 0)
        while piece := answer.read(1 << 18):
            into.write(piece)
            digest.update(piece)
            size += len(piece)
            if time.monotonic() - last > 3:
                last = time.monotonic()
                say(f"  {size >> 20} of {total >> 20} MiB")
    if digest.hexdigest() != sha512:
        raise ValueError("its SHA-512 is not the one of upstream's index")
    into.seek(0)


def _extract(archive: Any, names: list[str], target: Path) -> list[str]:
    target.mkdir(parents=True, exist_ok=True)
    made = []
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        for member in tar:
            name = Path(member.name).name
            if name in names and member.isfile() and (content := tar.extractfile(member)):
                gobuild.place(content, target / name)
                made.append(name)
    return made


@click.command()
@click.option("--tests", is_flag=True, help="Also what only the tests need: two containerds, kind's reader.")
@click.option(
    "--e2e", is_flag=True, help="Also the rest of a node: kubelet and its like, runc; Prometheus's reader."
)
def main(tests: bool, e2e: bool) -> None:
    """Say where the binaries are, and make those that are missing."""
    from sandkeeper.localcluster import containerd_sources, node_sources  # they build on this module

    def say(line: str) -> None:
        click.echo(line, err=True)

    try:
        found = list(ensure(say=say).values())
        if tests:
            found += [containerd_sources.ensure(each, say=say) for each in containerd_sources.SOURCES]
            found.append(Found("kind-config", built("kind-config", gobuild.KIND, say=say), "cache"))
        if e2e:
            found += [Found(name, path, "cache") for name, path in node_sources.ensure(say=say).items()]
            reader = "prometheus-rules"
            found.append(Found(reader, built(reader, gobuild.PROMETHEUS, say=say), "cache"))
    except (BinariesError, OSError) as error:
        click.echo(f"binaries: {error}", err=True)
        sys.exit(1)
    for each in found:
        click.echo(f"{each.name:<23} {each.origin:<20} {each.path}")


if __name__ == "__main__":
    main(prog_name="binaries")
