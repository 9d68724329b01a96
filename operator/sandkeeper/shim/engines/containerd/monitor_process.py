"""A container's monitor, a process of its own: keeps its output, bounded, and learns how it ended.

It is to a task of containerd's what conmon is to a container of the oci engine: it outlives this shim and does not
need containerd. Only what Python is born with is imported, so that it starts quickly and stays small.

Run as `python -ISEB monitor_process.py --sandkeeper-monitor ID FOLDER STDOUT STDERR LOG BYTES EXIT_FILE OOM_EVENTS`.
STDOUT and STDERR are descriptors of fifos, open since before anybody wrote to them. FOLDER has `task`: lines with the
socket of containerd's shim, the version of its Task service, and the task's id. At the end `exit` is written there,
and EXIT_FILE, with the exit code and the time of the exit as their own; and `oom` where the kernel has killed for
memory.
"""

import os
import select
import socket
import struct
import sys
import time

CHUNK = 65536
LONGEST_LINE = 16384
"""Bytes of a program's line in one line of the log: of a longer one each part has its own."""


class Log:
    """The file, in Kubernetes' CRI format. Full, it begins anew, as conmon's does."""

    def __init__(self, path: str, most: int) -> None:
        self.path = path
        self.most = most
        self.size = 0
        self.fd = -1
        self.begin()

    def begin(self) -> None:
        """A new file in the old one's place: whoever reads that one reads it to its end."""
        temporary = self.path + ".new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.rename(temporary, self.path)
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self.size = fd, 0

    def write(self, records: bytes) -> None:
        """Whole records. A full disk loses them: a program must not stand still for its log."""
        try:
            if self.size + len(records) > self.most:
                self.begin()
            self.size += os.write(self.fd, records)
        except OSError:
            pass


class Stream:
    """One of the program's outputs, cut into lines."""

    def __init__(self, name: bytes, fd: int, longest: int) -> None:
        self.name = name
        self.longest = longest
        self.fd = fd
        self.rest = b""

    def read(self, log: Log) -> None:
        """What is there."""
        while True:
            try:
                data = os.read(self.fd, CHUNK)
            except BlockingIOError:
                break
            if not data:
                break
            self._record(data, log)
        if self.rest:
            self._put(
                [(b"P", self.rest)], log
            )  # at once, as conmon does: someone may be waiting for a prompt
            self.rest = b""

    def _record(self, data: bytes, log: Log) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        parts = []
        for line in lines:
            while len(line) > self.longest:
                parts.append((b"P", line[: self.longest]))
                line = line[self.longest :]
            parts.append((b"F", line))
        while len(self.rest) > self.longest:
            parts.append((b"P", self.rest[: self.longest]))
            self.rest = self.rest[self.longest :]
        self._put(parts, log)

    def _put(self, parts: "list[tuple[bytes, bytes]]", log: Log) -> None:
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // 10**9))
        head = f"{stamp}.{now % 10**9:09d}+00:00 ".encode() + self.name
        records, most = b"", min(CHUNK, log.most)
        for tag, text in parts:
            record = head + b" " + tag + b" " + text + b"\n"
            if records and len(records) + len(record) > most:
                log.write(records)
                records = b""
            records += record
        if records:
            log.write(records)


def copy(streams: "list[Stream]", log: Log) -> None:
    """Until nobody can write any more. Before anybody has opened them they are not at their end either (poll(2) on a
    fifo: no POLLHUP before there was a writer since it was opened)."""
    poll, left = select.poll(), {each.fd: each for each in streams}
    for fd in left:
        poll.register(fd, select.POLLIN)
    while left:
        for fd, event in poll.poll():
            left[fd].read(log)
            if event & (select.POLLHUP | select.POLLERR) and not event & select.POLLIN:
                poll.unregister(fd)
                del left[fd]


def field(number: int, value: bytes) -> bytes:
    """A field of a protobuf message that holds bytes."""
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def fields(data: bytes) -> "dict[int, int | bytes]":
    """The fields of a message that has numbers and bytes only; the last of each. Raises IndexError, ValueError."""
    found: dict[int, int | bytes] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            found[key >> 3] = number()
        elif key & 7 == 2:
            size = number()
            found[key >> 3] = data[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {key & 7}")
    return found


def ask(path: str, version: str, task: str) -> "tuple[int, float] | None":
    """Exit code and time from containerd's shim, as soon as there is one; None where it cannot be had.

    ttrpc: a frame of length, stream, type (1: request, 2: response) and flags, then the message.
    """
    request = field(1, f"containerd.task.v{version}.Task".encode()) + field(2, b"Wait")
    request += field(3, field(1, task.encode()))
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(struct.pack(">IIBB", len(request), 1, 1, 0) + request)
            length, _, kind, _ = struct.unpack(">IIBB", exactly(connection, 10))
            answer = fields(exactly(connection, length))
            if kind != 2 or 1 in answer:
                return None
            found = fields(bytes(answer.get(2, b"")))
            at = fields(bytes(found.get(2, b"")))
            return int(found.get(1, 0)), int(at.get(1, 0)) + int(at.get(2, 0)) / 1e9
    except (OSError, ValueError, IndexError, TypeError):
        return None


def exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise OSError("it hung up")
        data += more
    return data


def killed_for_memory(events: str) -> bool:
    """By the cgroup's memory.events (v2) or memory.oom_control (v1)."""
    try:
        with open(events) as file:
            return any(
                line.split()[0] == "oom_kill" and int(line.split()[1]) for line in file if line.strip()
            )
    except (OSError, ValueError, IndexError):
        return False


def note(path: str, text: str, at: float) -> None:
    """Whole or not at all, with a time of its own."""
    temporary = path + ".new"
    try:
        with open(temporary, "w") as file:
            file.write(text)
        if at:
            os.utime(temporary, (at, at))
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            pass


def main(folder: str, stdout: str, stderr: str, log: str, most: str, exit_file: str, events: str) -> None:
    longest = min(LONGEST_LINE, int(most) // 4)
    streams = [Stream(b"stdout", int(stdout), longest), Stream(b"stderr", int(stderr), longest)]
    copy(streams, Log(log, int(most)))
    try:
        with open(f"{folder}/task") as file:
            path, version, task = file.read().splitlines()
    except (OSError, ValueError):
        return
    found = ask(path, version, task)
    if found is None:
        return
    code, at = found
    if code and killed_for_memory(events):
        note(f"{folder}/oom", "", at)
    note(f"{folder}/exit", str(code), at)
    note(exit_file, str(code), at)


if __name__ == "__main__":
    main(*sys.argv[3:])
