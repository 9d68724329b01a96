"""manifests/ as text: what needs no cluster. What an API server makes of them: integration/test_installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.installed import granted

from sandkeeper.control.settings import OperatorSettings
from sandkeeper.localcluster.preflight import ENGINE
from sandkeeper.shim.settings import ShimSettings

ROOT = Path(__file__).resolve().parents[3]
MANIFESTS = ROOT / "manifests"
SYSTEMD = MANIFESTS / "systemd"
FILES = sorted(path for path in MANIFESTS.rglob("*.yaml") if path.parent != SYSTEMD)
KUSTOMIZATIONS = [path for path in FILES if path.name == "kustomization.yaml"]


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def patches() -> set[Path]:
    """Files that change an object of another file, and are none by themselves."""
    return {
        path.parent / each["path"]
        for path in KUSTOMIZATIONS
        for each in documents(path)[0].get("patches", [])
        if "path" in each
    }


def objects(kind: str) -> list[dict[str, Any]]:
    whole = [path for path in FILES if path not in patches()]
    return [each for path in whole for each in documents(path) if each.get("kind") == kind]


def words(value: Any) -> list[str]:
    """Every string in a document, keys as well."""
    if isinstance(value, dict):
        return [word for key, each in value.items() for word in (*words(key), *words(each))]
    if isinstance(value, list):
        return [word for each in value for word in words(each)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(MANIFESTS)))
def test_it_parses_and_asks_for_nothing_with_a_star(path: Path) -> None:
    found = documents(path)
    assert found
    assert all("apiVersion" in each and "kind" in each for each in found)
    assert "*" not in words(found)


def test_every_file_is_part_of_a_kustomization() -> None:
    named: set[Path] = set()
    for path in KUSTOMIZATIONS:
        for each in documents(path)[0].get("resources", []):
            target = (path.parent / each).resolve()
            assert target.exists(), f"{path}: {each}"
            named.add(target / "kustomization.yaml" if target.is_dir() else target)
    loose = {path.relative_to(MANIFESTS).parts[0] for path in FILES if path not in named}
    # Overlays and components are what users name; a folder without a kustomization is for another program (argocd).
    with_one = {path.relative_to(MANIFESTS).parts[0] for path in KUSTOMIZATIONS}
    assert loose & with_one <= {"kustomization.yaml", "overlays", "components"}


def test_one_place_says_which_image_runs_and_it_is_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    base = documents(MANIFESTS / "base" / "kustomization.yaml")[0]
    assert base["images"] == [{"name": "sandkeeper", "newTag": version}]
    assert base["labels"][0]["pairs"]["app.kubernetes.io/version"] == version
    pods = [
        each["spec"]["template"]["spec"] for kind in ("Deployment", "DaemonSet") for each in objects(kind)
    ]
    assert len(pods) == 2
    assert {container["image"] for pod in pods for container in pod["containers"]} == {"sandkeeper"}


def test_tokens_are_mounted_only_where_they_are_used() -> None:
    assert all(each["automountServiceAccountToken"] is False for each in objects("ServiceAccount"))
    mounted = [
        each["metadata"]["name"]
        for kind in ("Deployment", "DaemonSet")
        for each in objects(kind)
        if each["spec"]["template"]["spec"]["automountServiceAccountToken"]
    ]
    assert sorted(mounted) == ["sandkeeper-operator", "sandkeeper-shim"]


def test_a_shim_has_these_rights_and_no_other() -> None:
    kinds = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    assert granted([each for kind in kinds for each in objects(kind)], "sandkeeper-shim") == {
        ("certificates.k8s.io", "certificatesigningrequests", "create"),
        ("certificates.k8s.io", "certificatesigningrequests", "get"),
        ("sandkeeper.dev", "sandboxnodes", "create"),
        ("sandkeeper.dev", "sandboxnodes", "patch"),
        ("", "nodes", "get"),
        ("", "configmaps", "get"),
    }


def test_what_can_be_bound_to_a_name_is() -> None:
    rules = [rule for kind in ("Role", "ClusterRole") for each in objects(kind) for rule in each["rules"]]
    for resource in ("secrets", "configmaps", "signers"):
        found = [rule for rule in rules if resource in rule["resources"] and rule["verbs"] != ["create"]]
        assert found
        assert all(rule["resourceNames"] in (["sandkeeper-ca"], ["sandkeeper.dev/shim"]) for rule in found)


def test_settings_in_the_environment_exist() -> None:
    known = {
        **{f"SANDKEEPER_OPERATOR_{name.upper()}": name for name in OperatorSettings.model_fields},
        **{f"SANDKEEPER_SHIM_{name.upper()}": name for name in ShimSettings.model_fields},
    }
    used = {word for path in FILES for word in words(documents(path)) if word.startswith("SANDKEEPER_")}
    assert {word.partition("__")[0] for word in used} <= known.keys()


def test_a_stopped_service_leaves_what_runs() -> None:
    """systemd stops the shim alone, keeps its folders, and gives it no mount namespace of its own."""
    lines = (SYSTEMD / "sandkeeper-shim.service").read_text().splitlines()
    unit = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert (unit["KillMode"], unit["RuntimeDirectoryPreserve"], unit["Restart"]) == (
        "process",
        "yes",
        "always",
    )
    assert not [
        key for key in unit if re.match("Private|Protect|ReadOnly|ReadWrite|Inaccessible|Temporary|Bind", key)
    ]
    settings = ShimSettings(config_file=SYSTEMD / "shim.yaml")
    assert settings.server_tls is not None
    assert f"/var/lib/{unit['StateDirectory']}" == str(settings.state_dir)
    assert f"/run/{unit['RuntimeDirectory']}" == str(settings.run_dir)


def test_the_image_has_what_the_engine_runs_and_no_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    # Busybox is the demo's image.
    assert {need.package for need in ENGINE} - {"busybox-static"} <= set(text.split())
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["65532:65532"]


def test_kind_has_two_workers_and_one_pinned_image() -> None:
    config = yaml.safe_load((ROOT / "kind-config.yaml").read_text())
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    images = {node["image"] for node in config["nodes"]}
    assert len(images) == 1
    assert re.fullmatch(r"kindest/node:v1\.\d+\.\d+@sha256:[0-9a-f]{64}", images.pop())
