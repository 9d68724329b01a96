"""References: the table of github.com/distribution/reference, as far as it matters here."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci.images.reference import parse

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.37", "docker.io/library/busybox:1.37"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/a/b", "docker.io/a/b:latest"),
        ("user/app:v1.2.3-rc.1_x", "docker.io/user/app:v1.2.3-rc.1_x"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("example.test/a/b/c:t", "example.test/a/b/c:t"),
        ("Example.Test/a", "Example.Test/a:latest"),
        ("HOST/a", "HOST/a:latest"),
        ("127.0.0.1:5000/a:b", "127.0.0.1:5000/a:b"),
        ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ("[2001:db8::1]/a", "[2001:db8::1]/a:latest"),
        ("a__b/c-d.e--f", "docker.io/a__b/c-d.e--f:latest"),
        (f"busybox@sha256:{HEX}", f"docker.io/library/busybox@sha256:{HEX}"),
        (f"busybox:1.37@sha256:{HEX}", f"docker.io/library/busybox@sha256:{HEX}"),
        (f"localhost:5000/a:t@sha256:{HEX}", f"localhost:5000/a@sha256:{HEX}"),
        ("containers-storage:busybox", "docker.io/library/containers-storage:busybox"),
        ("busybox:5000", "docker.io/library/busybox:5000"),
        ("x" * 237, f"docker.io/library/{'x' * 237}:latest"),
        (HEX + "0", f"docker.io/library/{HEX}0:latest"),
        ("a:" + "t" * 128, "docker.io/library/a:" + "t" * 128),
    ],
)
def test_valid_references_are_normalized_as_docker_does(text: str, normalized: str) -> None:
    assert str(parse(text)) == normalized
    assert parse(normalized) == parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " busybox",
        "busybox ",
        "busybox\n",
        "busybox:1.37\n",
        "bus ybox",
        "Busybox",
        "user/App",
        "busybox:",
        "busybox:-x",
        "busybox:.x",
        "busybox:a:b",
        "a:" + "t" * 129,
        "busybox@",
        "busybox@sha256:abc",
        f"busybox@sha256:{HEX.upper()}",
        f"busybox@sha256:{HEX}0",
        f"busybox@sha512:{HEX}{HEX}",
        f"busybox@md5:{HEX}",
        f"@sha256:{HEX}",
        f"busybox@sha256:{HEX}@sha256:{HEX}",
        HEX,
        "x" * 238,
        "../etc/passwd",
        "/etc/passwd",
        "a/../b",
        "a//b",
        "a/./b",
        "a/",
        "/a",
        "./a",
        "-a",
        "_a",
        "a_",
        "a..b",
        "a___b",
        "a/-b",
        "oci:/tmp/layout:tag",
        "docker://busybox",
        "dir:/tmp",
        "http://example.test/a",
        "user:pass@example.test/a",
        "example.test:port/a",
        "example-.test/a",
        "[::1/a",
        "a\0b",
        "bücher",
        "busybox:１",  # noqa: RUF001 - a digit, but not an ASCII one
        "--policy=x",
        "$(id)",
        "a" * 10_000,
    ],
)
def test_invalid_references_are_refused(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse(text)
    assert caught.value.reason == "InvalidImageName"
    assert not caught.value.retryable
    assert caught.value.message.startswith("image ")
    assert len(caught.value.message) < 400


@given(st.text(alphabet=string.ascii_letters + string.digits + "./:@_-[]", max_size=60))
def test_whatever_parses_is_stable_and_harmless(text: str) -> None:
    try:
        ref = parse(text)
    except EngineError:
        return
    assert parse(str(ref)) == ref
    assert not str(ref).startswith(("-", "/", "."))
    assert ".." not in ref.path.split("/")
