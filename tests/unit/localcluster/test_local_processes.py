"""Processes by name: begun, found again by another object, ended, never mistaken."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cluster import eventually

from sandkeeper.localcluster.processes import ProcessDied, Processes, start_time

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
]

# Its first thread ends alone, by Linux' exit(2), which ends but one thread; ps calls it a zombie from then on.
EXIT = {"x86_64": 60, "aarch64": 93}
HEADLESS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(60,)).start()
print('headless', flush=True)
ctypes.CDLL(None).syscall(int(sys.argv[1]), 0)
"""


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    for name in made.names():
        made.kill(name)


def test_one_runs_until_it_is_stopped(processes: Processes) -> None:
    pid = processes.spawn("one", SLEEP)
    assert processes.pid("one") == pid
    assert processes.names() == ["one"]
    processes.stop("one")
    assert not processes.alive("one")
    assert start_time(pid) is None
    assert processes.names() == []
    processes.stop("one")  # repeatable


def test_a_name_is_taken_while_it_runs(processes: Processes) -> None:
    processes.spawn("one", SLEEP)
    with pytest.raises(RuntimeError, match="one"):
        processes.spawn("one", SLEEP)


def test_another_object_finds_and_ends_it(processes: Processes, tmp_path: Path) -> None:
    pid = processes.spawn("one", SLEEP)
    assert Processes(tmp_path).pid("one") == pid
    processes.signal("one", signal.SIGKILL)
    eventually(lambda: Processes(tmp_path).pid("one") is None)


def test_a_pid_that_is_somebody_elses_by_now_is_not_ours(processes: Processes, tmp_path: Path) -> None:
    """Ours by number, not by start time: no signal may reach it. Here it would be this very process."""
    (tmp_path / "processes").mkdir()
    record = {"pid": os.getpid(), "startTime": (start_time(os.getpid()) or 0) - 1}
    (tmp_path / "processes" / "one.json").write_text(json.dumps(record))
    assert processes.pid("one") is None
    processes.kill("one")


def test_half_a_record_is_none(processes: Processes, tmp_path: Path) -> None:
    (tmp_path / "processes").mkdir()
    (tmp_path / "processes" / "one.json").write_text('{"pid": ')
    assert processes.pid("one") is None


def test_one_that_does_not_hear_is_killed(processes: Processes) -> None:
    pid = processes.spawn("deaf", STUBBORN)
    eventually(lambda: "deaf" in processes.tail("deaf"))
    processes.stop("deaf", grace=0.1)
    assert start_time(pid) is None


def test_one_that_ended_is_told_with_the_end_of_its_log(processes: Processes) -> None:
    processes.spawn("short", [sys.executable, "-c", "print('last words')"])
    eventually(lambda: not processes.alive("short"))
    with pytest.raises(ProcessDied, match="last words"):
        processes.check("short")


def test_the_environment_is_what_was_given(processes: Processes) -> None:
    show = "import os; print(sorted(k for k in os.environ if not k.startswith('LC_')))"
    processes.spawn("env", [sys.executable, "-c", show], env={"ONLY": "this"})
    eventually(lambda: not processes.alive("env"))
    assert processes.tail("env") == "['ONLY']"


@pytest.mark.skipif(platform.machine() not in EXIT, reason="the number of exit(2) is not known here")
def test_one_whose_first_thread_has_ended_still_runs(processes: Processes) -> None:
    """Its lock and its sockets are held until the last thread has ended."""
    argv = [sys.executable, "-c", HEADLESS, str(EXIT[platform.machine()])]
    pid = processes.spawn("headless", argv)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert processes.alive("headless")
    processes.kill("headless")
    assert not processes.alive("headless")


def test_of_no_process_there_is_no_start_time() -> None:
    assert start_time(2**22 + 1) is None
    assert start_time(os.getpid()) is not None
