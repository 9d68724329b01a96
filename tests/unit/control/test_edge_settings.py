"""Settings, logs and the health endpoints."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

import aiohttp
import pytest
from pydantic import ValidationError

from sandkeeper import logs
from sandkeeper.control.health import HealthServer
from sandkeeper.control.metrics import Metrics, Snapshot
from sandkeeper.control.settings import OperatorSettings


def test_flags_win_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "operator.yaml"
    path.write_text("concurrency: 3\nrelist_interval: 7\nnamespaces: [x, y]\nlog_level: DEBUG\n")
    monkeypatch.setenv("SANDKEEPER_OPERATOR_CONFIG_FILE", str(path))
    monkeypatch.setenv("SANDKEEPER_OPERATOR_RELIST_INTERVAL", "8")
    monkeypatch.setenv("SANDKEEPER_OPERATOR_NAMESPACES", "a, b,,c")
    settings = OperatorSettings(concurrency=5)
    assert settings.concurrency == 5
    assert settings.relist_interval == 8
    assert settings.namespaces == ("a", "b", "c")
    assert settings.log_level == "DEBUG"
    assert settings.garbage_min_age == 60


@pytest.mark.parametrize(
    "given",
    [
        {"concurrency": 0},
        {"tls_ca": "ca.pem"},
        {"relist_interval": 50, "node_unreachable_after": 40},
        {"unknown": 1},
        {"mass_outage_fraction": 1.5},
        {"http_port": 70000},
        {"config_file": "/nowhere/at/all.yaml"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_makes_no_sense_is_refused(given: dict[str, object]) -> None:
    with pytest.raises((ValidationError, ValueError)):
        OperatorSettings(**given)  # type: ignore[arg-type]


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "operator.yaml"
    path.write_text("concurency: 3\n")
    with pytest.raises(ValidationError, match="concurency"):
        OperatorSettings(config_file=path)


# Logs


def log_record(message: str = "text", **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("sandkeeper.test")
    return logger.makeRecord("sandkeeper.test", logging.WARNING, "f", 1, message, (), None, extra=extra)


def test_json_has_stable_keys_the_known_ones_first() -> None:
    with logs.bound(namespace="ns", name_="x"):
        entry = json.loads(logs.JsonFormatter().format(log_record(reason="why", uid="u", number=3)))
    assert list(entry)[:6] == ["ts", "level", "logger", "msg", "namespace", "uid"]
    assert (entry["level"], entry["msg"], entry["namespace"], entry["uid"]) == ("warning", "text", "ns", "u")
    assert (entry["reason"], entry["number"]) == ("why", 3)


def test_a_record_of_kopf_names_its_object() -> None:
    reference = {"namespace": "ns", "name": "a", "uid": "u", "kind": "Sandbox"}
    entry = json.loads(logs.JsonFormatter().format(log_record(k8s_ref=reference, settings=object())))
    assert (entry["namespace"], entry["name"], entry["uid"]) == ("ns", "a", "u")
    assert "settings" not in entry


def test_what_is_bound_ends_with_its_block_and_does_not_leak_into_others() -> None:
    with logs.bound(name="outer"):
        with logs.bound(name="inner", uid="u"):
            assert logs.fields(log_record()) == {"name": "inner", "uid": "u"}
        assert logs.fields(log_record()) == {"name": "outer"}
    assert logs.fields(log_record()) == {}


def test_an_exception_and_odd_values_do_not_break_a_line() -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        one = log_record(thing=object(), text='with "quotes" and\nlines')
        one.exc_info = sys.exc_info()
    line = logs.JsonFormatter().format(one)
    assert "\n" not in line
    assert "ValueError: inner" in json.loads(line)["exception"]
    assert logs.ConsoleFormatter().format(one).splitlines()[0].count("text=") == 1


# Metrics and health


class FakeLink:
    reachable = True

    def relist_age(self) -> float | None:
        return 3.5


class FakeNodes:
    def links(self) -> dict[str, FakeLink]:
        return {"n1": FakeLink()}


async def test_the_endpoints_tell_the_truth_and_name_what_is_wrong() -> None:
    metrics = Metrics()
    metrics.registry.register(Snapshot({("n1", "Running"): 7}, FakeNodes()))
    metrics.reconciled("success", 0.01)
    wrong: dict[str, str | None] = {"queue": None, "watch": None}
    server = HealthServer(
        metrics.exposition, {"queue": lambda: wrong["queue"]}, {"watch": lambda: wrong["watch"]}
    )
    host, port = await server.start("127.0.0.1", 0)

    async def ask(path: str) -> tuple[int, str]:
        async with session.get(f"http://{host}:{port}/{path}") as response:
            return response.status, await response.text()

    async with aiohttp.ClientSession() as session:
        status, text = await ask("metrics")
        assert status == 200
        for line in [
            'sandkeeper_reconcile_seconds_count{result="success"} 1.0',
            'sandkeeper_sandboxes{node="n1",phase="Running"} 7.0',
            'sandkeeper_node_relist_age_seconds{node="n1"} 3.5',
            'sandkeeper_node_reachable{node="n1"} 1.0',
        ]:
            assert line in text
        assert (await ask("healthz"))[0] == 200
        assert await ask("readyz") == (200, "[+] queue: ok\n[+] watch: ok\n")
        wrong["watch"] = "silent for 70 s"
        assert (await ask("healthz"))[0] == 200
        status, text = await ask("readyz")
        assert status == 503
        assert "[-] watch: silent for 70 s" in text
        wrong["queue"] = "stuck"
        assert (await ask("healthz"))[0] == 503
        assert (await ask("nothing"))[0] == 404
    await server.close()
    await asyncio.sleep(0)
