"""Which process is meant, what conmon says of it, how it ended, and which runtime runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import termios
import time
from dataclasses import replace
from datetime import UTC, datetime
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from sandkeeper.shim.engines.base import EngineError, RuntimeInfo
from sandkeeper.shim.engines.oci import exits, files, monitor, notes, processes, runtimes, sessions, tools
from sandkeeper.shim.engines.oci.cgroups import Cgroups
from sandkeeper.shim.engines.oci.folders import AttemptFolder, SandboxFolder
from sandkeeper.shim.engines.oci.notes import Started, read_started
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.engines.oci.processes import ProcessRef, boot_id, read_json, write_json
from sandkeeper.shim.settings import OCISettings, ShimSettings

AT = datetime(2026, 1, 1, tzinfo=UTC)


def own() -> ProcessRef:
    found = ProcessRef.of(os.getpid())
    assert found is not None
    return found


# Identity

EARLIER = replace(own(), start=own().start - 1)
LATER = replace(own(), start=own().start + 1)
OTHER_BOOT = replace(own(), boot="00000000-0000-0000-0000-000000000000")


async def test_a_process_is_known_by_its_pid_and_start() -> None:
    found = own()
    assert found == ProcessRef(os.getpid(), found.start, boot_id())
    assert found.alive()
    assert found.send(0)
    assert not found.join(0.0)


@pytest.mark.parametrize("ref", [EARLIER, LATER, OTHER_BOOT], ids=["earlier", "later", "other boot"])
async def test_another_process_with_the_same_pid_is_not_taken_for_it(ref: ProcessRef) -> None:
    """SIGKILL would end this very process."""
    assert not ref.alive()
    assert ref.pidfd() is None
    assert not ref.send(signal.SIGKILL)
    assert ref.join(0.0)
    async with asyncio.timeout(5):
        await ref.ended()


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31 - 1])
def test_a_pid_of_nobody_is_no_process(pid: int) -> None:
    assert ProcessRef.of(pid) is None
    ref = ProcessRef(pid, 0, boot_id())
    assert not ref.alive()
    assert not ref.send(signal.SIGKILL)
    assert ref.join(0.0)


def test_a_reference_leaves_no_descriptor_open() -> None:
    held = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for ref in (own(), EARLIER, OTHER_BOOT):
        ref.send(0)
        ref.join(0.0)
    assert sorted(os.listdir("/proc/self/fd")) == held  # noqa: PTH208


@pytest.mark.parametrize(
    ("name", "found"),
    [("cat", ("S", 42)), ("a) Z 1", ("S", 42)), (") (", ("S", 42)), ("\n", ("S", 42))],
)
def test_a_process_of_any_name_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, found: tuple[str, int]
) -> None:
    fields = ["S", *("0" for _ in range(18)), "42", "0"]
    monkeypatch.setattr(files, "read", lambda path: f"7 ({name}) {' '.join(fields)}\n".encode())
    assert processes._stat(7) == found


@pytest.mark.parametrize("state", ["Z", "X"])
def test_a_process_that_waits_to_be_reaped_has_ended(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(processes, "_stat", lambda pid: (state, own_start))
    own_start = LATER.start - 1
    assert ProcessRef.of(os.getpid()) is None


@pytest.mark.parametrize("ref", [own(), EARLIER, OTHER_BOOT])
def test_a_reference_travels(ref: ProcessRef) -> None:
    assert ProcessRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


@pytest.mark.parametrize(
    "value",
    [None, {}, [], 7, "x", {"pid": 1, "start": 2}, {"pid": "x", "start": 2, "boot": ""},
     {"pid": None, "start": 2, "boot": ""}, {"pid": float("inf"), "start": 2, "boot": ""}],
)  # fmt: skip
def test_what_is_no_reference_is_none(value: Any) -> None:
    assert ProcessRef.from_json(value) is None


def test_nobody_elses_child_is_reaped() -> None:
    assert processes.reap(os.getpid()) is None


# Documents


def test_a_document_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_json(path) is None
    write_json(path, {"a": [1, "ä"]})
    write_json(path, {"b": None})
    assert read_json(path) == {"b": None}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"\0" * 50])
def test_a_torn_document_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") == {}


# Programs


def script(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_both_streams_and_the_status_come_back(tmp_path: Path) -> None:
    assert tools.run([script(tmp_path, "echo out; echo err >&2; exit 3")], 20) == tools.Result(
        3, "out\nerr\n"
    )
    assert tools.run([script(tmp_path, "echo out; kill -9 $$")], 20) == tools.Result(-9, "out\n")
    assert tools.run([script(tmp_path, "echo out; exit 3")], 20, quiet=True) == tools.Result(3, "")
    with pytest.raises(FileNotFoundError):
        tools.run([str(tmp_path / "none")], 20)


def test_of_endless_output_the_last_is_kept(tmp_path: Path) -> None:
    result = tools.run([script(tmp_path, "head -c 5000000 /dev/zero; echo end; exit 1")], 20)
    assert (result.status, len(result.output)) == (1, tools.MAX_OUTPUT)
    assert result.output.endswith("end\n")


@pytest.mark.parametrize(
    "text", ["exec sleep 60", "exec yes", "exec sleep 60 >/dev/null 2>&1", "sleep 2 & wait"]
)
def test_a_program_that_does_not_end_is_ended(tmp_path: Path, text: str) -> None:
    program = script(tmp_path, f"echo $$ >{tmp_path}/pid; {text}")
    result = tools.run([program], 0.5)
    assert (result.status, result.words) == (124, "program did not end within 0.5 s")
    assert ProcessRef.of(int((tmp_path / "pid").read_text())) is None


def test_a_conmon_that_hangs_is_ended(tmp_path: Path, attempt: AttemptFolder, cgroups: Cgroups) -> None:
    conmon = script(tmp_path, f"echo $$ >{tmp_path}/pid; exec sleep 60")
    with pytest.raises(EngineError, match="StartError"):
        monitor.create(conmon, "crun", tmp_path, attempt, 4096, cgroups, 0.5)
    assert ProcessRef.of(int((tmp_path / "pid").read_text())) is None


# conmon's words


@pytest.mark.parametrize(
    ("answer", "pid"),
    [
        (b'{"data": 7}\n', 7),
        (b'{"pid": 7}', 7),
        (b'{"data": 7, "pid": 8, "message": "x"}\n', 7),
        (b'{"data": "7"}', 7),
    ],
)
def test_conmon_says_the_pid(answer: bytes, pid: int) -> None:
    assert monitor._pid_of(answer, 1.0) == pid


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"data": -1, "message": "no such file"}\n', "no such file"),
        (b'{"data": 0}', "without a word"),
        (b'{"data": -1, "message": ""}', "without a word"),
        (b"", "without a word"),
        (b"conmon: cannot\n", "conmon: cannot"),
        (b"[7]", r"\[7\]"),
        (b"7", "7"),
        (b"null", "null"),
        (b'{"data": null, "message": "x"}', "data"),
        (b'{"data": 1e999}', "1e999"),
        (b"[" * 65536, r"\[\["),
        (b"\xff\xfe", "\ufffd"),
        (b'{"data": -1, "message": {"a": 1}}', "a"),
    ],
)
def test_what_conmon_says_instead_is_the_reason(answer: bytes, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        monitor._pid_of(answer, 1.0)
    assert (caught.value.reason, caught.value.retryable) == ("StartError", False)
    assert len(caught.value.message) <= 501


def test_a_conmon_that_says_nothing_in_time_may_be_asked_again() -> None:
    with pytest.raises(EngineError, match=r"within 1\.5 s") as caught:
        monitor._pid_of(None, 1.5)
    assert (caught.value.reason, caught.value.retryable) == ("StartError", True)


def test_an_answer_is_read_to_the_end_of_its_line_or_of_the_stream() -> None:
    def answered(*pieces: bytes, close: bool = True, seconds: float = 10.0) -> bytes | None:
        read, write = os.pipe()
        try:
            for piece in pieces:
                os.write(write, piece)
            if close:
                os.close(write)
            return monitor._read_line(read, time.monotonic() + seconds)
        finally:
            os.close(read)
            if not close:
                os.close(write)

    assert answered(b'{"data"', b": 7}\n", close=False) == b'{"data": 7}\n'
    assert answered(b'{"data": 7}') == b'{"data": 7}'
    assert answered() == b""
    assert answered(close=False, seconds=0.0) is None
    assert answered(b"no end", close=False, seconds=0.01) is None
    endless = answered(b"x" * 65536, close=False)
    assert endless is not None
    assert len(endless) == 65536


@pytest.fixture
def sandbox(tmp_path: Path) -> SandboxFolder:
    folder = SandboxFolder.under(tmp_path, tmp_path / "run", "u-1")
    for each in (folder.path, folder.run):
        each.mkdir(parents=True)
    return folder


@pytest.fixture
def attempt(sandbox: SandboxFolder) -> AttemptFolder:
    folder = sandbox.container("main").attempt(0)
    for each in (folder.path, folder.run):
        each.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("text", "pid"), [("7", 7), ("7\n", 7), ("", 0), ("x", 0), ("7 8", 0), ("9" * 5000, 0)]
)
def test_a_pid_file(tmp_path: Path, text: str, pid: int) -> None:
    assert monitor.read_pid(tmp_path / "pid") == 0
    (tmp_path / "pid").write_text(text)
    assert monitor.read_pid(tmp_path / "pid") == pid


@pytest.mark.parametrize("pid", [os.getpid(), 0, -1, 2**22 + 1])
def test_a_process_of_another_name_is_no_monitor(attempt: AttemptFolder, pid: int) -> None:
    assert monitor.find(attempt) is None
    attempt.monitor_pid_file.write_text(str(pid))
    assert monitor.find(attempt) is None


def test_what_was_started_is_read_again(attempt: AttemptFolder) -> None:
    assert read_started(attempt) is None
    write_json(attempt.started, {"process": own().to_json(), "monitor": None})
    assert read_started(attempt) == Started(own(), None)
    write_json(attempt.started, {"process": own().to_json(), "monitor": EARLIER.to_json()})
    assert read_started(attempt) == Started(own(), EARLIER)
    attempt.started.write_text('{"process": {"pid"')
    assert read_started(attempt) is None


# How a process ended


@pytest.mark.parametrize(
    ("code", "oom", "status", "number", "reason"),
    [
        (0, False, 0, 0, "Completed"),
        (0, True, 0, 0, "Completed"),
        (1, False, 1, 0, "Error"),
        (128, False, 128, 0, "Error"),
        (137, False, 137, 9, "Signaled"),
        (137, True, 137, 9, "OOMKilled"),
        (1, True, 1, 0, "OOMKilled"),
        (143, False, 143, 15, "Signaled"),
        (192, False, 192, 64, "Signaled"),
        (193, False, 193, 0, "Error"),
        (255, False, 255, 0, "Error"),
        (256 + 3, False, 3, 0, "Error"),
        (-1, False, 255, 0, "Error"),
    ],
)
def test_exit_codes_are_told_apart(code: int, oom: bool, status: int, number: int, reason: str) -> None:
    found = exits.decide(code, AT, out_of_memory=oom)
    assert (found.status, found.signal, found.reason, found.exited_at) == (status, number, reason, AT)


@pytest.fixture
def cgroups(tmp_path: Path) -> Cgroups:
    return Cgroups("sandkeeper", mountinfo=f"1 2 3 / {tmp_path}/cgroup rw - cgroup2 cgroup2 rw")


def test_conmons_exit_file_is_read_when_it_is_whole(attempt: AttemptFolder, cgroups: Cgroups) -> None:
    assert exits.read(attempt, cgroups) is None
    for torn in ("", "-", "x", "1 2"):
        attempt.exit_file.write_text(torn)
        assert exits.read(attempt, cgroups) is None
    attempt.exit_file.write_text("3")
    os.utime(attempt.exit_file, (AT.timestamp(), AT.timestamp()))
    assert exits.read(attempt, cgroups) == exits.decide(3, AT, out_of_memory=False)


@pytest.mark.parametrize("spoilt", [None, "", "x"])
def test_an_exit_that_the_full_disk_did_not_take_is_read_from_its_copy(
    attempt: AttemptFolder, cgroups: Cgroups, spoilt: str | None
) -> None:
    """conmon writes to both folders; the second is empty, or not there, after a restart of the machine."""
    attempt.run.rmdir()
    assert exits.read(attempt, cgroups) is None
    attempt.run.mkdir()
    assert exits.read(attempt, cgroups) is None
    if spoilt is not None:
        attempt.exit_file.write_text(spoilt)
    attempt.exit_copy.write_text("3")
    os.utime(attempt.exit_copy, (AT.timestamp(), AT.timestamp()))
    assert exits.read(attempt, cgroups) == exits.decide(3, AT, out_of_memory=False)


def test_an_end_for_memory_is_seen_by_conmon_or_in_the_cgroup(
    attempt: AttemptFolder, cgroups: Cgroups, tmp_path: Path
) -> None:
    def reason() -> str | None:
        found = exits.read(attempt, cgroups)
        return found and found.reason

    attempt.exit_file.write_text("137")
    assert reason() == "Signaled"
    attempt.oom_file.write_text("")
    assert reason() == "OOMKilled"
    attempt.oom_file.unlink()
    events = tmp_path / "cgroup" / "sandkeeper" / "u-1" / "main" / "memory.events"
    events.parent.mkdir(parents=True)
    events.write_text("oom_kill 1\n")
    assert reason() == "OOMKilled"
    # One that the program outlived.
    attempt.exit_file.write_text("0")
    assert reason() == "Completed"


@pytest.mark.parametrize(
    ("process", "killed", "reason", "status"),
    [
        (EARLIER, {"signal": 15}, "Signaled", 143),
        (EARLIER, {"signal": 9}, "Signaled", 137),
        (EARLIER, {}, "SandboxLost", 255),
        (EARLIER, None, "SandboxLost", 255),
        (OTHER_BOOT, {"signal": 9}, "SandboxLost", 255),
    ],
)
def test_the_sandbox_process_ends_by_our_signal_or_is_lost(
    sandbox: SandboxFolder, process: ProcessRef, killed: dict[str, int] | None, reason: str, status: int
) -> None:
    if killed is not None:
        write_json(sandbox.killed, killed)
    write_json(sandbox.exit, {"at": AT.timestamp()})
    found = exits.of_sandbox(sandbox, process)
    assert (found.reason, found.status, found.exited_at) == (reason, status, AT)


def test_a_sandbox_that_was_removed_was_killed(sandbox: SandboxFolder) -> None:
    sandbox.path.rmdir()
    assert exits.of_sandbox(sandbox, EARLIER).signal == signal.SIGKILL


def test_what_was_started_in_an_earlier_boot_is_known_without_what_was_in_memory(
    sandbox: SandboxFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.write_prepared(sandbox, "crun", {})
    notes.begin(sandbox)
    notes.begin(sandbox)
    assert sandbox.starting.samefile(sandbox.prepared)
    assert not notes.of_earlier_boot(sandbox)
    monkeypatch.setattr(notes, "boot_id", lambda: "another")
    assert notes.of_earlier_boot(sandbox)


def test_what_was_prepared_in_an_earlier_boot_and_started_in_this_is_of_this(
    sandbox: SandboxFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes.write_prepared(sandbox, "crun", {})
    monkeypatch.setattr(notes, "boot_id", lambda: "another")
    assert not notes.of_earlier_boot(sandbox)
    notes.begin(sandbox)
    assert not notes.of_earlier_boot(sandbox)
    assert notes.read_runtime(sandbox) == "crun"


@pytest.mark.parametrize("damage", ["", "[]", '{"boot": 7}', None])
def test_a_damaged_note_says_nothing_of_the_boot(sandbox: SandboxFolder, damage: str | None) -> None:
    """Then processes are looked for among those that run."""
    if damage is not None:
        sandbox.starting.write_text(damage)
    assert not notes.of_earlier_boot(sandbox)


# What programs say


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ""),
        ("\n \n", ""),
        ("plain words\n", "plain words"),
        ("1\n2\n\n3\n4\n", "2; 3; 4"),
        ("2026-01-01T00:00:00.000000Z: exec `x`: not found", "exec `x`: not found"),
        ('time="2026-01-01T00:00:00Z" level=error msg="runc create failed: no \\"x\\""', 'no "x"'),
        ("error: bad", "bad"),
        ("x" * 600, "x" * 500 + "…"),
    ],
)
def test_a_runtimes_words_are_for_people(text: str, said: str) -> None:
    assert tools.clean(text) == said


# Runtimes


def runtime(name: str, seconds: float = 1.0, ready: bool = True) -> runtimes.Runtime:
    return runtimes.Runtime(RuntimeInfo(name, ready=ready), name, seconds)


def order(default: str, *found: runtimes.Runtime) -> list[str]:
    return [info.name for info in runtimes.ordered({each.info.name: each for each in found}, default)]


def test_the_fastest_runtime_that_works_is_the_default() -> None:
    slow, fast, broken = runtime("slow", 2.0), runtime("fast", 1.0), runtime("broken", 0.1, ready=False)
    assert order("", slow, broken, fast) == ["fast", "slow", "broken"]
    assert order("slow", fast, slow, broken) == ["slow", "fast", "broken"]


def test_a_default_that_does_not_work_is_not_the_default() -> None:
    slow, fast, broken = runtime("slow", 2.0), runtime("fast", 1.0), runtime("broken", 0.1, ready=False)
    assert order("broken", slow, fast, broken) == ["fast", "slow", "broken"]
    assert order("missing", slow, fast) == ["fast", "slow"]
    assert order("any") == []


def test_a_runtime_that_is_not_installed_is_told(tmp_path: Path, cgroups: Cgroups) -> None:
    options = Options(tmp_path, runtimes={"odd": str(tmp_path / "no-such-runtime")})
    (found,) = runtimes.probe_all(options, cgroups, None).values()  # type: ignore[arg-type]
    assert not found.info.ready
    assert "is not installed" in found.info.message


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("crun version 1.8.1\ncommit: x\n", "1.8.1"),
        ("runc version 1.1.5+ds1\n", "1.1.5+ds1"),
        ("", ""),
        ("odd", "odd"),
    ],
)
def test_a_runtimes_version(output: str, version: str) -> None:
    assert runtimes._version(tools.Result(0, output)) == version


# Options


def test_options_come_from_the_shims_settings(tmp_path: Path) -> None:
    oci = OCISettings(
        runtimes=("crun", "/opt/bin/runsc"), default_runtime="runsc", default_pids=7, allow_host_network=True
    )
    settings = ShimSettings(node_name="n", state_dir=tmp_path / "state", run_dir=tmp_path / "run", oci=oci)
    found = Options.from_settings(settings)
    assert found.root_dir == tmp_path / "state" / "oci"
    assert dict(found.runtimes) == {"crun": "crun", "runsc": "/opt/bin/runsc"}
    assert (found.default_runtime, found.default_pids, found.allow_host_network) == ("runsc", 7, True)


def test_the_defaults_are_safe(tmp_path: Path) -> None:
    for options in (
        Options(tmp_path),
        Options.from_settings(
            ShimSettings(node_name="n", state_dir=tmp_path / "state", run_dir=tmp_path / "run")
        ),
    ):
        assert not options.allow_host_network
        assert options.allowed_capabilities == ()
        assert min(options.default_memory_bytes, options.default_pids, options.log_max_bytes) > 0


# Terminals


@pytest.mark.parametrize(
    ("width", "height", "found"), [(80, 24, (24, 80)), (2**32 - 1, 2**16, (65535, 65535))]
)
def test_a_terminal_takes_any_size(width: int, height: int, found: tuple[int, int]) -> None:
    master, slave = os.openpty()
    try:
        sessions._set_size(master, width, height)
        assert struct.unpack("HHHH", ioctl(slave, termios.TIOCGWINSZ, b"\0" * 8))[:2] == found
    finally:
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize("pid", [0, -1])
def test_no_pid_reaps_no_child(pid: int) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert processes.reap(pid) is None
    assert processes.reap(child) == 0
