"""`sandkeeper conformance` as a command: what it says of real servers, how it ends, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster import eventually
from tests.conformance.shims import Shims, shims
from tests.conformance.targets import through_containerd

from sandkeeper.conformance.between import WITHHELD
from sandkeeper.conformance.contract import rules
from sandkeeper.conformance.server import Server

SECONDS = 280


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sandkeeper.cli.main", "conformance", *arguments]


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=SECONDS, cwd="/"
    )


def found(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Of -o json: rule -> what was found."""
    assert result.returncode == 0, result.stdout + result.stderr
    return {each["rule"]: each for each in json.loads(result.stdout)["rules"]}


@pytest.fixture(scope="module")
def made() -> Iterator[Shims]:
    with shims("simulated") as those:
        yield those


def serving(made: Shims, *, own: bool = False) -> Server:
    return asyncio.run(made.server(own=own))


def test_every_rule_is_told_and_none_is_broken(made: Shims) -> None:
    server = serving(made)
    by_rule = found(called(server.address, "-o", "json"))
    assert list(by_rule) == [rule.number for rule in rules()]
    assert not [each for each in by_rule.values() if each["result"] == "broken"]
    # What a lone address cannot be asked is told with its reason.
    apart = {number for number, each in by_rule.items() if each["result"] == "not applicable"}
    assert {"CALL-2", "RESTART-3", "RESTART-4"} <= apart
    assert len(apart) < 15
    assert all(each["seen"] for each in by_rule.values())
    assert not made.files()


def test_a_broken_must_is_told_and_ends_with_1(made: Shims) -> None:
    server = serving(made, own=True)
    assert server.host is not None
    server.host.kill()
    server.host.launch({"usage": "error"})
    asyncio.run(server.host.ready())
    result = called(server.address, "--rule", "METRICS-1", "--rule", "INFO-*")
    assert result.returncode == 1, result.stdout + result.stderr
    lines = {line.split()[0]: line.split()[1:3] for line in result.stdout.splitlines() if "-" in line[:9]}
    assert lines == {
        "METRICS-1": ["MUST", "broken"],
        "INFO-1": ["MUST", "kept"],
        "INFO-2": ["MUST", "kept"],
    }


def test_over_tls_it_is_checked_as_the_operator_calls(made: Shims) -> None:
    clients = serving(made, own=True).clients
    assert clients is not None
    files, stranger = clients.permitted[0], clients.strangers[0]
    start = (clients.address, "--server-name", clients.server_name, "--rule", "START-1", "-o", "json")
    by_rule = found(
        called(*start, "--tls-ca", str(files.ca), "--tls-cert", str(files.cert), "--tls-key", str(files.key))
    )
    assert by_rule["START-1"]["result"] == "kept"
    denied = called(
        *start, "--tls-ca", str(files.ca), "--tls-cert", str(stranger.cert), "--tls-key", str(stranger.key)
    )
    assert denied.returncode == 2
    assert "PERMISSION_DENIED" in denied.stderr


def test_cut_short_it_leaves_nothing(made: Shims) -> None:
    server = serving(made)
    process = subprocess.Popen(
        command(server.address), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    try:
        eventually(made.files)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 2, said
    assert "cut short" in said
    eventually(lambda: not made.files(), seen=made.files)


def test_what_cannot_be_checked_ends_with_2(tmp_path: Path) -> None:
    for arguments, word in (
        ((f"unix:{tmp_path}/nobody.sock",), "no server answers"),
        (("127.0.0.1:1",), "TLS"),
        (("unix:/x", "--rule", "NO-SUCH"), "NO-SUCH"),
        (("unix:/x", "--tls-ca", "/x"), "--tls-key"),
    ):
        result = called(*arguments)
        assert result.returncode == 2, result.stdout + result.stderr
        assert word in result.stderr


@pytest.mark.oci
def test_through_containerd_what_it_keeps_back_is_told_with_the_reason(made: Shims) -> None:
    with through_containerd(made, serving(made)) as at:
        assert at.between is not None
        by_rule = found(
            called(
                *(at.address, "--sandboxer", at.between.sandboxer),
                *("--namespace", at.between.namespace, "-o", "json"),
            )
        )
        wrong = called(at.address, "--sandboxer", "nobody", "--namespace", at.between.namespace)
        assert (wrong.returncode, "nobody" in wrong.stderr) == (2, True), wrong.stderr
    kept = {number for number, each in by_rule.items() if each["result"] == "kept"}
    assert kept >= {"CREATE-2", "START-1", "WAIT-1", "STATUS-2", "STOP-3", "SHUTDOWN-2"}
    assert len(kept) > 35
    assert not [each for each in by_rule.values() if each["result"] == "broken"]
    for number, reason in WITHHELD.items():
        assert by_rule[number]["seen"] == [reason]
