"""What the API server accepts and refuses: the schema's rules, on the real thing.

Rows are created with dry_run=All and strict field validation, as kubectl does. A refusal must name the field
and say what is allowed.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from sandkeeper.api import API_VERSION, GROUP, VERSION

pytestmark = pytest.mark.cluster

Spec = dict[str, Any]
Create = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def api(cluster: Any) -> Any:
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api_client:
        yield client.CustomObjectsApi(api_client)


@pytest.fixture
def create(api: Any) -> Create:
    def call(kind: str, body: dict[str, Any]) -> dict[str, Any]:
        options = {"dry_run": "All", "field_validation": "Strict"}
        answer: dict[str, Any]
        if kind == "Sandbox":
            answer = api.create_namespaced_custom_object(
                GROUP, VERSION, "default", "sandboxes", body, **options
            )
        else:
            answer = api.create_cluster_custom_object(GROUP, VERSION, "sandboxnodes", body, **options)
        return answer

    return call


def make(kind: str, spec: Spec, name: str = "row") -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}


def sandbox(**fields: Any) -> Spec:
    return {"containers": [{"name": "main", "image": "busybox:1.37"}], **fields}


def container(**fields: Any) -> Spec:
    return {"containers": [{"name": "main", "image": "busybox:1.37", **fields}]}


def limits(**fields: Any) -> Spec:
    return container(resources={"limits": fields})


def security(**fields: Any) -> Spec:
    return container(securityContext=fields)


def mount(**fields: Any) -> Spec:
    mounts = [{"name": "v", "mountPath": "/v"} | fields]
    return container(volumeMounts=mounts) | {"volumes": [{"name": "v", "emptyDir": {}}]}


def env(*pairs: tuple[str, str]) -> Spec:
    return container(env=[{"name": name, "value": value} for name, value in pairs])


C0 = "spec.containers[0]"
MAIN = {"name": "main", "image": "busybox:1.37"}
DIGEST = "sha256:" + "0123456789abcdef" * 4

ACCEPTED: dict[str, Spec] = {
    "the least": sandbox(),
    "image with registry, port, tag, digest": container(
        image=f"registry.example.com:5000/team/my-app_x:v1.2@{DIGEST}"
    ),
    "image by digest": container(image=f"busybox@{DIGEST}"),
    "image on an IPv6 registry": container(image="[::1]:5000/a:b"),
    "every pull policy": {"containers": [MAIN | {"imagePullPolicy": "Never"}]},
    "sixteen containers": {"containers": [MAIN | {"name": f"c{i}"} for i in range(16)]},
    "cpu as a number": limits(cpu=2),
    "cpu as a fraction": limits(cpu="0.5"),
    "memory in all spellings": limits(memory="1.5Gi"),
    "memory as a number of bytes": limits(memory=67108864),
    "memory of at least 1Mi": limits(memory="1Mi"),
    "one pid": limits(pids=1),
    "the root folder to work in": container(workingDir="/"),
    "a folder to work in": container(workingDir="/proc-like/..data/dev"),
    "a path may have dots": mount(mountPath="/a/...b/c.d"),
    "/dev/shm may be a volume": mount(mountPath="/dev/shm"),
    "a folder of a volume": mount(subPath="a/b"),
    "a non-root user": security(runAsUser=65534, runAsNonRoot=True),
    "root, where nobody forbids it": security(runAsUser=0),
    "capabilities": security(capabilities={"drop": ["ALL"], "add": ["CHOWN", "NET_BIND_SERVICE"]}),
    "an env of 100 KiB": env(("A", "x" * 32768), ("B", "x" * 32768), ("C", "x" * 32768)),
    "an empty env value": container(env=[{"name": "a.b-C_1"}]),
    "a long script": container(command=["sh", "-c"], args=["\n" * 32768]),
    "a volume in memory": sandbox(
        volumes=[{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "8Mi"}}]
    ),
    "a shutdown time": sandbox(shutdownTime="2030-01-31T12:00:00+01:00"),
    "a label selector": sandbox(nodeSelector={"example.com/zone": "a", "plain": ""}),
    "everything else": sandbox(
        desiredState="Stopped",
        runtime="crun",
        nodeName="node-1.example.com",
        hostname="h",
        network="Host",
        restartPolicy="OnFailure",
        failurePolicy={"recreate": "OnFailure", "limit": 1, "backoffSeconds": 0},
        terminationGracePeriodSeconds=0,
        activeDeadlineSeconds=1,
        ttlSecondsAfterFinished=0,
    ),
}

# id: (spec, the field that the answer names, what it says)
REJECTED: dict[str, tuple[Spec, str, str]] = {
    "no containers field": ({}, "spec.containers", "Required value"),
    "no containers": ({"containers": []}, "spec.containers", "at least 1 items"),
    "17 containers": (
        {"containers": [MAIN | {"name": f"c{i}"} for i in range(17)]},
        "spec.containers",
        "must have at most 16 items",
    ),
    "two containers of one name": ({"containers": [MAIN, MAIN]}, "spec.containers[1]", "Duplicate value"),
    "no image": ({"containers": [{"name": "main"}]}, f"{C0}.image", "Required value"),
    "a container's name": (container(name="Main"), f"{C0}.name", "must be a DNS label"),
    "a container's name that is a path": (container(name="../a"), f"{C0}.name", "must be a DNS label"),
    "a container's long name": (container(name="a" * 64), f"{C0}.name", "may not be more than 63"),
    "image with spaces": (container(image="busy box"), f"{C0}.image", "must be an image reference"),
    "image in upper case": (container(image="library/BusyBox"), f"{C0}.image", "must be an image reference"),
    "image that is a path": (container(image="/etc/passwd"), f"{C0}.image", "must be an image reference"),
    "image that climbs": (container(image="a/../b"), f"{C0}.image", "must be an image reference"),
    "image with a transport": (container(image="docker://a"), f"{C0}.image", "must be an image reference"),
    "image with a bad digest": (container(image="a@sha256:0"), f"{C0}.image", "must be an image reference"),
    "image of no letters": (container(image=""), f"{C0}.image", "at least 1 chars"),
    "pull policy": (container(imagePullPolicy="Sometimes"), f"{C0}.imagePullPolicy", '"IfNotPresent"'),
    "cpu that is no quantity": (
        limits(cpu="much"),
        f"{C0}.resources.limits.cpu",
        "must be a quantity from 1m",
    ),
    "cpu of nothing": (limits(cpu=0), f"{C0}.resources.limits.cpu", "must be a quantity from 1m to 4096"),
    "negative memory": (
        limits(memory="-1Gi"),
        f"{C0}.resources.limits.memory",
        "must be a quantity from 1Mi",
    ),
    "memory in thousandths": (
        limits(memory="64m"),
        f"{C0}.resources.limits.memory",
        "must be a quantity from 1Mi to 64Ti",
    ),
    "no pids": (limits(pids=0), f"{C0}.resources.limits.pids", "greater than or equal to 1"),
    "too many pids": (limits(pids=2**40), f"{C0}.resources.limits.pids", "less than or equal to 4194304"),
    "a limit on what is not known": (limits(gpu=1), "", f'unknown field "{C0}.resources.limits.gpu"'),
    "cwd under /proc": (
        container(workingDir="/proc/self/fd/7"),
        f"{C0}.workingDir",
        "must not be under /proc",
    ),
    "cwd is /proc": (container(workingDir="/proc"), f"{C0}.workingDir", "must not be under /proc"),
    "cwd in /dev/fd": (container(workingDir="/dev/fd/7"), f"{C0}.workingDir", "must not be under /proc"),
    "cwd that climbs": (container(workingDir="/a/../proc"), f"{C0}.workingDir", "must be an absolute path"),
    "cwd with two slashes": (container(workingDir="//proc"), f"{C0}.workingDir", "must be an absolute path"),
    "relative cwd": (container(workingDir="tmp"), f"{C0}.workingDir", "must be an absolute path"),
    "a mount without its volume": (
        container(volumeMounts=[{"name": "v", "mountPath": "/v"}]),
        "spec.containers",
        "must be the name of an entry of `volumes`",
    ),
    "two mounts on one path": (
        container(volumeMounts=[{"name": "v", "mountPath": "/v"}] * 2)
        | {"volumes": [{"name": "v", "emptyDir": {}}]},
        f"{C0}.volumeMounts[1]",
        "Duplicate value",
    ),
    "a mount on /": (
        mount(mountPath="/"),
        f"{C0}.volumeMounts[0].mountPath",
        "must be an absolute path below /",
    ),
    "a relative mount": (mount(mountPath="v"), f"{C0}.volumeMounts[0].mountPath", "must be an absolute path"),
    "a mount that climbs": (
        mount(mountPath="/v/../.."),
        f"{C0}.volumeMounts[0].mountPath",
        "without `.`, `..`",
    ),
    "a mount over /proc": (
        mount(mountPath="/proc"),
        f"{C0}.volumeMounts[0].mountPath",
        "must not be under /proc",
    ),
    "a mount over /sys": (mount(mountPath="/sys/fs"), f"{C0}.volumeMounts[0].mountPath", "must not be under"),
    "a mount with a colon": (mount(mountPath="/a:b"), f"{C0}.volumeMounts[0].mountPath", "should match"),
    "a sub-path that climbs": (
        mount(subPath="../a"),
        f"{C0}.volumeMounts[0].subPath",
        "must be a relative path",
    ),
    "an absolute sub-path": (mount(subPath="/a"), f"{C0}.volumeMounts[0].subPath", "must be a relative path"),
    "1 MiB of env": (env(("A", "x" * 2**20)), f"{C0}.env[0].value", "may not be more than 32768"),
    "1 MiB of env in pieces": (
        env(*((f"A{i}", "x" * 32768) for i in range(32))),
        f"{C0}.env",
        "must not hold more than 131072 characters",
    ),
    "257 variables": (env(*((f"A{i}", "") for i in range(257))), f"{C0}.env", "must have at most 256 items"),
    "a variable twice": (env(("A", ""), ("A", "")), f"{C0}.env[1]", "Duplicate value"),
    "a variable's name": (
        env(("1=A", "")),
        f"{C0}.env[0].name",
        "must be the name of an environment variable",
    ),
    "NUL in an argument": (container(args=["a\x00b"]), f"{C0}.args[0]", "should match"),
    "NUL in a variable": (env(("A", "\x00")), f"{C0}.env[0].value", "should match"),
    "too many arguments": (container(args=["a"] * 257), f"{C0}.args", "must have at most 256 items"),
    "arguments that are too long in all": (
        container(command=["x" * 32768] * 3, args=["x" * 32768] * 2),
        C0,
        "must not hold more than 131072 characters",
    ),
    "root that must not be root": (
        security(runAsUser=0, runAsNonRoot=True),
        f"{C0}.securityContext.runAsUser",
        "must not be 0",
    ),
    "a negative user": (
        security(runAsUser=-1),
        f"{C0}.securityContext.runAsUser",
        "greater than or equal to 0",
    ),
    "a capability that breaks out": (
        security(capabilities={"add": ["SYS_ADMIN"]}),
        f"{C0}.securityContext.capabilities.add[0]",
        '"NET_BIND_SERVICE"',
    ),
    "all capabilities": (
        security(capabilities={"add": ["ALL"]}),
        f"{C0}.securityContext.capabilities.add[0]",
        "supported values",
    ),
    "a privileged container": (security(privileged=True), "", "unknown field"),
    "a volume of an unknown kind": (
        sandbox(volumes=[{"name": "v", "hostPath": {"path": "/"}}]),
        "",
        'unknown field "spec.volumes[0].hostPath"',
    ),
    "a volume of no kind": (sandbox(volumes=[{"name": "v"}]), "spec.volumes[0].emptyDir", "Required value"),
    "an empty folder's size": (
        sandbox(volumes=[{"name": "v", "emptyDir": {"sizeLimit": "big"}}]),
        "spec.volumes[0].emptyDir.sizeLimit",
        "must be a quantity from 1Mi",
    ),
    "an empty folder's medium": (
        sandbox(volumes=[{"name": "v", "emptyDir": {"medium": "HugePages"}}]),
        "spec.volumes[0].emptyDir.medium",
        '"Memory"',
    ),
    "an unknown state": (
        sandbox(desiredState="Hibernated"),
        "spec.desiredState",
        '"Running", "Paused", "Stopped"',
    ),
    "a network that is not there yet": (sandbox(network="CNI"), "spec.network", '"None", "Host"'),
    "an unknown restart policy": (sandbox(restartPolicy="Maybe"), "spec.restartPolicy", '"OnFailure"'),
    "an unknown failure policy": (
        sandbox(failurePolicy={"recreate": "Always"}),
        "spec.failurePolicy.recreate",
        '"Never", "OnFailure"',
    ),
    "a failure policy without end": (
        sandbox(failurePolicy={"limit": 100000}),
        "spec.failurePolicy.limit",
        "less than or equal to 1000",
    ),
    "a host name": (sandbox(hostname="a.b"), "spec.hostname", "must be a DNS label"),
    "a runtime that is a path": (
        sandbox(runtime="/usr/bin/crun"),
        "spec.runtime",
        "must be a runtime's name",
    ),
    "a node's name": (sandbox(nodeName="../n"), "spec.nodeName", "must be a DNS subdomain"),
    "a selector's key": (sandbox(nodeSelector={"a b": "c"}), "spec.nodeSelector", "must have label keys"),
    "a selector's value": (sandbox(nodeSelector={"a": "b c"}), "spec.nodeSelector.a", "should match"),
    "a grace period below zero": (
        sandbox(terminationGracePeriodSeconds=-1),
        "spec.terminationGracePeriodSeconds",
        "greater than or equal to 0",
    ),
    "a deadline of nothing": (
        sandbox(activeDeadlineSeconds=0),
        "spec.activeDeadlineSeconds",
        "greater than or equal to 1",
    ),
    "a shutdown time in words": (sandbox(shutdownTime="tomorrow"), "spec.shutdownTime", "date-time"),
}

NODES_ACCEPTED: dict[str, Spec] = {
    "host and port": {"address": "node-1.example.com:7443", "serverName": "shim.example.com"},
    "IPv4": {"address": "127.0.0.1:65535"},
    "IPv6": {"address": "[fd00::1]:7443"},
    "a unix socket": {"address": "unix:/run/sandkeeper/shim.sock"},
    "a unix socket as a URL": {"address": "unix:///run/sandkeeper/shim.sock", "unschedulable": True},
    "given up": {"address": "a:1", "outOfService": True},
}

NODES_REJECTED: dict[str, tuple[Spec, str, str]] = {
    "no address": ({}, "spec.address", "Required value"),
    "no port": ({"address": "node-1"}, "spec.address", "must be host:port, [IPv6]:port or unix:/path"),
    "a port too high": ({"address": "a:65536"}, "spec.address", "must have a port from 1 to 65535"),
    "a URL": ({"address": "https://a:1"}, "spec.address", "must be host:port"),
    "a relative socket": ({"address": "unix:a.sock"}, "spec.address", "must be host:port"),
    "a server name": ({"address": "a:1", "serverName": "*"}, "spec.serverName", "must be a DNS subdomain"),
}


@pytest.mark.parametrize("spec", ACCEPTED.values(), ids=ACCEPTED)
def test_sandbox_accepted(create: Create, spec: Spec) -> None:
    assert create("Sandbox", make("Sandbox", spec))["metadata"]["uid"]


@pytest.mark.parametrize(("spec", "field", "words"), REJECTED.values(), ids=REJECTED)
def test_sandbox_rejected(create: Create, spec: Spec, field: str, words: str) -> None:
    refused(create, make("Sandbox", spec), field, words)


@pytest.mark.parametrize("spec", NODES_ACCEPTED.values(), ids=NODES_ACCEPTED)
def test_node_accepted(create: Create, spec: Spec) -> None:
    assert create("SandboxNode", make("SandboxNode", spec))["metadata"]["uid"]


@pytest.mark.parametrize(("spec", "field", "words"), NODES_REJECTED.values(), ids=NODES_REJECTED)
def test_node_rejected(create: Create, spec: Spec, field: str, words: str) -> None:
    refused(create, make("SandboxNode", spec), field, words)


@pytest.mark.parametrize("name", ["a", "a" * 63, "0-a"])
def test_name_accepted(create: Create, name: str) -> None:
    assert create("Sandbox", make("Sandbox", sandbox(), name))["metadata"]["name"] == name


@pytest.mark.parametrize("name", ["a" * 64, "a.b"])
def test_name_rejected_by_the_schema(create: Create, name: str) -> None:
    refused(create, make("Sandbox", sandbox(), name), "", "`metadata.name` must be a DNS label of at most 63")


@pytest.mark.parametrize("name", ["../etc", "a/b", "A", ""])
def test_name_rejected_by_kubernetes(create: Create, name: str) -> None:
    refused(create, make("Sandbox", sandbox(), name), "", "name")


def test_a_generated_name_is_accepted(create: Create) -> None:
    body = make("Sandbox", sandbox())
    body["metadata"] = {"generateName": "run-"}
    assert create("Sandbox", body)["metadata"]["name"].startswith("run-")


def refused(create: Create, body: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(ApiException) as caught:
        create(body["kind"], body)
    assert caught.value.status in (400, 422)
    answer = json.loads(caught.value.body)
    if not field:
        assert words in answer["message"]
        return
    causes = answer["details"]["causes"]
    assert any(cause["field"] == field and words in cause["message"] for cause in causes), causes
