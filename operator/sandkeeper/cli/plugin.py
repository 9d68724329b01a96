"""`kubectl sandbox logs` and `kubectl sandbox exec`: by the kubeconfig to the object, by mutual TLS to its shim."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import sys
import termios
import tty as terminal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from kubernetes.aio import client
from kubernetes.aio import config as kube_config

from sandkeeper.api import GROUP, SANDBOX_NODES, SANDBOXES, VERSION
from sandkeeper.wire.client import ShimClient
from sandkeeper.wire.errors import NotFound, ShimError
from sandkeeper.wire.ids import OwnerKey
from sandkeeper.wire.tls import ClientTLS, TLSFiles

config: Any = kube_config  # untyped functions
F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_CHUNK = 32 * 1024


def _common(command: F) -> F:
    """The options of both commands."""
    for option in reversed(
        (
            click.option("-n", "--namespace", default="", help="Namespace; default: the context's."),
            click.option("--kubeconfig", type=_FILE, help="Default: $KUBECONFIG, ~/.kube/config."),
            click.option("--context", default=None, help="Context of the kubeconfig; default: its current."),
            click.option("-c", "--container", default="", help="Container; default: the first."),
            click.option("--tls-ca", type=_FILE, envvar="SANDKEEPER_TLS_CA", show_envvar=True,
                         help="CA that signed the shims' certificates."),
            click.option("--tls-cert", type=_FILE, envvar="SANDKEEPER_TLS_CERT", show_envvar=True,
                         help="Client certificate with a name that the shims let call."),
            click.option("--tls-key", type=_FILE, envvar="SANDKEEPER_TLS_KEY", show_envvar=True,
                         help="The key of --tls-cert."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("name")
@_common
@click.option("-f", "--follow", is_flag=True, help="Go on until the sandbox has ended.")
@click.option("--tail", type=click.IntRange(min=1), default=None, help="Only the last lines.")
@click.option("--timestamps", is_flag=True, help="Each line with its time.")
def logs(name: str, container: str, follow: bool, tail: int | None, timestamps: bool, **where: Any) -> None:
    """Print a container's log."""

    async def run() -> int:
        async with _shim(name, **where) as (shim, owner):
            pieces = shim.logs(owner, container, follow=follow, tail_lines=tail or 0, timestamps=timestamps)
            async for piece in pieces:
                _write(sys.stdout.fileno(), piece)
        return 0

    _finish(run())


@click.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_common
@click.option("-i", "--stdin", "interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="With a terminal.")
def exec_(
    name: str, command: tuple[str, ...], container: str, interactive: bool, tty: bool, **where: Any
) -> None:
    """Run a command in a container; the exit status is the command's.

    kubectl sandbox exec [-it] NAME -- COMMAND [ARGUMENTS]
    """
    raw = tty and sys.stdin.isatty()

    async def run() -> int:
        async with _shim(name, **where) as (shim, owner):
            with _raw_terminal(raw):
                output = shim.exec(
                    owner,
                    list(command),
                    container=container,
                    tty=tty,
                    stdin=_stdin() if interactive else None,
                    size=_size() if raw else None,
                    resizes=_resizes() if raw else None,
                )
                async for piece in output:
                    if isinstance(piece, int):
                        return piece
                    stream = sys.stderr if piece[0] == "stderr" else sys.stdout
                    _write(stream.fileno(), piece[1])
        raise click.ClickException("the shim ended the stream without an exit status")

    _finish(run())


def _finish(run: Coroutine[Any, Any, int]) -> None:
    try:
        status = asyncio.run(run)
    except BrokenPipeError:  # `| head`
        os._exit(141)  # as one that SIGPIPE ended; nothing may be flushed to the pipe now
    except NotFound as error:
        raise click.ClickException(
            f"the node no longer has it ({error.message}): an ended sandbox is kept there for as long as the"
            " operator's setting `retention` says"
        ) from error
    except (ShimError, OSError, config.ConfigException) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(status)


# The way to the shim


@contextlib.asynccontextmanager
async def _shim(
    name: str,
    *,
    namespace: str,
    kubeconfig: Path | None,
    context: str | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
) -> AsyncIterator[tuple[ShimClient, OwnerKey]]:
    file = str(kubeconfig) if kubeconfig else None
    configuration = client.Configuration()
    await config.load_kube_config(config_file=file, context=context, client_configuration=configuration)
    namespace = namespace or _namespace_of(file, context)
    async with client.ApiClient(configuration) as api:
        objects: Any = client.CustomObjectsApi(api)
        try:
            sandbox = await objects.get_namespaced_custom_object(GROUP, VERSION, namespace, SANDBOXES, name)
            status = sandbox.get("status", {})
            if not (status.get("nodeName") and status.get("instance")):
                raise click.ClickException(f"sandbox {name} is on no node: {status.get('phase', 'new')}")
            node = await objects.get_cluster_custom_object(GROUP, VERSION, SANDBOX_NODES, status["nodeName"])
        except client.ApiException as error:
            raise click.ClickException(f"sandbox {namespace}/{name}: {error.status} {error.reason}") from None
    spec, tls = node["spec"], None
    if not spec["address"].startswith("unix:"):
        if not (tls_ca and tls_cert and tls_key):
            raise click.UsageError("--tls-ca, --tls-cert and --tls-key are needed to call a shim on TCP")
        tls = ClientTLS(TLSFiles(tls_ca, tls_cert, tls_key))
    owner = OwnerKey(namespace, name, sandbox["metadata"]["uid"], status["instance"])
    # As the operator: a node's certificate must carry the node's name where no other is given.
    server_name = spec.get("serverName") or status["nodeName"]
    async with ShimClient(spec["address"], tls=tls, server_name=server_name) as shim:
        yield shim, owner


def _namespace_of(kubeconfig: str | None, context: str | None) -> str:
    """The namespace of the context, as kubectl takes it."""
    _, active = config.list_kube_config_contexts(config_file=kubeconfig)
    if context:
        found, _ = config.list_kube_config_contexts(config_file=kubeconfig)
        active = next(each for each in found if each["name"] == context)
    return str(active["context"].get("namespace") or "default")


# The terminal


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


async def _stdin() -> AsyncIterator[bytes]:
    """Standard input to its end. Not by a thread: one that waits for a key would hold up the end."""
    descriptor = sys.stdin.fileno()
    while True:
        with contextlib.suppress(
            PermissionError
        ):  # a file or /dev/null, which cannot be polled: always ready
            await _readable(descriptor)
        if not (data := os.read(descriptor, _CHUNK)):
            return
        yield data


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _size() -> tuple[int, int]:
    """(columns, lines)"""
    lines, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdin, termios.TIOCGWINSZ, bytes(8)))
    return columns, lines


async def _resizes() -> AsyncIterator[tuple[int, int]]:
    changed, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        while await changed.wait():
            changed.clear()
            yield _size()
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)


@contextlib.contextmanager
def _raw_terminal(wanted: bool) -> Iterator[None]:
    """Every key goes to the process, Ctrl-C too; the terminal is afterwards as it was."""
    if not wanted:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    terminal.setraw(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
