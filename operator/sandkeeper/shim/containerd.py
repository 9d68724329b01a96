"""containerd as the client: what it asks for, in our words.

containerd keeps sandboxes in namespaces of its own, and two of them may each have one of the same id. Here they are
two: a call that carries the namespace (gRPC metadata `containerd-namespace`) means the sandbox of that namespace,
whose id on this node is made of both. Calls without it, the operator's, name that id itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message

from sandkeeper.shim.errors import BadRequest
from sandkeeper.wire import controller_pb2, cri_pb2, node_pb2
from sandkeeper.wire.ids import valid_id

NAMESPACE = "containerd-namespace"
_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"  # containerd's name for an OCI spec as JSON


def namespace_of(metadata: Iterable[tuple[str, Any]]) -> str:
    """The containerd namespace that a call is about; empty where it names none. Raises BadRequest."""
    for key, value in metadata:
        if key == NAMESPACE:
            if not valid_id(str(value)):
                raise BadRequest(f"metadata `{NAMESPACE}` must be an identifier")
            return str(value)
    return ""


def local_id(namespace: str, sandbox_id: str) -> str:
    """The id on this node of a sandbox in a containerd namespace. Raises BadRequest for an id that is none."""
    if not valid_id(sandbox_id):
        raise BadRequest(
            "sandbox_id must be letters and digits with single `.`, `_` or `-` between, at most 76"
        )
    # Both together may be longer than an id can be; neither holds a slash.
    return f"ctrd-{hashlib.sha256(f'{namespace}/{sandbox_id}'.encode()).hexdigest()[:40]}"


def told(record: node_pb2.SandboxRecord, sandbox_id: str) -> node_pb2.SandboxRecord:
    """The record as the client that calls its sandbox `sandbox_id` is told it."""
    if record.sandbox_id == sandbox_id:
        return record
    copy = node_pb2.SandboxRecord()
    copy.CopyFrom(record)
    copy.sandbox_id = sandbox_id
    return copy


def config_of(
    request: controller_pb2.ControllerCreateRequest, namespace: str, *, local: bool
) -> node_pb2.SandboxConfig:
    """A sandbox process without containers, as containerd asks for it.

    Its `options` may be a pod's configuration (CRI), or none. local: the caller is on this node, and may name paths
    of it. Raises BadRequest for what cannot be kept, rather than to pass over it.
    """
    config = node_pb2.SandboxConfig(hostname=_hostname(request.sandbox.spec))
    asked = config.containerd
    asked.namespace, asked.sandbox_id = namespace, request.sandbox_id
    asked.annotations.update(request.annotations)
    if (request.rootfs or request.netns_path) and not local:
        raise BadRequest("rootfs and netns_path: only a caller on this node's unix socket may name them")
    asked.rootfs.extend(request.rootfs)
    asked.netns_path = request.netns_path
    if request.options.type_url or request.options.value:
        _take_pod(config, _pod(request.options))
    config.digest = f"sha256:{hashlib.sha256(config.SerializeToString(deterministic=True)).hexdigest()}"
    return config


def _pod(options: any_pb2.Any) -> cri_pb2.PodSandboxConfig:
    pod = cri_pb2.PodSandboxConfig()
    # containerd writes the name alone, others write an URL that ends with it.
    if options.type_url.rpartition("/")[2] == _name(pod):
        try:
            pod.ParseFromString(options.value)
        except DecodeError:
            pass
        else:
            return pod
    wanted = f"{_name(node_pb2.SandboxConfig())} or a {_name(pod)}"
    raise BadRequest(f"options must be a {wanted}, not {options.type_url!r}")


def _name(message: Message) -> str:
    return str(message.DESCRIPTOR.full_name)


def _take_pod(config: node_pb2.SandboxConfig, pod: cri_pb2.PodSandboxConfig) -> None:
    """A pod's wishes for its namespaces. Raises BadRequest."""
    wishes = pod.linux.security_context.namespace_options
    if pod.linux.sysctls:
        raise BadRequest("options: sysctls are not supported")
    if wishes.HasField("userns_options") and wishes.userns_options.mode == cri_pb2.POD:
        raise BadRequest("options: a user namespace of the pod's own is not supported")
    config.hostname = pod.hostname or config.hostname
    config.containerd.pod = True
    config.containerd.resolv_conf.extend(_resolv_conf(pod.dns_config))
    config.containerd.host_pid = wishes.pid == cri_pb2.NODE
    config.containerd.host_ipc = wishes.ipc == cri_pb2.NODE
    if wishes.network == cri_pb2.NODE:
        if config.containerd.netns_path:
            raise BadRequest("netns_path: a pod on the node's network has none")
        config.network = node_pb2.NETWORK_HOST


def _resolv_conf(dns: cri_pb2.DNSConfig) -> list[str]:
    """resolv.conf(5), as kubelet has it made. Raises BadRequest for what would end a line."""
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    if any(not line.isprintable() for line in lines):
        raise BadRequest("options: dns_config must be printable")
    return lines


def _hostname(spec: any_pb2.Any) -> str:
    """What of a sandbox's OCI spec is the sandbox process's: its program is ours."""
    if spec.type_url.rpartition("/")[2] != _SPEC.rpartition("/")[2]:
        return ""
    try:
        document = json.loads(spec.value)
    except ValueError:
        raise BadRequest("sandbox.spec must be an OCI spec as JSON") from None
    name = document.get("hostname", "") if isinstance(document, dict) else ""
    return name if isinstance(name, str) else ""
