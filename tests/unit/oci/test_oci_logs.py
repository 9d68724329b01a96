"""Container logs: conmon's lines in, the program's output out, in order, in part, over attempts and new files."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandkeeper.shim.engines.oci import logs
from sandkeeper.shim.engines.oci.folders import ContainerFolder, SandboxFolder

AT = b"2026-01-01T00:00:00.000000001+00:00"
FAST = settings(max_examples=50, deadline=None, derandomize=True, database=None)


def line(text: bytes, tag: bytes = b"F", stream: bytes = b"stdout", at: bytes = AT) -> bytes:
    return b" ".join((at, stream, tag, text)) + b"\n"


def parsed(*chunks: bytes, timestamps: bool = False) -> list[bytes]:
    parser = logs.Parser(timestamps=timestamps)
    return [piece for chunk in chunks for piece in parser.feed(chunk)]


# Lines


def test_lines_and_parts() -> None:
    log = line(b"one") + line(b"tw", b"P") + line(b"o", stream=b"stderr") + line(b"") + line(b" a  b ")
    assert parsed(log) == [b"one\n", b"tw", b"o\n", b"\n", b" a  b \n"]


def test_an_empty_line_may_come_without_its_last_space() -> None:
    assert parsed(AT + b" stdout F\n" + AT + b" stdout P\n" + line(b"x")) == [b"\n", b"", b"x\n"]


def test_the_time_is_at_the_beginning_of_a_line_only() -> None:
    log = line(b"tw", b"P", at=b"T1") + line(b"o", at=b"T2") + line(b"x", at=b"T3")
    assert parsed(log, timestamps=True) == [b"T1 tw", b"o\n", b"T3 x\n"]


@pytest.mark.parametrize(
    "garbage", [b"\n", b"half of a li\n", b"a b\n", b"a b X text\n", b"\0\xff\n", b"a b FF t\n"]
)
def test_what_is_no_record_is_left_out(garbage: bytes) -> None:
    assert parsed(line(b"one") + garbage + line(b"two")) == [b"one\n", b"two\n"]


def test_a_record_that_is_not_all_there_yet_is_waited_for() -> None:
    whole = line(b"hello")
    parser = logs.Parser(timestamps=False)
    assert list(parser.feed(whole[:-3])) == []
    assert list(parser.feed(whole[-3:])) == [b"hello\n"]


texts = st.binary(max_size=20).filter(lambda text: b"\n" not in text)
files = st.lists(st.builds(line, texts, st.sampled_from([b"F", b"P"]))).map(b"".join) | st.binary(
    max_size=200
)


@FAST
@given(files, st.lists(st.integers(0, 200)), st.booleans())
def test_it_makes_no_difference_where_a_read_ends(log: bytes, cuts: list[int], timestamps: bool) -> None:
    edges = sorted({0, len(log), *(cut for cut in cuts if cut < len(log))})
    chunks = [log[start:end] for start, end in itertools.pairwise(edges)]
    assert parsed(*chunks, timestamps=timestamps) == parsed(log, timestamps=timestamps)


@FAST
@given(st.binary(max_size=100))
def test_any_output_comes_back_as_it_was(output: bytes) -> None:
    *whole, rest = output.split(b"\n")
    log = b"".join(line(text) for text in whole) + (line(rest, b"P") if rest else b"")
    assert b"".join(parsed(log)) == output


# The last lines


def tail(pieces: list[bytes], count: int) -> bytes:
    return b"".join(logs.last_lines(iter(pieces), count))


def test_the_last_lines_are_whole_lines() -> None:
    pieces = [b"one\n", b"tw", b"o\n", b"three\n", b"fo"]
    assert tail(pieces, 1) == b"fo"
    assert tail(pieces, 2) == b"three\nfo"
    assert tail(pieces, 3) == b"two\nthree\nfo"
    assert tail(pieces, 2**32 - 1) == b"one\ntwo\nthree\nfo"
    assert tail([], 5) == b""


@FAST
@given(st.lists(st.sampled_from([b"a", b"b\n", b"\n", b""])), st.integers(1, 5))
def test_the_last_lines_are_the_outputs_own(pieces: list[bytes], count: int) -> None:
    assert tail(pieces, count) == b"".join(b"".join(pieces).splitlines(keepends=True)[-count:])


# Files


@pytest.fixture
def container(tmp_path: Path) -> ContainerFolder:
    sandbox = SandboxFolder.under(tmp_path, tmp_path / "run", "u-1")
    sandbox.path.mkdir(parents=True)
    return sandbox.container("main")


def write(container: ContainerFolder, attempt: int, *texts: bytes) -> Path:
    path = container.attempt(attempt).log
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.writelines(line(text) for text in texts)
    return path


def stream(
    container: ContainerFolder,
    *,
    follow: bool = False,
    tail_lines: int = 0,
    timestamps: bool = False,
    ended: Callable[[], bool] = lambda: False,
) -> AsyncIterator[bytes]:
    return logs.stream(container, follow=follow, tail_lines=tail_lines, timestamps=timestamps, ended=ended)


async def whole(container: ContainerFolder, **options: bool | int) -> bytes:
    return b"".join([piece async for piece in stream(container, **options)])  # type: ignore[arg-type]


async def test_all_attempts_come_in_their_order(container: ContainerFolder) -> None:
    for attempt in (10, 9, 0):
        write(container, attempt, b"%d" % attempt)
    assert await whole(container) == b"0\n9\n10\n"
    assert await whole(container, tail_lines=2) == b"9\n10\n"
    assert await whole(container, timestamps=True) == b"".join(AT + b" %d\n" % n for n in (0, 9, 10))


async def test_there_may_be_no_log(container: ContainerFolder) -> None:
    assert await whole(container) == b""
    container.attempt(0).path.mkdir()
    assert await whole(container) == b""


async def test_a_link_in_place_of_a_log_is_not_followed(container: ContainerFolder, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(line(b"secret"))
    container.attempt(0).path.mkdir()
    container.attempt(0).log.symlink_to(secret)
    assert await whole(container) == b""


async def test_a_log_larger_than_a_read_comes_whole(container: ContainerFolder) -> None:
    texts = [b"%d" % number + b"x" * 1000 for number in range(300)]
    write(container, 0, *texts)
    assert await whole(container) == b"".join(text + b"\n" for text in texts)
    assert await whole(container, tail_lines=1) == texts[-1] + b"\n"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_POLL_SECONDS", 0.001)


async def test_a_log_is_followed_until_the_end(container: ContainerFolder, quick: None) -> None:
    over = False
    write(container, 0, b"before", b"one")
    output = stream(container, follow=True, tail_lines=1, ended=lambda: over)
    async with asyncio.timeout(10):
        assert await anext(output) == b"one\n"
        path = write(container, 0, b"two")
        assert await anext(output) == b"two\n"
        # conmon puts a new file in its place when the bound is reached.
        write(container, 0, b"last of the old")
        path.rename(path.with_name("old"))
        write(container, 0, b"first of the new")
        assert await anext(output) == b"last of the old\nfirst of the new\n"
        write(container, 1, b"restarted")
        assert await anext(output) == b"restarted\n"
        # What is written until the end is known is read.
        write(container, 1, b"last words")
        over = True
        assert [piece async for piece in output] == [b"last words\n"]


async def test_a_log_that_is_cut_is_read_anew(container: ContainerFolder, quick: None) -> None:
    path = write(container, 0, b"one")
    with path.open("ab") as file:
        file.write(b"half of a rec")
    over = False
    output = stream(container, follow=True, ended=lambda: over)
    async with asyncio.timeout(10):
        assert await anext(output) == b"one\n"
        path.write_bytes(line(b"x"))
        over = True
        found = b"".join([piece async for piece in output])
    assert found == b"x\n"


async def test_who_follows_no_more_holds_no_file(container: ContainerFolder, quick: None) -> None:
    write(container, 0, b"one")
    output = stream(container, follow=True)
    assert await anext(output) == b"one\n"
    held = _open_logs(container)
    await output.aclose()  # type: ignore[attr-defined]
    assert (held, _open_logs(container)) == (1, 0)


def _open_logs(container: ContainerFolder) -> int:
    targets = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum(target == container.attempt(0).log for target in targets)
