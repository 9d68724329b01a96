"""Records on disk: whole or not there after any kill, and fences that outlive them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandkeeper.shim.records import FENCE_SECONDS, Asked, Records, Saved
from sandkeeper.wire import node_pb2

BAD_IDS = ["", "..", "../outside", "a/b", "a\0b", ".hidden", "a" * 77, "a b"]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return opened(tmp_path)


def opened(state_dir: Path) -> Records:
    """The records as a shim finds them at its start."""
    found = Records(state_dir)
    found.open()
    return found


def saved(sandbox_id: str = "uid-1", uid: str = "uid") -> Saved:
    config = node_pb2.SandboxConfig(
        owner=node_pb2.Owner(namespace="ns", name="a", uid=uid, instance=1),
        digest="abc",
        containers=[
            node_pb2.ContainerConfig(
                name="main",
                image="busybox",
                command=["sleep", "1"],
                env=[node_pb2.EnvVar(name="SECRET", value="hunter2")],
                security_context=node_pb2.SecurityContext(run_as_user=0),
            )
        ],
    )
    record = node_pb2.SandboxRecord(
        sandbox_id=sandbox_id, owner=config.owner, digest="abc", state=node_pb2.STATE_RUNNING, pid=42
    )
    record.containers.add(name="main", state=node_pb2.CONTAINER_STATE_RUNNING)
    record.created_at.FromNanoseconds(1_700_000_000_123_456_789)
    return Saved(config, record, Asked(stop_at=12.5, ended=("main",), removing=True))


def loaded(state_dir: Path) -> dict[str, Saved | None]:
    return dict(opened(state_dir).load())


def test_a_sandbox_is_found_again_as_it_was(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    assert loaded(tmp_path) == {"uid-1": saved()}
    found = loaded(tmp_path)["uid-1"]
    assert found is not None
    # Zero is not the same as unset.
    assert found.config.containers[0].security_context.HasField("run_as_user")


@pytest.mark.parametrize("sync", [False, True])
def test_save_replaces_the_record_and_leaves_the_configuration(
    records: Records, tmp_path: Path, sync: bool
) -> None:
    records.create(saved())
    before = (tmp_path / "sandboxes" / "uid-1" / "config.json").stat()
    changed = saved()
    changed.record.state = node_pb2.STATE_PAUSED
    changed.asked = Asked()
    records.save(changed, sync=sync)
    assert loaded(tmp_path) == {"uid-1": changed}
    after = (tmp_path / "sandboxes" / "uid-1" / "config.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_create_again_replaces(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    other = saved()
    other.config.digest = other.record.digest = "def"
    records.create(other)
    assert loaded(tmp_path) == {"uid-1": other}


def test_only_the_owner_of_the_process_may_read(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    folder = tmp_path / "sandboxes"
    assert {each.stat().st_mode & 0o777 for each in (folder, folder / "uid-1")} == {0o700}
    assert {each.stat().st_mode & 0o777 for each in (folder / "uid-1").iterdir()} == {0o600}


def test_a_write_that_was_cut_off_is_dropped(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    folder = tmp_path / "sandboxes" / "uid-1"
    (folder / "record.json~").write_text('{"record": {"sandboxId": "uid-1"')
    (tmp_path / "fences" / "uid~").write_text("")
    assert loaded(tmp_path) == {"uid-1": saved()}
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", "record.json"]
    assert list((tmp_path / "fences").iterdir()) == []


def test_a_failed_write_leaves_the_old_one(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    blocker = tmp_path / "sandboxes" / "uid-1" / "record.json~"
    blocker.mkdir()
    changed = saved()
    changed.record.pid = 43
    with pytest.raises(OSError, match="directory"):
        records.save(changed)
    assert dict(records.load()) == {"uid-1": saved()}


def test_a_link_in_place_of_a_file_is_not_followed(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "sandboxes" / "uid-1" / "record.json~").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        records.save(saved())
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("name", ["config.json", "record.json"])
def test_a_torn_file_makes_no_sandbox(records: Records, tmp_path: Path, name: str) -> None:
    records.create(saved())
    file = tmp_path / "sandboxes" / "uid-1" / name
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert dict(records.load()) == {"uid-1": None}
    file.write_bytes(whole)
    assert dict(records.load()) == {"uid-1": saved()}


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"7",
        b'"record"',
        b"{}",
        b'{"record": {}}',
        b'{"record": [], "asked": {"stop_at": 0, "removing": false}}',
        b'{"record": {"pid": "x"}, "asked": {"stop_at": 0, "removing": false}}',
        b'{"record": {"sandboxId": "uid-1"}, "asked": {"stop_at": null, "removing": false}}',
        b'{"record": {"sandboxId": "uid-1"}, "asked": []}',
        b'{"record": {"sandboxId": "uid-2"}, "asked": {"stop_at": 0, "removing": false}}',
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
    ],
)
def test_a_record_of_something_else_makes_no_sandbox(records: Records, tmp_path: Path, text: bytes) -> None:
    records.create(saved())
    (tmp_path / "sandboxes" / "uid-1" / "record.json").write_bytes(text)
    assert dict(records.load()) == {"uid-1": None}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.ClearField("owner"),
        lambda record: record.ClearField("state"),
        lambda record: record.ClearField("containers"),
        lambda record: setattr(record.containers[0], "name", "other"),
        lambda record: setattr(record, "digest", "other"),
        lambda record: setattr(record, "state", node_pb2.STATE_EXITED),
        lambda record: record.exit.SetInParent(),
    ],
)
def test_a_record_that_contradicts_itself_makes_no_sandbox(
    records: Records, tmp_path: Path, spoil: Callable[[node_pb2.SandboxRecord], object]
) -> None:
    spoilt = saved()
    records.create(spoilt)
    spoil(spoilt.record)
    records.save(spoilt)
    assert loaded(tmp_path) == {"uid-1": None}


def test_a_disk_that_does_not_answer_is_no_damaged_record(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.create(saved())

    def fails(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(OSError, match="Input/output error"):
        dict(records.load())
    monkeypatch.undo()
    assert loaded(tmp_path) == {"uid-1": saved()}


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/")])
def test_what_has_a_sandboxs_name_and_is_none_is_removed(
    records: Records, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "sandboxes" / "uid-1")
    assert dict(records.load()) == {"uid-1": None}
    records.remove("uid-1")
    assert loaded(tmp_path) == {}


def test_an_instance_that_cannot_be_read_fences_as_before(records: Records, tmp_path: Path) -> None:
    records.create(saved("uid-3"))
    (tmp_path / "sandboxes" / "uid-3" / "record.json").write_text("")
    records.discard("uid-3")
    assert (records.fence("uid"), loaded(tmp_path)) == (3, {})
    records.raise_fence("uid", 5)
    records.discard("uid-4")
    assert records.fence("uid") == 5
    records.discard("plain")
    assert [each.name for each in (tmp_path / "fences").iterdir()] == ["uid"]


@pytest.mark.parametrize("missing", ["config.json", "record.json"])
def test_half_a_sandbox_makes_none(records: Records, tmp_path: Path, missing: str) -> None:
    records.create(saved())
    records.create(saved("uid-2"))
    (tmp_path / "sandboxes" / "uid-1" / missing).unlink()
    assert loaded(tmp_path) == {"uid-1": None, "uid-2": saved("uid-2")}


def test_a_record_of_a_later_version_is_read(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    file = tmp_path / "sandboxes" / "uid-1" / "record.json"
    file.write_text(file.read_text().replace('"sandboxId"', '"fromTheFuture":1,"sandboxId"', 1))
    assert loaded(tmp_path) == {"uid-1": saved()}


def test_what_is_no_sandbox_is_passed_over(records: Records, tmp_path: Path) -> None:
    (tmp_path / "sandboxes" / "a file").write_text("")
    (tmp_path / "sandboxes" / "lost+found").mkdir()
    assert loaded(tmp_path) == {}


def test_remove_leaves_nothing_and_may_be_repeated(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    for _ in range(2):
        records.remove("uid-1")
    assert list((tmp_path / "sandboxes").iterdir()) == []


@pytest.mark.parametrize("sandbox_id", BAD_IDS)
def test_an_id_that_is_no_identifier_is_refused(records: Records, tmp_path: Path, sandbox_id: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="sandbox_id"):
        records.create(saved(sandbox_id))
    with pytest.raises(ValueError, match="sandbox_id"):
        records.save(saved(sandbox_id))
    with pytest.raises(ValueError, match="sandbox_id"):
        records.remove(sandbox_id)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_id_that_looks_like_a_half_written_file_is_kept(records: Records, tmp_path: Path) -> None:
    records.create(saved("sandbox.tmp"))
    records.raise_fence("owner.tmp", 3)
    assert loaded(tmp_path) == {"sandbox.tmp": saved("sandbox.tmp")}
    assert opened(tmp_path).fence("owner.tmp") == 3


# Fences


def test_a_fence_is_none_raised_and_found_again(records: Records, tmp_path: Path) -> None:
    assert records.fence("uid") == 0
    records.raise_fence("uid", 2)
    records.raise_fence("uid", 7)
    assert records.fence("uid") == opened(tmp_path).fence("uid") == 7
    assert records.fence("other") == 0


def test_a_fence_outlives_its_sandbox(records: Records, tmp_path: Path) -> None:
    records.create(saved())
    records.raise_fence("uid", 1)
    records.remove("uid-1")
    assert opened(tmp_path).fence("uid") == 1


@pytest.mark.parametrize(
    ("age", "owned", "kept"),
    [(0, False, True), (FENCE_SECONDS - 60, False, True), (FENCE_SECONDS + 60, False, False),
     (FENCE_SECONDS + 60, True, True)],
)  # fmt: skip
def test_a_fence_is_forgotten_when_it_is_old_and_nobodys(
    records: Records, tmp_path: Path, age: int, owned: bool, kept: bool
) -> None:
    if owned:
        records.create(saved())
    records.raise_fence("uid", 3)
    then = time.time() - age
    os.utime(tmp_path / "fences" / "uid", (then, then))
    assert opened(tmp_path).fence("uid") == (3 if kept else 0)


def test_a_folder_in_the_place_of_a_fence_is_no_hindrance(records: Records, tmp_path: Path) -> None:
    (tmp_path / "fences" / "uid" / "inside").mkdir(parents=True)
    found = opened(tmp_path)
    found.raise_fence("uid", 2)
    assert opened(tmp_path).fence("uid") == 2


@pytest.mark.parametrize("uid", BAD_IDS)
def test_a_uid_that_is_no_identifier_has_no_fence(records: Records, tmp_path: Path, uid: str) -> None:
    assert records.fence(uid) == 0
    with pytest.raises(ValueError, match="uid"):
        records.raise_fence(uid, 1)
    assert list((tmp_path / "fences").iterdir()) == []
