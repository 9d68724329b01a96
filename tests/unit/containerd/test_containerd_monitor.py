"""The monitor of the containerd engine, as the process that it is, with fifos and a shim's socket made by the test."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sandkeeper.shim.engines.containerd import monitor_process
from sandkeeper.shim.engines.oci.logs import Parser
from sandkeeper.wire.containerd import shimtask_pb2

MOST = 32 * 1024
EXITED_AT = 1_700_000_000


@dataclass
class Monitored:
    """A monitor that runs, and what a container's processes would hold of its fifos."""

    folder: Path
    child: subprocess.Popen[bytes]
    outputs: dict[str, int] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def write(self, text: bytes, name: str = "stdout") -> None:
        view = memoryview(text)
        while view:
            view = view[os.write(self.outputs[name], view) :]

    def end(self) -> None:
        """As containerd's shim does at the end of the output; returns when the monitor has ended."""
        for fd in self.outputs.values():
            os.close(fd)
        self.outputs.clear()
        assert self.child.wait(60) == 0

    def text(self) -> bytes:
        return b"".join(Parser(timestamps=False).feed(self.log.read_bytes()))


@pytest.fixture
def monitored(tmp_path: Path) -> Iterator[Monitored]:
    read = []
    for name in ("stdout", "stderr"):
        os.mkfifo(tmp_path / name)
        read.append(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))
    events = tmp_path / "events"
    argv = [
        *(sys.executable, "-ISEB", monitor_process.__file__, "--sandkeeper-monitor", "id", str(tmp_path)),
        *(*map(str, read), str(tmp_path / "log"), str(MOST), str(tmp_path / "exit_file"), str(events)),
    ]
    made = Monitored(tmp_path, subprocess.Popen(argv, pass_fds=read))
    made.outputs = {name: os.open(tmp_path / name, os.O_WRONLY) for name in ("stdout", "stderr")}
    for fd in read:
        os.close(fd)
    yield made
    for fd in made.outputs.values():
        os.close(fd)
    made.child.kill()
    made.child.wait()


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[list[shimtask_pb2.TtrpcRequest]]:
    """A socket that answers one Wait with exit status 137; yields what it was asked."""
    asked: list[shimtask_pb2.TtrpcRequest] = []
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.listen()

    def answer() -> None:
        connection, _ = listening.accept()
        with connection:
            head = connection.recv(10, socket.MSG_WAITALL)
            length, stream, _, _ = struct.unpack(">IIBB", head)
            asked.append(shimtask_pb2.TtrpcRequest.FromString(connection.recv(length, socket.MSG_WAITALL)))
            found = shimtask_pb2.WaitResponse(exit_status=137)
            found.exited_at.FromNanoseconds(EXITED_AT * 10**9 + 500_000_000)
            payload = shimtask_pb2.TtrpcResponse(payload=found.SerializeToString()).SerializeToString()
            connection.sendall(struct.pack(">IIBB", len(payload), stream, 2, 0) + payload)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    (tmp_path / "task").write_text(f"{tmp_path / 's'}\n3\nthe-task\n")
    yield asked
    listening.close()


def test_output_is_kept_line_by_line(monitored: Monitored) -> None:
    monitored.write(b"one\ntwo")
    monitored.write(b"oops\n", "stderr")
    monitored.end()
    lines = [line.split(b" ", 3) for line in monitored.log.read_bytes().splitlines()]
    assert sorted((fields[1], fields[2], fields[3]) for fields in lines) == [
        (b"stderr", b"F", b"oops"),
        (b"stdout", b"F", b"one"),
        (b"stdout", b"P", b"two"),
    ]
    assert all(fields[0].startswith(b"20") for fields in lines)


def test_output_of_a_program_that_ends_before_the_monitor_has_begun(tmp_path: Path) -> None:
    read = []
    for name in ("stdout", "stderr"):
        os.mkfifo(tmp_path / name)
        read.append(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))
        with (tmp_path / name).open("w") as file:
            file.write("gone\n")
    argv = [
        *(sys.executable, "-ISEB", monitor_process.__file__, "--sandkeeper-monitor", "id", str(tmp_path)),
        *(*map(str, read), str(tmp_path / "log"), str(MOST), str(tmp_path / "exit_file"), ""),
    ]
    child = subprocess.Popen(argv, pass_fds=read)
    for fd in read:
        os.close(fd)
    assert child.wait(60) == 0
    assert [line.split(b" ")[3] for line in (tmp_path / "log").read_bytes().splitlines()] == [b"gone"] * 2


def test_a_long_line_comes_in_parts_and_whole(monitored: Monitored) -> None:
    text = b"x" * 20_000 + b"\n"
    monitored.write(text)
    monitored.end()
    assert monitored.text() == text


def test_the_log_is_bounded_and_keeps_the_end(monitored: Monitored) -> None:
    for number in range(5000):
        monitored.write(b"line %d is quite a long one\n" % number)
    monitored.end()
    assert 0 < monitored.log.stat().st_size <= MOST
    assert monitored.text().endswith(b"line 4999 is quite a long one\n")


def test_the_exit_is_asked_for_and_kept(monitored: Monitored, shim: list[shimtask_pb2.TtrpcRequest]) -> None:
    monitored.end()
    (request,) = shim
    assert (request.service, request.method) == ("containerd.task.v3.Task", "Wait")
    assert shimtask_pb2.WaitRequest.FromString(request.payload).id == "the-task"
    for name in ("exit", "exit_file"):
        assert (monitored.folder / name).read_text() == "137"
        assert (monitored.folder / name).stat().st_mtime == EXITED_AT + 0.5
    assert not (monitored.folder / "oom").exists()


def test_a_kill_for_memory_is_noted(monitored: Monitored, shim: list[shimtask_pb2.TtrpcRequest]) -> None:
    (monitored.folder / "events").write_text("oom 1\noom_kill 1\n")
    monitored.end()
    assert len(shim) == 1
    assert (monitored.folder / "oom").exists()


def test_without_an_answer_no_exit_is_made_up(monitored: Monitored) -> None:
    (monitored.folder / "task").write_text(f"{monitored.folder / 'nowhere'}\n3\nx\n")
    monitored.end()
    assert not (monitored.folder / "exit").exists()


def test_messages_are_protobufs() -> None:
    request = shimtask_pb2.TtrpcRequest(service="s" * 300, method="m", payload=b"p")
    made = (
        monitor_process.field(1, b"s" * 300) + monitor_process.field(2, b"m") + monitor_process.field(3, b"p")
    )
    assert shimtask_pb2.TtrpcRequest.FromString(made) == request
    assert monitor_process.fields(made) == {1: b"s" * 300, 2: b"m", 3: b"p"}
    answer = shimtask_pb2.WaitResponse(exit_status=300)
    assert monitor_process.fields(answer.SerializeToString()) == {1: 300}
