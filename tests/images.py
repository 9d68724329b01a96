"""Images for tests: tiny ones made here, and a real registry (Debian's docker-registry) on loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sandkeeper.localcluster.apiserver import free_ports
from sandkeeper.localcluster.ocilayout import ImageDef, busybox_image, write_layout

__all__ = [
    "ImageDef",
    "Registry",
    "Stalled",
    "busybox_image",
    "free_port",
    "registry",
    "stalled",
    "write_layout",
]

USER, PASSWORD = "tester", "correct-horse-battery"
# `htpasswd -nbB tester correct-horse-battery`: the only kind that docker-registry takes.
HTPASSWD = "tester:$2b$05$z7yTIr3/85I4k7jUESQEuerAZGMNo/cuITpvS4Vp0w6ZbwDUROMfO\n"


@dataclass(frozen=True, slots=True)
class Registry:
    """A registry that runs. host: `127.0.0.1:<port>`, plain HTTP."""

    host: str
    folder: Path
    authfile: Path | None = None

    def push(self, name: str, image: ImageDef | Mapping[str, ImageDef], *flags: str) -> str:
        """Pushes the image as `name` (`busybox:1.37`); returns its full reference."""
        with tempfile.TemporaryDirectory() as layout:
            write_layout(Path(layout), {"image": image})
            auth = [f"--dest-authfile={self.authfile}"] if self.authfile else []
            subprocess.run(
                [
                    *("skopeo", "--insecure-policy", "copy", "--quiet", "--all", "--dest-tls-verify=false"),
                    *auth,
                    *flags,
                    *(f"oci:{layout}:image", f"docker://{self.host}/{name}"),
                ],
                check=True,
                capture_output=True,
                cwd="/",
            )
        return f"{self.host}/{name}"

    def requests(self) -> list[str]:
        """Lines of the access log: what was asked for, for tests that count."""
        lines = (self.folder / "access.log").read_text(errors="replace").splitlines()
        return [line for line in lines if '"GET /v2/' in line or '"HEAD /v2/' in line]

    def blob_downloads(self) -> int:
        return sum("/blobs/sha256:" in line and '"GET ' in line for line in self.requests())


@contextlib.contextmanager
def registry(folder: Path, *, auth: bool = False) -> Iterator[Registry]:
    """Runs a registry in `folder` until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    host = f"127.0.0.1:{port}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": False}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host, "secret": "test"},
    }
    authfile = None
    if auth:
        (folder / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
        authfile = folder / "auth.json"
        write_authfile(authfile, host, PASSWORD)
    (folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
    with (folder / "access.log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(folder / "config.yml")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",
            env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "OTEL_TRACES_EXPORTER": "none"},
        )
        try:
            _await_answer(f"http://{host}/v2/", process)
            yield Registry(host, folder, authfile)
        finally:
            process.terminate()
            process.wait(10)


@dataclass(frozen=True, slots=True)
class Stalled:
    host: str
    reached: threading.Event


@contextlib.contextmanager
def stalled() -> Iterator[Stalled]:
    """A registry that takes connections and never answers. `reached` is set by the first one."""
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    reached.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield Stalled(f"127.0.0.1:{server.getsockname()[1]}", reached)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in kept:
                connection.close()


def write_authfile(path: Path, host: str, password: str) -> None:
    token = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": token}}}))


def free_port() -> int:
    return free_ports(1)[0]


def _await_answer(url: str, process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - http, made above
                return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:
                return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"docker-registry does not answer at {url} (exit status {process.returncode})")
        time.sleep(0.02)
