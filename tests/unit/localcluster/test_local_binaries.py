"""Where the binaries come from: the first place that has one wins, and only then anything is fetched or built."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.binaries import BinariesError, ensure, find

KUBECTL = '#!/bin/sh\necho \'{{"clientVersion": {{"major": "1", "minor": "{}"}}}}\'\n'


def program(folder: Path, name: str, text: str = "#!/bin/sh\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the real cache, or fetches or builds anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setattr(binaries, "_download", lambda *_: pytest.fail("no download was asked for"))
    monkeypatch.setattr(gobuild, "build", lambda *_: pytest.fail("no build was asked for"))
    return tmp_path


def test_assets_over_path_over_cache(home: Path) -> None:
    places = {"assets": home / "assets", "path": home / "path", "cache": binaries.cache_dir()}
    made = {place: program(folder, "etcd") for place, folder in places.items()}
    environ = {"KUBEBUILDER_ASSETS": str(places["assets"]), "PATH": str(places["path"])}
    for place in ("assets", "path", "cache"):
        found = find("etcd", environ=environ)
        assert found is not None
        assert found.path == made[place]
        made[place].unlink()
    assert find("etcd", environ=environ) is None


def test_what_cannot_be_executed_is_none(home: Path) -> None:
    program(home / "assets", "etcd").chmod(0o644)
    assert find("etcd", environ={"KUBEBUILDER_ASSETS": str(home / "assets"), "PATH": ""}) is None


@pytest.mark.parametrize(("minor", "fits"), [("28", False), ("29", True), ("36+", True), ("x", False)])
def test_a_kubectl_in_path_must_be_new_enough(home: Path, minor: str, fits: bool) -> None:
    program(home / "path", "kubectl", KUBECTL.format(minor))
    assert (find("kubectl", environ={"PATH": str(home / "path")}) is not None) is fits


@pytest.mark.parametrize("changed", ["go.mod", "go.sum", "main.go"])
def test_another_pin_or_program_is_another_folder(home: Path, changed: str) -> None:
    for name in ("go.mod", "go.sum", "main.go"):
        (home / name).write_text("one")
    first = binaries.cache_dir(home)
    (home / changed).write_text("two")
    assert binaries.cache_dir(home) != first


def test_a_program_of_a_module_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program(binaries.cache_root().parent, "kind")  # what is elsewhere does not count
    with monkeypatch.context() as patch:
        patch.setattr(gobuild, "build", lambda names, target, *_: [str(program(target, names[0]))])
        path = binaries.built("kind", gobuild.KIND)
    assert binaries.built("kind", gobuild.KIND) == path == binaries.cache_dir(gobuild.KIND.folder) / "kind"


def test_a_program_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gobuild, "build", lambda *_: [])
    with pytest.raises(BinariesError, match="kind-config"):
        binaries.built("kind-config", gobuild.KIND)


def test_nothing_is_made_where_all_is_there(home: Path) -> None:
    for name in ("etcd", "kube-apiserver"):
        program(home / "path", name)
    assert {f.origin for f in ensure(("etcd", "kube-apiserver")).values()} == {"PATH"}


def test_what_the_download_lacks_is_built(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def maker(kind: str, brings: set[str]) -> object:
        def make(names: list[str], target: Path, _say: object) -> list[str]:
            asked.append((kind, list(names)))
            return [program(target, name).name for name in names if name in brings]

        return make

    program(home / "path", "etcd")
    monkeypatch.setattr(binaries, "_download", maker("download", {"kubectl"}))
    monkeypatch.setattr(gobuild, "build", maker("build", {"kube-apiserver"}))
    found = ensure(("etcd", "kube-apiserver", "kubectl"))
    assert {name: each.origin for name, each in found.items()} == {
        "etcd": "PATH",
        "kubectl": "downloaded",
        "kube-apiserver": "built",
    }
    assert asked == [("download", ["kube-apiserver", "kubectl"]), ("build", ["kube-apiserver"])]
    assert {each.origin for each in ensure(("kube-apiserver", "kubectl")).values()} == {"cache"}


def test_what_cannot_be_had_is_said_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_download", lambda *_: [])
    monkeypatch.setattr(gobuild, "build", lambda *_: [])
    with pytest.raises(BinariesError, match=r"etcd.*KUBEBUILDER_ASSETS"):
        ensure(("etcd",))
