"""What containerd asks for, in the shim's words: what is kept, and what is refused rather than passed over."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf import any_pb2

from sandkeeper.shim.containerd import config_of, local_id, namespace_of, told
from sandkeeper.shim.errors import BadRequest
from sandkeeper.wire import controller_pb2, cri_pb2, node_pb2
from sandkeeper.wire.ids import valid_id

POD = "runtime.v1.PodSandboxConfig"
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"


def asked(*, local: bool = True, **fields: Any) -> node_pb2.SandboxConfig:
    request = controller_pb2.ControllerCreateRequest(sandbox_id="box", **fields)
    return config_of(request, "k8s.io", local=local)


def pod(type_url: str = POD, **options: Any) -> any_pb2.Any:
    """A pod with namespace options."""
    linux = cri_pb2.LinuxPodSandboxConfig(security_context={"namespace_options": options})
    return any_pb2.Any(
        type_url=type_url, value=cri_pb2.PodSandboxConfig(hostname="a-pod", linux=linux).SerializeToString()
    )


def test_ids_of_two_namespaces_never_meet() -> None:
    pairs = [("a", "b.c"), ("a.b", "c"), ("a", "b"), ("b", "a"), ("k8s.io", "f" * 64), ("a" * 76, "b" * 76)]
    made = {local_id(*pair) for pair in pairs}
    assert len(made) == len(pairs)
    assert all(map(valid_id, made))
    assert local_id("a", "b") == local_id("a", "b")


@pytest.mark.parametrize("sandbox_id", ["", "..", "a/b", "a" * 77])
def test_an_id_that_is_none(sandbox_id: str) -> None:
    with pytest.raises(BadRequest):
        local_id("k8s.io", sandbox_id)


def test_the_namespace_of_a_call() -> None:
    assert namespace_of([("user-agent", "grpc-go"), ("containerd-namespace", "k8s.io")]) == "k8s.io"
    assert namespace_of([]) == ""
    with pytest.raises(BadRequest):
        namespace_of([("containerd-namespace", "../up")])


def test_its_caller_is_told_the_id_that_it_knows() -> None:
    record = node_pb2.SandboxRecord(sandbox_id=local_id("k8s.io", "box"))
    assert told(record, "box").sandbox_id == "box"
    assert record.sandbox_id != "box"


def test_what_is_asked_for_is_kept() -> None:
    spec = any_pb2.Any(type_url=SPEC, value=json.dumps({"hostname": "by-spec"}).encode())
    config = asked(
        sandbox={"spec": spec},
        rootfs=[{"type": "bind", "source": "/somewhere"}],
        netns_path="/run/netns/one",
        annotations={"a": "b"},
    )
    assert config.hostname == "by-spec"
    assert config.containerd.netns_path == "/run/netns/one"
    assert [each.source for each in config.containerd.rootfs] == ["/somewhere"]
    assert dict(config.containerd.annotations) == {"a": "b"}
    assert not config.containers


def test_what_differs_has_another_digest() -> None:
    digests = {
        each.digest for each in (asked(), asked(netns_path="/n"), asked(annotations={"a": "b"}), asked())
    }
    assert len(digests) == 3


@pytest.mark.parametrize("fields", [{"netns_path": "/n"}, {"rootfs": [{"type": "bind"}]}])
def test_only_the_node_itself_may_name_its_paths(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="unix socket"):
        asked(local=False, **fields)


@pytest.mark.parametrize("type_url", [POD, f"type.googleapis.com/{POD}"])
def test_a_pods_namespaces(type_url: str) -> None:
    shared = asked(options=pod(type_url))
    assert shared.containerd.pod
    assert not asked().containerd.pod
    assert (shared.hostname, shared.network) == ("a-pod", node_pb2.NETWORK_NONE)
    assert not shared.containerd.host_pid
    assert not shared.containerd.host_ipc
    node = cri_pb2.NODE
    of_node = asked(options=pod(type_url, network=node, pid=node, ipc=node))
    assert of_node.network == node_pb2.NETWORK_HOST
    assert of_node.containerd.host_pid
    assert of_node.containerd.host_ipc


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (pod(userns_options={"mode": cri_pb2.POD}), "user namespace"),
        (any_pb2.Any(type_url=POD, value=b"\xff"), "options"),
        (any_pb2.Any(type_url="example.test/Other"), "options"),
        (any_pb2.Any(value=b"nameless"), "options"),
    ],
)
def test_what_cannot_be_kept_is_refused(options: any_pb2.Any, word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        asked(options=options)


def test_a_pods_resolv_conf() -> None:
    dns = {"servers": ["10.0.0.10"], "searches": ["a.b", "b"], "options": ["ndots:5"]}
    value = cri_pb2.PodSandboxConfig(dns_config=dns).SerializeToString()
    config = asked(options=any_pb2.Any(type_url=POD, value=value))
    assert list(config.containerd.resolv_conf) == ["search a.b b", "nameserver 10.0.0.10", "options ndots:5"]


def test_a_server_that_would_be_two_lines_is_refused() -> None:
    value = cri_pb2.PodSandboxConfig(dns_config={"servers": ["10.0.0.10\nsearch evil"]}).SerializeToString()
    with pytest.raises(BadRequest, match="dns_config"):
        asked(options=any_pb2.Any(type_url=POD, value=value))


def test_a_pod_with_sysctls_is_refused() -> None:
    config = cri_pb2.PodSandboxConfig(linux={"sysctls": {"net.core.somaxconn": "1024"}})
    with pytest.raises(BadRequest, match="sysctls"):
        asked(options=any_pb2.Any(type_url=POD, value=config.SerializeToString()))


def test_a_pod_on_the_nodes_network_has_no_other() -> None:
    with pytest.raises(BadRequest, match="netns_path"):
        asked(options=pod(network=cri_pb2.NODE), netns_path="/run/netns/one")


@pytest.mark.parametrize("value", [b"[]", b'{"hostname": 3}', b"{}"])
def test_a_spec_without_a_hostname(value: bytes) -> None:
    assert asked(sandbox={"spec": any_pb2.Any(type_url=SPEC, value=value)}).hostname == ""


def test_a_spec_that_is_none() -> None:
    with pytest.raises(BadRequest, match="spec"):
        asked(sandbox={"spec": any_pb2.Any(type_url=SPEC, value=b"{")})
