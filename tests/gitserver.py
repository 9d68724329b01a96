"""Git repositories on loopback, served over smart HTTP by git's own `git http-backend`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import urlsplit

# Whoever runs the tests has settings of their own, and a name that must not be in a commit.
_ENVIRONMENT = {
    "PATH": os.environ.get("PATH", os.defpath),
    "HOME": "/nonexistent",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{role}_NAME": "test" for role in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{role}_EMAIL": "test@example.test" for role in ("AUTHOR", "COMMITTER")},
}


class Repository:
    """One branch, `main`, of a bare repository, and a working copy of it."""

    def __init__(self, folder: Path, url: str) -> None:
        """folder: of the bare repository. url: where it is served."""
        self.url = url
        self._bare = folder
        self._copy = folder.with_suffix(".work")
        _git("init", "--quiet", "--bare", "--initial-branch=main", str(self._bare))
        _git("init", "--quiet", "--initial-branch=main", str(self._copy))

    def commit(self, files: Mapping[str, str]) -> str:
        """The branch holds these files and no others; returns the revision, as Flux writes it."""
        for path in self._copy.iterdir():
            if path.name != ".git":
                path.unlink()
        for name, content in files.items():
            (self._copy / name).write_text(content)
        _git("add", "--all", within=self._copy)
        _git("commit", "--quiet", "--allow-empty", "--message", "change", within=self._copy)
        _git("push", "--quiet", str(self._bare), "main", within=self._copy)
        return f"main@sha1:{_git('rev-parse', 'HEAD', within=self._copy).strip()}"


class GitServer:
    """Serves every repository in a folder of its own, on a port of its own. Use as a context."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="sandkeeper-git-"))
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.root = self._root
        self._thread = threading.Thread(target=self._server.serve_forever, name="git", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        shutil.rmtree(self._root)

    def repository(self, name: str) -> Repository:
        """An empty one."""
        return Repository(
            self._root / f"{name}.git", f"http://127.0.0.1:{self._server.server_port}/{name}.git"
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that closing it waits for what still runs
    root: Path


class _Handler(BaseHTTPRequestHandler):
    """RFC 3875 between an HTTP request and `git http-backend`, as far as that program reads and writes it."""

    def do_GET(self) -> None:
        self._run(b"")

    def do_POST(self) -> None:
        self._run(self._body())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _run(self, body: bytes) -> None:
        url, root = urlsplit(self.path), cast("_Server", self.server).root
        variables = {
            "GIT_PROJECT_ROOT": str(root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REQUEST_METHOD": self.command,
            "PATH_INFO": url.path,
            "QUERY_STRING": url.query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_ADDR": self.client_address[0],
        }
        answer = subprocess.run(
            ["git", "http-backend"],
            input=body,
            env=_ENVIRONMENT | variables,
            capture_output=True,
            check=False,
        )
        head, _, content = answer.stdout.partition(b"\r\n\r\n")
        fields = [line.decode().split(": ", 1) for line in head.split(b"\r\n") if line]
        status = next((value for name, value in fields if name.lower() == "status"), "200 OK")
        self.send_response(int(status.split()[0]) if fields else HTTPStatus.INTERNAL_SERVER_ERROR)
        for name, value in fields:
            if name.lower() not in ("status", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _git(*arguments: str, within: Path | None = None) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=within or "/", env=_ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"git {' '.join(arguments)}: {result.stderr}"
    return result.stdout
