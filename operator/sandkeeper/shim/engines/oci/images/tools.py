"""Running skopeo and umoci: clean environment, closed descriptors, a deadline, errors without secrets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence

MAX_MESSAGE = 600
_KEPT = (
    "PATH",
    "HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REGISTRY_AUTH_FILE",
    "CONTAINERS_REGISTRIES_CONF",
    "XDG_RUNTIME_DIR",  # where containers-auth.json(5) has its default
)

Runner = Callable[[Sequence[str], Mapping[str, str]], Awaitable[bytes]]
"""Runs argv with extra environment; returns stdout; raises ToolError."""


class ToolError(Exception):
    """A tool ended with an error; the message is its own last words, without secrets."""


async def run(argv: Sequence[str], extra: Mapping[str, str]) -> bytes:
    """Runs to the end; when cancelled (a deadline, a shutdown) the tool is killed first."""
    try:
        process = await asyncio.create_subprocess_exec(
            *_tied_to_us(),
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd="/",
            env=environment(os.environ, extra),
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise ToolError(f"{argv[0]} cannot be run: {error.strerror}") from None
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if process.returncode != 0:
        words = last_words(err.decode(errors="replace"))
        raise ToolError(words or f"{argv[0]} ended with status {process.returncode}")
    return out


def environment(ours: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Only what the tools need: nothing else of the shim's environment reaches them."""
    return {name: ours[name] for name in _KEPT if name in ours} | {"LC_ALL": "C.UTF-8"} | dict(extra)


def last_words(stderr: str) -> str:
    """What a tool said last, on one line: skopeo's fatal message, umoci's last error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if not lines:
        return ""
    fatal = [found[1] for line in lines if (found := re.search(r'level=fatal msg="((?:[^"\\]|\\.)*)"', line))]
    words = re.sub(r"\\(.)", r"\1", fatal[-1]) if fatal else lines[-1].lstrip("\u2a2f ").strip()
    words = without_secrets(words)
    return words if len(words) <= MAX_MESSAGE else f"{words[: MAX_MESSAGE - 3]}..."


def without_secrets(text: str) -> str:
    """Takes out what may be a credential: user information and queries of URLs, tokens, passwords."""
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@\"']+@", r"\1", text)
    text = re.sub(r"(?i)(\bhttps?://[^\s?\"']+)\?[^\s\"']*", r"\1", text)
    text = re.sub(r"(?i)\b(bearer|basic)\s+[a-z0-9._~+/=-]{8,}", r"\1 [removed]", text)
    labelled = r"(?i)\b(password|passwd|token|secret|authorization)([\"']?\s*[=:]\s*)[^\s,;]+"
    return re.sub(labelled, r"\1\2[removed]", text)


def _tied_to_us() -> tuple[str, ...]:
    """A pull must not go on, unwatched, when the shim is killed."""
    return ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
