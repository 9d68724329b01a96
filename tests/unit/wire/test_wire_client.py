"""The client against a scripted shim on a unix socket: what it sends, how long it waits, what it repeats."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from tests.unit.wire.fakes import FakeShim, on_socket

from sandkeeper.wire import client as client_module
from sandkeeper.wire import controller_pb2, errors, node_pb2, types_pb2
from sandkeeper.wire.client import ShimClient
from sandkeeper.wire.ids import OwnerKey

OWNER = OwnerKey("default", "web", "0c5ac1cf", 2)
ID = "0c5ac1cf-2"
SOON = 10.0  # seconds; a bound, never a wait
CONFIG = node_pb2.SandboxConfig(
    digest="d", containers=[node_pb2.ContainerConfig(name="main", image="busybox")]
)
RECORD = node_pb2.SandboxRecord(sandbox_id=ID, state=node_pb2.STATE_RUNNING, pid=42)

Call = Callable[[ShimClient], Awaitable[Any]]
CHANGES: dict[str, Call] = {
    "Create": lambda client: client.create(OWNER, CONFIG),
    "Start": lambda client: client.start(OWNER),
    "Stop": lambda client: client.stop(OWNER, 7),
    "Shutdown": lambda client: client.shutdown(OWNER),
    "Pause": lambda client: client.pause(OWNER),
    "Resume": lambda client: client.resume(OWNER),
}
READS: dict[str, Call] = {
    "Status": lambda client: client.status(OWNER),
    "Metrics": lambda client: client.metrics(OWNER),
    "Info": lambda client: client.info(),
    "List": lambda client: client.list(),
}
WAIT: dict[str, Call] = {"Wait": lambda client: client.wait(OWNER)}
STREAMS: dict[str, Call] = {
    "Watch": lambda client: collect(client.watch("e", 5)),
    "Logs": lambda client: collect(client.logs(OWNER)),
    "Exec": lambda client: collect(client.exec(OWNER, ["true"])),
}
EVERY = CHANGES | READS | WAIT | STREAMS
OWNED = EVERY.keys() - {"Info", "List", "Watch"}


async def collect(pieces: AsyncIterator[Any]) -> list[Any]:
    return [piece async for piece in pieces]


def packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(client_module, "MAX_BACKOFF", 0.01)


@pytest.fixture
def shim() -> FakeShim:
    """A shim on which every call succeeds."""
    shim = FakeShim()
    shim.answers("Create", controller_pb2.ControllerCreateResponse(sandbox_id=ID))
    shim.answers("Start", controller_pb2.ControllerStartResponse(sandbox_id=ID, pid=42))
    shim.answers("Stop", controller_pb2.ControllerStopResponse())
    shim.answers("Shutdown", controller_pb2.ControllerShutdownResponse())
    shim.answers("Pause", node_pb2.PauseResponse())
    shim.answers("Resume", node_pb2.ResumeResponse())
    shim.answers("Status", controller_pb2.ControllerStatusResponse(sandbox_id=ID, extra=packed(RECORD)))
    metric = types_pb2.Metric(id=ID, data=packed(node_pb2.Usage(memory_bytes=4096)))
    shim.answers("Metrics", controller_pb2.ControllerMetricsResponse(metrics=metric))
    shim.answers("Info", node_pb2.InfoResponse(node_name="node-1"))
    shim.answers("List", node_pb2.ListResponse(epoch="e", sequence=5, sandboxes=[RECORD]))
    exited = Timestamp(seconds=1_790_000_000)
    shim.answers("Wait", controller_pb2.ControllerWaitResponse(exit_status=137, exited_at=exited))

    async def stream(*pieces: Any) -> AsyncIterator[Any]:
        for piece in pieces:
            yield piece

    shim.streams["Watch"] = lambda _request, _context: stream(
        node_pb2.WatchResponse(sequence=6, sandbox=RECORD),
        node_pb2.WatchResponse(sequence=7, sandbox=RECORD, removed=True),
    )
    shim.streams["Logs"] = lambda _request, _context: stream(
        node_pb2.LogsResponse(data=b"one\n"), node_pb2.LogsResponse(data=b"t\xffo\n")
    )
    shim.streams["Exec"] = lambda _request, _context: stream(
        node_pb2.ExecResponse(stdout=b"out"),
        node_pb2.ExecResponse(stderr=b"err"),
        node_pb2.ExecResponse(exit_status=0),
    )
    return shim


@pytest.fixture
async def client(shim: FakeShim, tmp_path: Path) -> AsyncIterator[ShimClient]:
    async with on_socket(shim, tmp_path / "shim.sock") as address, ShimClient(address) as client:
        yield client


# What is sent, what comes back


async def test_create(shim: FakeShim, client: ShimClient) -> None:
    assert await client.create(OWNER, CONFIG) == ID
    [(_, request, _, _)] = shim.calls
    config = node_pb2.SandboxConfig()
    assert request.options.Unpack(config)
    assert (request.sandbox_id, request.sandboxer, config) == (ID, "sandkeeper", CONFIG)


async def test_start_stop_shutdown(shim: FakeShim, client: ShimClient) -> None:
    assert await client.start(OWNER) == 42
    await client.stop(OWNER, 7)
    await client.shutdown(OWNER)
    assert [(method, request.sandbox_id, request.sandboxer) for method, request, *_ in shim.calls] == [
        ("Start", ID, "sandkeeper"),
        ("Stop", ID, "sandkeeper"),
        ("Shutdown", ID, "sandkeeper"),
    ]
    assert shim.calls[1][1].timeout_secs == 7


async def test_wait(client: ShimClient) -> None:
    assert await client.wait(OWNER) == (137, datetime(2026, 9, 21, 14, 13, 20, tzinfo=UTC))


@pytest.mark.parametrize("stamp", [None, Timestamp(), Timestamp(seconds=-62_135_596_800)])
async def test_wait_without_a_time(shim: FakeShim, client: ShimClient, stamp: Timestamp | None) -> None:
    shim.answers("Wait", controller_pb2.ControllerWaitResponse(exit_status=1, exited_at=stamp))
    assert await client.wait(OWNER) == (1, None)


async def test_reads(client: ShimClient) -> None:
    assert await client.status(OWNER) == RECORD
    assert (await client.metrics(OWNER)).memory_bytes == 4096
    assert (await client.info()).node_name == "node-1"
    listed = await client.list()
    assert (listed.epoch, listed.sequence, list(listed.sandboxes)) == ("e", 5, [RECORD])


async def test_another_servers_status_is_read_as_containerd_has_it(
    shim: FakeShim, client: ShimClient
) -> None:
    """containerd answers with an empty `extra`, which is no record."""
    foreign = controller_pb2.ControllerStatusResponse(
        sandbox_id=ID, state="SANDBOX_READY", extra=any_pb2.Any()
    )
    shim.answers("Status", foreign)
    assert (await client.status_response(OWNER, verbose=True)).state == "SANDBOX_READY"
    assert shim.calls[0][1].verbose
    with pytest.raises(errors.Internal, match="SandboxRecord"):
        await client.status(OWNER)
    shim.answers("Metrics", controller_pb2.ControllerMetricsResponse())
    with pytest.raises(errors.Internal, match="Usage"):
        await client.metrics(OWNER)


async def test_what_does_not_parse_is_an_error_of_the_shims(shim: FakeShim, client: ShimClient) -> None:
    broken = packed(RECORD)
    broken.value = b"\xff\xff\xff"
    shim.answers("Status", controller_pb2.ControllerStatusResponse(sandbox_id=ID, extra=broken))
    with pytest.raises(errors.Internal, match="SandboxRecord"):
        await client.status(OWNER)
    broken = packed(node_pb2.Usage())
    broken.value = b"\xff\xff\xff"
    shim.answers("Metrics", controller_pb2.ControllerMetricsResponse(metrics=types_pb2.Metric(data=broken)))
    with pytest.raises(errors.Internal, match="Usage"):
        await client.metrics(OWNER)


async def test_pause_resume(shim: FakeShim, client: ShimClient) -> None:
    await client.pause(OWNER)
    await client.resume(OWNER)
    assert [(method, request.sandbox_id) for method, request, *_ in shim.calls] == [
        ("Pause", ID),
        ("Resume", ID),
    ]


async def test_watch(shim: FakeShim, client: ShimClient) -> None:
    changes = await collect(client.watch("e", 5))
    assert [(change.sequence, change.removed) for change in changes] == [(6, False), (7, True)]
    request = shim.calls[0][1]
    assert (request.epoch, request.after_sequence) == ("e", 5)


async def test_logs(shim: FakeShim, client: ShimClient) -> None:
    pieces = await collect(client.logs(OWNER, "main", follow=True, tail_lines=2, timestamps=True))
    assert pieces == [b"one\n", b"t\xffo\n"]
    expected = node_pb2.LogsRequest(
        sandbox_id=ID, container="main", follow=True, tail_lines=2, timestamps=True
    )
    assert shim.calls[0][1] == expected


@pytest.mark.parametrize("method", sorted(EVERY))
async def test_every_owned_call_carries_its_owner(shim: FakeShim, client: ShimClient, method: str) -> None:
    await EVERY[method](client)
    [(called, _, metadata, _)] = shim.calls
    assert called == method
    ours = {key: value for key, value in metadata.items() if key.startswith("sandkeeper-")}
    assert ours == (dict(OWNER.metadata()) if method in OWNED else {})


async def test_a_clients_own_metadata_goes_with_every_call(shim: FakeShim, tmp_path: Path) -> None:
    metadata = (("containerd-namespace", "k8s.io"),)
    async with on_socket(shim, tmp_path / "s") as address:
        async with ShimClient(address, metadata=metadata, sandboxer="other") as client:
            for call in EVERY.values():
                await call(client)
    assert {called for called, *_ in shim.calls} == EVERY.keys()
    assert all(sent["containerd-namespace"] == "k8s.io" for _, _, sent, _ in shim.calls)
    assert {request.sandboxer for _, request, *_ in shim.calls if hasattr(request, "sandboxer")} == {"other"}


# Deadlines


@pytest.mark.parametrize(
    ("method", "seconds"),
    [
        ("Create", 30.0), ("Start", 30.0), ("Stop", 37.0), ("Shutdown", 30.0), ("Pause", 30.0), ("Resume", 30.0),
        ("Status", 5.0), ("Metrics", 5.0), ("Info", 5.0), ("List", 20.0),
    ],
)  # fmt: skip
async def test_a_call_tells_the_shim_its_deadline(
    shim: FakeShim, client: ShimClient, method: str, seconds: float
) -> None:
    await EVERY[method](client)
    remaining = shim.calls[0][3]
    assert remaining is not None
    assert seconds - 3.0 < remaining <= seconds + 0.5


@pytest.mark.parametrize("method", ["Wait", *STREAMS])
async def test_what_lasts_has_no_deadline(shim: FakeShim, client: ShimClient, method: str) -> None:
    await EVERY[method](client)
    assert shim.calls[0][3] is None or shim.calls[0][3] > 1e6


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("Create", lambda client: client.create(OWNER, CONFIG, timeout=0.1)),
        ("Start", lambda client: client.start(OWNER, timeout=0.1)),
        ("Stop", lambda client: client.stop(OWNER, 60, timeout=0.1)),
        ("Shutdown", lambda client: client.shutdown(OWNER, timeout=0.1)),
        ("Pause", lambda client: client.pause(OWNER, timeout=0.1)),
        ("Resume", lambda client: client.resume(OWNER, timeout=0.1)),
        ("Status", lambda client: client.status(OWNER, timeout=0.1)),
        ("Metrics", lambda client: client.metrics(OWNER, timeout=0.1)),
        ("Info", lambda client: client.info(timeout=0.1)),
        ("List", lambda client: client.list(timeout=0.1)),
    ],
)
async def test_a_shim_that_hangs_costs_one_deadline(
    shim: FakeShim, client: ShimClient, method: str, call: Call
) -> None:
    async def hang(_request: Any, _context: Any) -> None:
        await asyncio.Event().wait()

    await client.info()  # connected: the deadline is the call's alone
    shim.unary[method] = hang
    before = shim.count(method)
    with pytest.raises(errors.DeadlineExceeded) as late:
        async with asyncio.timeout(SOON):
            await call(client)
    assert late.value.ambiguous
    assert shim.count(method) - before == 1


# What is repeated


@pytest.mark.parametrize("method", sorted(CHANGES))
@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL]
)
async def test_a_change_is_never_repeated(
    shim: FakeShim, client: ShimClient, method: str, code: grpc.StatusCode
) -> None:
    shim.answers(method, code)
    with pytest.raises(errors.ShimError) as failed:
        await CHANGES[method](client)
    assert failed.value.ambiguous
    assert shim.count(method) == 1


@pytest.mark.parametrize("method", sorted(READS))
async def test_a_read_is_repeated_when_the_shim_is_away(
    shim: FakeShim, client: ShimClient, method: str
) -> None:
    shim.answers(method, grpc.StatusCode.UNAVAILABLE)
    with pytest.raises(errors.Unavailable):
        await READS[method](client)
    assert shim.count(method) == client_module.READ_ATTEMPTS


async def test_a_read_succeeds_once_the_shim_is_back(shim: FakeShim, client: ShimClient) -> None:
    away = grpc.StatusCode.UNAVAILABLE
    shim.answers("Info", away, away, node_pb2.InfoResponse(node_name="node-1"))
    assert (await client.info()).node_name == "node-1"
    assert shim.count("Info") == 3


@pytest.mark.parametrize("method", sorted(READS | WAIT))
async def test_a_read_is_not_repeated_for_another_reason(
    shim: FakeShim, client: ShimClient, method: str
) -> None:
    shim.answers(method, grpc.StatusCode.INTERNAL)
    with pytest.raises(errors.Internal):
        await EVERY[method](client)
    assert shim.count(method) == 1


async def test_wait_is_repeated_for_as_long_as_it_takes(shim: FakeShim, client: ShimClient) -> None:
    away = [grpc.StatusCode.UNAVAILABLE] * 10
    shim.answers("Wait", *away, controller_pb2.ControllerWaitResponse(exit_status=3))
    async with asyncio.timeout(SOON):
        assert await client.wait(OWNER) == (3, None)
    assert shim.count("Wait") == 11


async def test_wait_outlives_a_restart_of_the_shim(shim: FakeShim, tmp_path: Path) -> None:
    arrived = asyncio.Event()

    async def hang(_request: Any, _context: Any) -> None:
        arrived.set()
        await asyncio.Event().wait()

    path = tmp_path / "s"
    first = FakeShim()
    first.unary["Wait"] = hang
    async with asyncio.timeout(SOON), ShimClient(f"unix:{path}") as client:
        async with on_socket(first, path):
            waiting = asyncio.create_task(client.wait(OWNER))
            await arrived.wait()
        async with on_socket(shim, path):
            assert (await waiting)[0] == 137


@pytest.mark.parametrize("method", sorted(STREAMS))
async def test_a_stream_is_never_repeated(shim: FakeShim, client: ShimClient, method: str) -> None:
    async def fail(_request: Any, context: Any) -> AsyncIterator[Any]:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        yield  # a generator

    shim.streams[method] = fail
    with pytest.raises(errors.Unavailable):
        await STREAMS[method](client)
    assert shim.count(method) == 1


# Failures


@pytest.mark.parametrize("method", sorted(EVERY))
async def test_a_refusal_arrives_with_the_shims_words(
    shim: FakeShim, client: ShimClient, method: str
) -> None:
    async def refuse(_request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "an older instance: größer ist 3")

    async def refuse_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await refuse(request, context)
        yield  # a generator

    shim.unary[method], shim.streams[method] = refuse, refuse_stream
    with pytest.raises(errors.FailedPrecondition) as refused:
        await EVERY[method](client)
    assert refused.value.message == "an older instance: größer ist 3"
    assert not refused.value.ambiguous


async def test_a_stream_that_fails_midway_gives_what_it_had(shim: FakeShim, client: ShimClient) -> None:
    async def overflow(_request: Any, context: Any) -> AsyncIterator[Any]:
        yield node_pb2.WatchResponse(sequence=6)
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "too slow")

    shim.streams["Watch"] = overflow
    changes = client.watch("e", 5)
    assert (await anext(changes)).sequence == 6
    with pytest.raises(errors.OutOfRange):
        await anext(changes)


@pytest.mark.parametrize("method", sorted(EVERY.keys() - {"Wait"}))
async def test_nobody_listens(tmp_path: Path, method: str) -> None:
    async with ShimClient(f"unix:{tmp_path}/nobody.sock") as client:
        with pytest.raises(errors.Unavailable):
            async with asyncio.timeout(SOON):
                await EVERY[method](client)


@pytest.mark.parametrize("method", sorted(EVERY.keys() - {"Wait"}))
async def test_a_closed_client_says_so(shim: FakeShim, client: ShimClient, method: str) -> None:
    await client.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        await EVERY[method](client)
    assert not shim.calls


@pytest.mark.parametrize("method", ["Start", "Status", "Wait", "Watch", "Logs", "Exec"])
async def test_closing_ends_calls_with_an_error_and_cancels_no_task(
    shim: FakeShim, client: ShimClient, method: str
) -> None:
    """A CancelledError that nobody asked for would end its task without a word."""
    arrived = asyncio.Event()

    async def hang(_request: Any, _context: Any) -> None:
        arrived.set()
        await asyncio.Event().wait()

    async def hang_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await hang(request, context)
        yield  # a generator

    shim.unary[method], shim.streams[method] = hang, hang_stream
    call = asyncio.create_task(EVERY[method](client))  # type: ignore[arg-type]
    async with asyncio.timeout(SOON):
        await arrived.wait()
        await client.close()
        with pytest.raises(errors.ShimError) as ended:
            await call
    assert ended.value.ambiguous


@pytest.mark.parametrize("method", sorted(EVERY))
async def test_a_caller_that_leaves_ends_its_call_on_the_shim(
    shim: FakeShim, client: ShimClient, method: str
) -> None:
    arrived, left = asyncio.Event(), asyncio.Event()

    async def hang(_request: Any, _context: Any) -> None:
        arrived.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async def hang_stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await hang(request, context)
        yield  # a generator

    shim.unary[method], shim.streams[method] = hang, hang_stream
    call = asyncio.create_task(EVERY[method](client))  # type: ignore[arg-type]
    async with asyncio.timeout(SOON):
        await arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await left.wait()


@pytest.mark.parametrize(
    ("method", "piece", "stream"),
    [
        ("Watch", node_pb2.WatchResponse(sequence=6), lambda client: client.watch("e", 5)),
        ("Logs", node_pb2.LogsResponse(data=b"x"), lambda client: client.logs(OWNER, follow=True)),
        ("Exec", node_pb2.ExecResponse(stdout=b"x"), lambda client: client.exec(OWNER, ["cat"])),
        (
            "Exec",
            node_pb2.ExecResponse(stdout=b"x"),
            lambda client: client.exec(OWNER, ["cat"], stdin=never()),
        ),
    ],
    ids=["Watch", "Logs", "Exec", "Exec with stdin"],
)
async def test_a_reader_that_stops_ends_its_stream_on_the_shim(
    shim: FakeShim, client: ShimClient, method: str, piece: Any, stream: Callable[[ShimClient], Any]
) -> None:
    left = asyncio.Event()

    async def endless(_request: Any, _context: Any) -> AsyncIterator[Any]:
        try:
            yield piece
            await asyncio.Event().wait()
        finally:
            left.set()

    shim.streams[method] = endless
    pieces = stream(client)
    async with asyncio.timeout(SOON):
        await anext(pieces)
        await pieces.aclose()
        await left.wait()


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


# Exec


def echo(requests: list[Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    """A process like `cat`: keeps the requests, gives back its input, ends with 7."""

    async def handler(request_iterator: Any, _context: Any) -> AsyncIterator[Any]:
        async for request in request_iterator:
            requests.append(request)
            match request.WhichOneof("input"):
                case "stdin":
                    yield node_pb2.ExecResponse(stdout=request.stdin)
                case "stdin_closed":
                    yield node_pb2.ExecResponse(stderr=b"bye")
                    yield node_pb2.ExecResponse(exit_status=7)
                    return

    return handler


async def text(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_exec_passes_input_output_and_status(shim: FakeShim, client: ShimClient) -> None:
    requests: list[Any] = []
    shim.streams["Exec"] = echo(requests)
    got = await collect(client.exec(OWNER, ["cat", "-"], container="main", stdin=text(b"a", b"b")))
    assert got == [("stdout", b"a"), ("stdout", b"b"), ("stderr", b"bye"), 7]
    start = node_pb2.ExecStart(sandbox_id=ID, container="main", command=["cat", "-"], stdin=True)
    assert requests[0] == node_pb2.ExecRequest(start=start)
    assert requests[-1] == node_pb2.ExecRequest(stdin_closed=True)


async def test_exec_without_input_closes_it_at_once(shim: FakeShim, client: ShimClient) -> None:
    requests: list[Any] = []
    shim.streams["Exec"] = echo(requests)
    assert await collect(client.exec(OWNER, ["cat"])) == [("stderr", b"bye"), 7]
    assert [request.WhichOneof("input") for request in requests] == ["start", "stdin_closed"]
    assert not requests[0].start.stdin


async def test_exec_status_0_is_an_answer(client: ShimClient) -> None:
    assert await collect(client.exec(OWNER, ["true"])) == [("stdout", b"out"), ("stderr", b"err"), 0]


async def test_exec_has_a_terminal_that_changes_its_size(shim: FakeShim, client: ShimClient) -> None:
    requests: list[Any] = []
    shim.streams["Exec"] = echo(requests)
    resized = asyncio.Event()

    async def sizes() -> AsyncIterator[tuple[int, int]]:
        yield 100, 40
        resized.set()

    async def keys() -> AsyncIterator[bytes]:
        await resized.wait()
        yield b"x"

    await collect(client.exec(OWNER, ["sh"], tty=True, size=(80, 24), stdin=keys(), resizes=sizes()))
    start = requests[0].start
    assert (start.tty, start.size.width, start.size.height) == (True, 80, 24)
    [resize] = [request.resize for request in requests if request.WhichOneof("input") == "resize"]
    assert (resize.width, resize.height) == (100, 40)


async def test_exec_whose_process_ends_first_leaves_the_input_unread(
    shim: FakeShim, client: ShimClient
) -> None:
    async with asyncio.timeout(SOON):
        got = await collect(client.exec(OWNER, ["true"], stdin=never()))
    assert got[-1] == 0


async def test_exec_tells_when_its_input_broke_and_the_process_gets_an_end(
    shim: FakeShim, client: ShimClient
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"a"
        raise RuntimeError("the terminal is gone")

    requests: list[Any] = []
    shim.streams["Exec"] = echo(requests)
    got: list[Any] = []

    async def read() -> None:
        async for piece in client.exec(OWNER, ["cat"], stdin=broken()):
            got.append(piece)  # noqa: PERF401

    async with asyncio.timeout(SOON):
        with pytest.raises(RuntimeError, match="terminal is gone"):
            await read()
    assert got == [("stdout", b"a"), ("stderr", b"bye"), 7]


async def test_exec_takes_more_input_than_fits_in_memory_at_once(shim: FakeShim, client: ShimClient) -> None:
    requests: list[Any] = []
    shim.streams["Exec"] = echo(requests)
    pieces = [bytes([n % 256]) * 4096 for n in range(300)]
    got = await collect(client.exec(OWNER, ["cat"], stdin=text(*pieces)))
    assert b"".join(piece[1] for piece in got[:-2]) == b"".join(pieces)


async def flood() -> AsyncIterator[bytes]:
    """Input without end, so that some of it is always under way when the shim ends the call."""
    while True:
        yield b"x" * 16384
        await asyncio.sleep(0)


@pytest.mark.parametrize("time", range(20))
async def test_exec_whose_process_ends_amid_its_input_has_its_status(
    shim: FakeShim, client: ShimClient, time: int
) -> None:
    async with asyncio.timeout(SOON):
        got = await collect(client.exec(OWNER, ["head", "-1"], stdin=flood()))
    assert got == [("stdout", b"out"), ("stderr", b"err"), 0]


@pytest.mark.parametrize("time", range(20))
async def test_exec_refused_amid_its_input_gives_the_shims_reason(
    shim: FakeShim, client: ShimClient, time: int
) -> None:
    """grpc puts INTERNAL over the server's status here (its issue 36066); the client must not."""

    async def refuse(requests: Any, context: Any) -> AsyncIterator[Any]:
        await anext(requests)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it does not run")
        yield  # a generator

    shim.streams["Exec"] = refuse
    async with asyncio.timeout(SOON):
        with pytest.raises(errors.FailedPrecondition, match="it does not run"):
            await collect(client.exec(OWNER, ["cat"], stdin=flood()))


async def test_exec_leaves_no_feeder_behind(shim: FakeShim, client: ShimClient) -> None:
    stopped = asyncio.Event()

    async def keys() -> AsyncIterator[bytes]:
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            stopped.set()

    await collect(client.exec(OWNER, ["true"], stdin=keys()))
    async with asyncio.timeout(SOON):
        await stopped.wait()
