"""What the containerd engine decides without a containerd."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.containerd import server, tasks, ttrpc, unpack
from sandkeeper.shim.engines.containerd.client import CallError, start_error
from sandkeeper.shim.engines.containerd.sandboxes import Target
from sandkeeper.shim.engines.oci.options import Options
from sandkeeper.shim.settings import ContainerdSettings, OCISettings, ShimSettings
from sandkeeper.wire.containerd import introspection_pb2

# -- which containerd


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("v2.3.7", (2, 3, 7)),
        ("2.3.7+unknown", (2, 3, 7)),
        ("1.6.20~ds1", (1, 6, 20)),
        ("v2.0.0-rc.1", (2, 0, 0)),
        ("1.7", (1, 7, 0)),
        ("(devel)", None),
        ("", None),
    ],
)
def test_versions(text: str, numbers: tuple[int, int, int] | None) -> None:
    assert server.parse_version(text) == numbers


@pytest.mark.parametrize(
    ("version", "answers"),
    [
        ((1, 6, 20), False),
        ((1, 7, 30), False),
        ((2, 0, 8), False),
        ((2, 0, 9), True),
        ((2, 1, 7), False),
        ((2, 1, 8), True),
        ((2, 2, 3), False),
        ((2, 2, 4), True),
        ((2, 3, 0), True),
        ((3, 0, 0), True),
    ],
)
def test_controllers_that_answer_wrongly_are_known(version: tuple[int, int, int], answers: bool) -> None:
    assert server.controller_answers(version) == answers


def plugin(kind: str, name: str, error: str = "", root: str = "") -> introspection_pb2.Plugin:
    made = introspection_pb2.Plugin(type=f"io.containerd.{kind}", id=name, exports={"root": root})
    if error:
        made.init_err.message = error
    return made


RUNTIME = plugin("runtime.v2", "task")
OVERLAY = plugin("snapshotter.v1", "overlayfs", root="/var/lib/x")
SHIM = plugin("sandbox.controller.v1", "shim")


def test_what_is_understood() -> None:
    found = server.understand("2.3.7", [RUNTIME, OVERLAY, SHIM], "overlayfs")
    assert found == server.Server("2.3.7", "/var/lib/x", {"shim": ""})


def test_a_controller_that_answers_wrongly_is_no_sandboxer() -> None:
    found = server.understand("2.2.3", [RUNTIME, OVERLAY, SHIM], "overlayfs")
    assert found.sandboxers == {}
    assert "2.2.4" in server.why_no_sandboxer(found, "shim")


def test_a_sandboxer_that_is_not_loaded_is_named() -> None:
    found = server.understand("2.3.7", [RUNTIME, OVERLAY, SHIM], "overlayfs")
    assert server.why_no_sandboxer(found, "shim") == ""
    assert "'vmm'" in server.why_no_sandboxer(found, "vmm")


def test_what_is_in_place_of_a_program_is_told_apart() -> None:
    target = Target("vmm", "/usr/bin/crun")
    assert Target.parse(str(target)) == target
    assert Target.parse("/usr/bin/crun") is None
    assert Target.parse("io.containerd.kata.v2") is None


def test_a_task_service_is_asked_without_containerd_only_where_it_can_be() -> None:
    assert tasks.Inside("a", "ttrpc+unix:///run/x.sock", 3).shim == ttrpc.Address("/run/x.sock", 3)
    assert tasks.Inside("a", "grpc+vsock://3:1024", 3).shim is None


@pytest.mark.parametrize(
    ("version", "plugins", "words"),
    [
        ("1.5.18", [RUNTIME, OVERLAY], "too old: 1.6 at least"),
        ("2.3.7", [OVERLAY], "no tasks"),
        ("2.3.7", [RUNTIME], "no such plugin"),
        ("2.3.7", [RUNTIME, plugin("snapshotter.v1", "overlayfs", "no overlay here")], "no overlay here"),
    ],
)
def test_what_is_refused(version: str, plugins: list[introspection_pb2.Plugin], words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        server.understand(version, plugins, "overlayfs")
    assert caught.value.reason == "NodeUnsupported"


# -- names


def test_names_are_what_containerd_takes() -> None:
    assert tasks.name_of("uid-1.main.0") == "uid-1.main.0"
    long = tasks.name_of("u" * 70 + ".main.0")
    assert len(long) <= 76
    assert long != tasks.name_of("u" * 70 + ".main.1")


@pytest.mark.parametrize(
    ("runtime", "found"),
    [
        ("io.containerd.kata.v2", True),
        ("io.containerd.runsc.v1", True),
        ("runc", False),
        ("/usr/bin/crun", False),
        ("crun-1.8", False),
    ],
)
def test_a_runtimes_type_and_its_program_are_told_apart(runtime: str, found: bool) -> None:
    assert tasks.is_type(runtime) == found


# -- images


def test_chains_are_named_by_all_below() -> None:
    first, second = (f"sha256:{hashlib.sha256(text).hexdigest()}" for text in (b"1", b"2"))
    names = unpack.chain([first, second])
    assert names[0] == first
    assert names[1] == f"sha256:{hashlib.sha256(f'{first} {second}'.encode()).hexdigest()}"
    assert unpack.chain([]) == []


@pytest.mark.parametrize("document", [{}, {"rootfs": []}, {"rootfs": {"diff_ids": ["sha256:1"]}}])
def test_an_image_without_its_layers_names_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(EngineError, match="diff_ids"):
        unpack.diff_ids(document)


# -- errors


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_containerd_that_is_away_is_no_containers_fault(code: grpc.StatusCode) -> None:
    error = CallError(code, "connection refused")
    assert error.passes
    assert start_error(error) is error


def test_the_runtimes_words_are_kept() -> None:
    said = "failed to create shim task: OCI runtime create failed: runc create failed: exec: no such file: unknown"
    error = start_error(CallError(grpc.StatusCode.UNKNOWN, said))
    assert (error.reason, error.message, error.retryable) == ("StartError", "exec: no such file", False)


# -- a shim of containerd's


def test_the_address_of_a_shim(tmp_path: Path) -> None:
    assert ttrpc.Address.in_bundle(tmp_path) is None
    (tmp_path / "address").write_text("unix:///run/containerd/s/1")
    assert ttrpc.Address.in_bundle(tmp_path) == ttrpc.Address("/run/containerd/s/1", 2)
    (tmp_path / "bootstrap.json").write_text(
        '{"version": 3, "address": "unix:///run/x", "protocol": "ttrpc"}'
    )
    assert ttrpc.Address.in_bundle(tmp_path) == ttrpc.Address("/run/x", 3)
    (tmp_path / "bootstrap.json").write_text('{"version": 3, "address": "vsock://1", "protocol": "grpc"}')
    assert ttrpc.Address.in_bundle(tmp_path) is None


def test_a_shim_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ttrpc.ShimError):
        ttrpc.wait(ttrpc.Address(str(tmp_path / "nowhere"), 3), "task", 1.0)


# -- settings


def test_its_own_settings_come_before_the_oci_engines() -> None:
    settings = ShimSettings(
        state_dir=Path("/state"),
        run_dir=Path("/run/x"),
        containerd=ContainerdSettings(runtimes={"kata": "io.containerd.kata.v2"}),
        oci=OCISettings(default_pids=77),
    )
    found = Options.from_settings(settings, "containerd")
    assert found.runtimes == {"kata": "io.containerd.kata.v2"}
    assert (found.default_pids, found.root_dir) == (77, Path("/state/containerd"))
    assert found.run_root == Path("/run/x/containerd")
    assert set(Options.from_settings(settings).runtimes) == {"crun", "runc", "runsc"}
