"""What a local cluster decides without a process of it: names, and what a fresh folder answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from sandkeeper.localcluster.apiserver import Kubectl, apply_crds
from sandkeeper.localcluster.cluster import LocalCluster, Plan, memory
from sandkeeper.localcluster.demo import table
from sandkeeper.localcluster.watching import Marks, assigned, condition, manifest, ready
from sandkeeper.shim.settings import OCISettings


def planned(folder: Path, ports: tuple[int, ...], run_root: str | Path = "") -> LocalCluster:
    folder.mkdir()
    plan = Plan(engine="oci", shim_ports=ports, run_root=str(run_root))
    (folder / "cluster.json").write_text(json.dumps(asdict(plan)))
    return LocalCluster(folder)


def test_a_folder_without_a_cluster_has_no_processes_and_nothing_to_end(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "none")
    assert cluster.status() == {}
    cluster.down()
    assert not (tmp_path / "none").exists()


def test_the_plan_comes_back_as_it_was(tmp_path: Path) -> None:
    cluster = planned(tmp_path / "c", (1, 2))
    assert cluster.plan == Plan(engine="oci", shim_ports=(1, 2))
    assert cluster.nodes == ["node-1", "node-2"]


def test_every_node_of_every_cluster_has_a_cgroup_of_its_own(
    tmp_path: Path,
) -> None:
    """A shim ends what it finds below its cgroup and has no record of: two must never share one."""
    clusters = [planned(tmp_path / name, (1, 2)) for name in ("a", "b")]
    environments = [_spawned(cluster, index) for cluster in clusters for index in (0, 1)]
    parents = [env["SANDKEEPER_SHIM_OCI__CGROUP_PARENT"] for env in environments]
    assert len(set(parents)) == 4
    for parent in parents:
        assert OCISettings(cgroup_parent=parent).cgroup_parent == parent
        assert parent != OCISettings().cgroup_parent  # a real shim's on the same machine
    again = _spawned(LocalCluster(tmp_path / "a"), 0)
    assert again["SANDKEEPER_SHIM_OCI__CGROUP_PARENT"] == parents[0]


def test_what_a_node_has_in_memory_is_where_memory_is(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("disk", "none", "over", "memory")]
    for name in ("disk", "over", "memory"):
        (tmp_path / name).mkdir()
    kinds = [("disk", "ext4"), ("over", "tmpfs"), ("over", "ext4"), ("none", "tmpfs"), ("memory", "tmpfs")]
    mounts = "".join(f"source {tmp_path / name} {kind} rw 0 0\n" for name, kind in kinds)
    assert memory(mounts, places) == tmp_path / "memory"
    assert memory(mounts, places[:2]) is None


def test_a_nodes_run_folder_is_its_clusters_own(tmp_path: Path) -> None:
    clusters = [planned(tmp_path / name, (1, 2), run_root=tmp_path / "m" / name) for name in ("a", "b")]
    (tmp_path / "m").mkdir()
    environments = [_spawned(cluster, index) for cluster in clusters for index in (0, 1)]
    folders = [Path(env["SANDKEEPER_SHIM_RUN_DIR"]) for env in environments]
    assert folders == [tmp_path / "m" / name / node for name in ("a", "b") for node in ("n1", "n2")]
    assert all(folder.is_dir() and folder.parent.stat().st_mode & 0o777 == 0o700 for folder in folders)
    (tmp_path / "m" / "a").chmod(0o777)
    with pytest.raises(PermissionError):
        _spawned(clusters[0], 0)


def _spawned(cluster: LocalCluster, index: int) -> dict[str, str]:
    """The environment that the shim would be started with."""
    seen: dict[str, str] = {}
    cluster._image_layout = lambda: cluster.folder  # type: ignore[method-assign]
    cluster.processes.spawn = lambda _name, _argv, env: seen.update(env)  # type: ignore[assignment]
    cluster._spawn_shim(index)
    return seen


def test_of_a_deleted_object_nothing_is_true() -> None:
    assert not ready({})
    assert not assigned({})
    assert condition({}, "Ready") == ""


def test_the_table_has_a_row_per_stage_and_the_median_last() -> None:
    ways = [Marks(0.001, 0.002, 0.003, 0.004, each) for each in (0.010, 0.030, 0.020)]
    lines = table(ways).splitlines()
    assert lines[0].split()[-1] == "median"
    assert [line.split()[-1] for line in lines[1:6]] == ["1.0", "2.0", "3.0", "4.0", "20.0"]
    assert lines[5].split()[-4:] == ["10.0", "30.0", "20.0", "20.0"]


def test_a_manifest_is_a_valid_sandbox() -> None:
    from sandkeeper.api import Sandbox

    sandbox = Sandbox.model_validate(manifest("a", "sh", "-c", "exit 3", memory="32Mi"))
    assert sandbox.spec.containers[0].command == ("sh", "-c", "exit 3")


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="writable by nobody else"):
        LocalCluster(folder).up()
    assert list(folder.iterdir()) == []


class Young(Kubectl):
    """An API server that has just taken CRDs: `kubectl wait` fails on conditions that are still null."""

    def __init__(self, *conditions: object) -> None:
        self.conditions = list(conditions)

    def __call__(self, *args: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
        assert args[0] in ("apply", "get"), (
            "error: .status.conditions accessor error: <nil> is of the type <nil>"
        )
        if args[0] == "apply":
            return "one\ntwo\n"
        items = [
            {"status": {"conditions": self.conditions.pop(0)}},
            {"status": {"conditions": [ESTABLISHED]}},
        ]
        return json.dumps({"items": items})


ESTABLISHED = {"type": "Established", "status": "True"}


def test_crds_are_waited_for_from_the_first_moment() -> None:
    young = Young(None, [], [{"type": "NamesAccepted", "status": "True"}], [ESTABLISHED])
    apply_crds(young)
    assert young.conditions == []
