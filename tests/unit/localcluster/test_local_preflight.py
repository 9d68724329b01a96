"""What the machine lacks, and the command that would help."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.localcluster import preflight
from sandkeeper.localcluster.preflight import ENGINE, TESTS, Need, command, missing, problems


def test_nothing_is_missing_where_all_is_present() -> None:
    assert missing((*ENGINE, *TESTS), present=lambda _program: True) == []


def test_any_of_the_programs_is_enough() -> None:
    assert missing([Need(("crun", "runc"), "crun", "x")], present=lambda program: program == "runc") == []


def test_a_package_is_missing_once() -> None:
    lacking = missing((*ENGINE, *TESTS), present=lambda _program: False)
    packages = [need.package for need in lacking]
    assert len(packages) == len(set(packages))
    assert {"crun", "runc", "conmon", "skopeo", "umoci", "busybox-static"} <= set(packages)


def test_the_command_is_an_argument_vector_without_sudo() -> None:
    argv = command([Need(("a",), "a-package", "x"), Need(("b",), "b-package", "x")])
    assert argv[:2] == ["apt-get", "install"]
    assert argv[-2:] == ["a-package", "b-package"]


def test_an_absolute_path_is_looked_for_as_it_is(tmp_path: Path) -> None:
    there = tmp_path / "tool"
    there.touch()
    assert missing([Need((str(there),), "p", "x")]) == []
    assert [need.package for need in missing([Need((str(tmp_path / "no"),), "p", "x")])] == ["p"]


@pytest.mark.parametrize("root", [True, False])
def test_problems_names_package_purpose_and_root(monkeypatch: pytest.MonkeyPatch, root: bool) -> None:
    monkeypatch.setattr(preflight.os, "geteuid", lambda: 0 if root else 1000)
    text = problems([Need(("/does/not/exist",), "the-package", "the purpose")])
    assert "the-package (the purpose)" in text
    assert "apt-get install" in text
    assert (preflight.NO_ROOT in text) is not root


def test_nothing_to_say_where_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "geteuid", lambda: 0)
    assert problems([]) == ""


def test_nothing_is_installed_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(preflight, "_apt", lambda _argv: pytest.fail("apt-get must not be run"))
    assert preflight.install([Need(("/does/not/exist",), "p", "x")]) is False
    assert preflight.install([]) is True
