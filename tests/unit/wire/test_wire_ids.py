"""Identity on the wire: owner, sandbox id, node name."""

import pytest

from sandkeeper.wire.ids import OwnerKey, fence_of, valid_id, valid_node_name

UID = "0c5ac1cf-9be8-4a3c-8a0a-2b8e0b7b7c11"
OWNER = OwnerKey("default", "web", UID, 3)


def test_an_owner_survives_its_metadata() -> None:
    metadata = OWNER.metadata()
    assert OwnerKey.from_metadata(dict(metadata)) == OWNER
    assert dict(metadata) == {
        "sandkeeper-owner-uid": UID,
        "sandkeeper-owner-namespace": "default",
        "sandkeeper-owner-name": "web",
        "sandkeeper-instance": "3",
    }


def test_metadata_keys_are_as_grpc_wants_them() -> None:
    """Lower case, and not ending in -bin, which would make the value bytes."""
    for key, value in OWNER.metadata():
        assert key == key.lower()
        assert not key.endswith("-bin")
        assert value.isascii()


def test_the_sandbox_id_is_uid_and_instance_and_an_identifier() -> None:
    assert OWNER.sandbox_id == f"{UID}-3"
    assert valid_id(OWNER.sandbox_id)
    assert valid_id(OwnerKey("n", "x", UID, 2**32 - 1).sandbox_id)


def test_a_caller_that_names_no_owner_has_none() -> None:
    assert OwnerKey.from_metadata({}) is None
    assert OwnerKey.from_metadata({"containerd-namespace": "k8s.io", "user-agent": "grpc-go"}) is None


def test_namespace_and_name_may_be_missing() -> None:
    owner = OwnerKey.from_metadata({"sandkeeper-owner-uid": UID, "sandkeeper-instance": "1"})
    assert owner == OwnerKey("", "", UID, 1)


@pytest.mark.parametrize(
    "metadata",
    [
        {"sandkeeper-owner-uid": UID},
        {"sandkeeper-instance": "1"},
        {"sandkeeper-owner-uid": "", "sandkeeper-instance": "1"},
        *(
            {"sandkeeper-owner-uid": UID, "sandkeeper-instance": text}
            for text in (
                "",
                "one",
                "1.0",
                "0x1",
                "-1",
                "0",
                "+1",
                "1_0",
                " 1",
                "1\n",
                "\u0663",
                "4294967296",
                "9" * 5000,
            )
        ),
    ],
    ids=lambda metadata: repr(metadata.get("sandkeeper-instance"))[:20],
)
def test_half_an_owner_is_refused(metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="sandkeeper-instance"):
        OwnerKey.from_metadata(metadata)


# The first twelve are those of containerd's own test, pkg/identifiers/validate_test.go.
@pytest.mark.parametrize(
    "text",
    [
        "default",
        "Default",
        "default-default",
        "containerd.io",
        "foo.boo",
        "swarmkit.docker.io",
        "0912341234",
        "task.0.0123456789",
        "container.system-75-f19a.00",
        "underscores_are_allowed",
        "a" * 76,
        "a",
        f"{UID}-1",
    ],
)
def test_identifiers_of_containerd(text: str) -> None:
    assert valid_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".foo..foo",
        "foo/foo",
        "foo/..",
        "foo..foo",
        "foo.-boo",
        "-foo.boo",
        "foo.boo-",
        "but__only_tasteful_underscores",
        "zn--e9.org",
        "default--default",
        "a" * 77,
        "..",
        ".",
        "foo\n",
        "foo\x00",
        "foo bar",
        "föö",
        "\u0661",
    ],
)
def test_not_identifiers(text: str) -> None:
    assert not valid_id(text)


@pytest.mark.parametrize("text", ["a", "node-1", "node-1.example.com", "1", "0.0", "a" * 253])
def test_node_names(text: str) -> None:
    assert valid_node_name(text)


@pytest.mark.parametrize(
    "text",
    ["", "-a", "a-", "A", "a_b", "a..b", ".a", "a.", "a/b", "a.-b", "a\n", "ä", "../a", "a" * 254],
)
def test_not_node_names(text: str) -> None:
    assert not valid_node_name(text)


def test_refusing_a_long_bad_name_is_quick() -> None:
    """The patterns must not backtrack exponentially: ids come from whoever may call."""
    assert not valid_node_name("a" * 252 + "!")
    assert not valid_node_name("a-" * 126 + "!")
    assert not valid_id("a" * 75 + "!")


def test_an_id_tells_its_fence() -> None:
    assert fence_of(OWNER.sandbox_id) == (UID, 3)
    assert fence_of(f"{UID}-{2**32 - 1}") == (UID, 2**32 - 1)


@pytest.mark.parametrize(
    "text", ["", "plain", UID, f"{UID}-0", f"{UID}-{2**32}", "-1", "a b-1", "uid-x", "uid-1-"]
)
def test_an_id_of_another_make_has_no_fence(text: str) -> None:
    assert fence_of(text) == ("", 0)
