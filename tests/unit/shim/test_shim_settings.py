"""The shim's settings: what comes before what, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sandkeeper.shim.main import make_server
from sandkeeper.shim.settings import ShimSettings

TLS = {"tls_ca": Path("ca.pem"), "tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the caller's."""
    for name in os.environ:
        if name.upper().startswith("SANDKEEPER_SHIM_"):
            monkeypatch.delenv(name)


def made(**given: Any) -> ShimSettings:
    return ShimSettings(**{"node_name": "n", **given})


def refusal(**given: Any) -> str:
    with pytest.raises(ValidationError) as refused:
        made(**given)
    return str(refused.value)


# Precedence


def test_defaults() -> None:
    settings = made()
    assert settings.engine == "oci"
    assert settings.socket_path == settings.run_dir / "shim.sock"
    assert settings.listen == ""
    assert settings.server_tls is None
    assert settings.allowed_clients == ("sandkeeper-operator",)


def test_flags_come_before_the_environment_before_the_file_before_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("pids: 1\nsandboxes: 1\ncpu_millis: 1\n")
    monkeypatch.setenv("SANDKEEPER_SHIM_PIDS", "2")
    monkeypatch.setenv("SANDKEEPER_SHIM_SANDBOXES", "2")
    settings = made(config_file=file, pids=3)
    assert (settings.pids, settings.sandboxes, settings.cpu_millis, settings.memory_bytes) == (3, 2, 1, 0)


def test_the_environment_may_name_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("engine: simulated\nsimulated:\n  start_seconds: 0.5\n")
    monkeypatch.setenv("SANDKEEPER_SHIM_CONFIG_FILE", str(file))
    settings = made()
    assert (settings.engine, settings.simulated.start_seconds) == ("simulated", 0.5)


def test_parts_of_an_engine_come_from_all_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("oci:\n  conmon: /opt/conmon\n  default_pids: 7\n")
    monkeypatch.setenv("SANDKEEPER_SHIM_OCI__LOG_MAX_BYTES", "8192")
    monkeypatch.setenv("SANDKEEPER_SHIM_FAILPOINTS", '{"start": "1*error(boom)"}')
    settings = made(config_file=file, oci={"default_pids": 9})
    assert (settings.oci.conmon, settings.oci.log_max_bytes, settings.oci.default_pids) == (
        "/opt/conmon", 8192, 9,
    )  # fmt: skip
    assert settings.failpoints == {"start": "1*error(boom)"}


@pytest.mark.parametrize("text", ["a,b", " a , b,"])
def test_clients_are_listed_with_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SANDKEEPER_SHIM_ALLOWED_CLIENTS", text)
    assert made().allowed_clients == ("a", "b")


def test_lists_of_the_file_are_lists(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("allowed_clients: [a, b]\noci:\n  runtimes: [crun]\n")
    settings = made(config_file=file)
    assert (settings.allowed_clients, settings.oci.runtimes) == (("a", "b"), ("crun",))


def test_settings_do_not_change() -> None:
    settings = made()
    with pytest.raises(ValidationError, match="frozen"):
        settings.pids = 1


# TLS


def test_tcp_with_tls() -> None:
    settings = made(listen="0.0.0.0:9000", **TLS)
    assert settings.server_tls is not None
    assert settings.server_tls.files.ca == Path("ca.pem")


@pytest.mark.parametrize("left_out", [("tls_ca",), ("tls_cert",), ("tls_key",), tuple(TLS)])
def test_tcp_without_all_of_tls_is_refused(left_out: tuple[str, ...]) -> None:
    given = {name: path for name, path in TLS.items() if name not in left_out}
    said = refusal(listen="127.0.0.1:9000", **given)
    assert "listen: TCP needs mutual TLS: set tls_ca, tls_cert and tls_key" in said


def test_half_of_tls_is_refused() -> None:
    assert "tls_ca, tls_cert and tls_key must be set together" in refusal(tls_ca=Path("ca.pem"))


@pytest.mark.parametrize("listen", ["localhost", "localhost:", "localhost:http"])
def test_an_address_without_a_port_is_refused(listen: str) -> None:
    assert "listen must be host:port" in refusal(listen=listen, **TLS)


# What is refused by name


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"sandbox": 1}, "sandbox"),
        ({"oci": {"conmn": "x"}}, "oci.conmn"),
        ({"simulated": {"failpoint": {}}}, "simulated.failpoint"),
        ({"engine": "docker"}, "engine"),
        ({"node_name": "Node_1"}, "node_name"),
        ({"node_name": ""}, "node_name"),
        ({"node_name": "../etc"}, "node_name"),
        ({"pids": -1}, "pids"),
        ({"pids": "many"}, "pids"),
        ({"restart_backoff": 0}, "restart_backoff"),
        ({"concurrent_starts": 0}, "concurrent_starts"),
        ({"simulated": {"start_seconds": -1}}, "simulated.start_seconds"),
        ({"oci": {"cgroup_parent": "../.."}}, "oci.cgroup_parent"),
        ({"oci": {"image_disk_high": 101}}, "oci.image_disk_high"),
        ({"log_level": "LOUD"}, "log_level"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        made(**given)
    (error,) = refused.value.errors()
    assert ".".join(str(step) for step in error["loc"]) == field


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text("nodename: x\n")
    assert "nodename" in refusal(config_file=file)


def test_a_wrong_value_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDKEEPER_SHIM_PIDS", "-1")
    assert "pids" in refusal()


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "just text",
        "{",
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "shim.yaml"
    file.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - the command line shows whatever it says
        made(config_file=file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml"):
        made(config_file=tmp_path / "absent.yaml")


def test_a_failpoint_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for points, named in (
        ({"begin": "off"}, r"failpoints\.begin"),
        ({"start": "boom"}, r"failpoints\.start"),
    ):
        settings = made(state_dir=tmp_path, engine="simulated", failpoints=points)
        with pytest.raises(ValueError, match=named):
            make_server(settings)
