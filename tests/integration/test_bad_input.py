"""What a user gets wrong: each is refused by the API server, or told by a condition and an Event that name what is
at fault; the next Sandbox on the node does not notice, and nothing stays behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests import images
from tests.cluster import KubectlError, condition_of, eventually, fresh_namespace, leaks_of, whole_cluster
from tests.sandboxes import Object, Sandboxes

from sandkeeper.localcluster.cluster import LocalCluster
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]

NODE = "node-1"
# Longer than a good Sandbox takes on a busy machine: while a registry is silent the good one comes up.
PULL_SECONDS = 10

Change = Callable[[Object], None]


def spec(**fields: Any) -> Change:
    """Changes fields of the spec."""
    return lambda body: body["spec"].update(fields)


def container(**fields: Any) -> Change:
    """Changes fields of the container."""
    return lambda body: body["spec"]["containers"][0].update(fields)


def mounted(**fields: Any) -> Change:
    """Gives the container a volume, mounted so."""
    mount = {"name": "data", "mountPath": "/data"} | fields

    def change(body: Object) -> None:
        container(volumeMounts=[mount])(body)
        spec(volumes=[{"name": "data", "emptyDir": {}}])(body)

    return change


@dataclass(frozen=True)
class Told:
    """How a Sandbox that the API server takes says what is wrong. Words are of Ready's message and of the Event."""

    reasons: tuple[str, ...]
    words: tuple[str, ...]
    stalled: bool = False


PULL = ("ErrImagePull", "ImagePullBackOff")

# What is wrong: (the change to a good manifest, what is told). REGISTRY, CLOSED and SILENT stand for addresses.
TOLD: dict[str, tuple[Change, Told]] = {
    "an image that is not on the node": (
        container(image="busybox:0.1", imagePullPolicy="Never"),
        Told(
            ("ErrImageNeverPull",), ("image 'busybox:0.1' is not on this node", "pull policy is Never"), True
        ),
    ),
    "an image that its registry does not have": (
        container(image="REGISTRY/nothing:1"),
        Told(PULL, ("image 'REGISTRY/nothing:1'", "the image was not found")),
    ),
    "a tag that its registry does not have": (
        container(image="REGISTRY/good:2"),
        Told(PULL, ("image 'REGISTRY/good:2'", "the image was not found")),
    ),
    "a registry that does not listen": (
        container(image="CLOSED/good:1"),
        Told(PULL, ("image 'CLOSED/good:1'", "the registry cannot be reached")),
    ),
    "a registry that never answers": (
        container(image="SILENT/good:1"),
        Told(PULL, ("image 'SILENT/good:1'", "the registry did not answer in time", f"{PULL_SECONDS} s")),
    ),
    "a command that is not in the image": (
        container(command=["/no/such/program"]),
        Told(("StartError",), ("containers[main]", "/no/such/program", "no such file"), True),
    ),
    "a working directory that is a file": (
        container(workingDir="/bin/busybox"),
        Told(("StartError",), ("containers[main]", "/bin/busybox", "Not a directory"), True),
    ),
    "a runtime that no node has": (
        spec(runtime="nosuch"),
        Told(("Unschedulable",), ("lacks runtime nosuch", "offers crun")),
    ),
    "a node that does not exist": (
        spec(nodeName="node-9"),
        Told(("Unschedulable",), ("spec.nodeName node-9 does not exist",)),
    ),
    "a selector that no node matches": (
        spec(nodeSelector={"zone": "nowhere"}),
        Told(("Unschedulable",), ("does not match nodeSelector",)),
    ),
    "more memory than a node has": (
        container(resources={"limits": {"memory": "64Ti"}}),
        Told(("Unschedulable",), ("1 is too small (memory)", "the most that one has: memory ")),
    ),
    "more CPU than a node has": (
        container(resources={"limits": {"cpu": "4096"}}),
        Told(("Unschedulable",), ("1 is too small (cpu)", "the most that one has: cpu ")),
    ),
    "root where it may not be": (
        container(securityContext={"runAsNonRoot": True}),
        Told(
            ("InvalidConfig",),
            ("containers[main].securityContext.runAsNonRoot", "run as root", "runAsUser to a number above 0"),
            True,
        ),
    ),
    "the node's network": (
        spec(network="Host"),
        Told(("Unschedulable",), ("does not allow network Host",)),
    ),
}

MAIN = "spec.containers[0]"

# What is wrong: (the change, what kubectl says). All bounds of the schema: test_api_accept_reject.py.
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a container's name that is a path": (container(name="../x"), (f"{MAIN}.name", "must be a DNS label")),
    "a volume's name that is a path": (
        spec(volumes=[{"name": "../x", "emptyDir": {}}]),
        ("spec.volumes[0].name", "must be a DNS label"),
    ),
    "a host name that is a path": (spec(hostname="../x"), ("spec.hostname", "must be a DNS label")),
    "a runtime that is a path": (spec(runtime="../crun"), ("spec.runtime", "must be a runtime's name")),
    "an image that is no reference": (
        container(image="Not An Image"),
        (f"{MAIN}.image", "must be an image reference, such as"),
    ),
    "1 MiB in a variable": (
        container(env=[{"name": "A", "value": "x" * 2**20}]),
        (f"{MAIN}.env[0].value", "may not be more than 32768"),
    ),
    "1 MiB in many variables": (
        container(env=[{"name": f"A{index}", "value": "x" * 2**15} for index in range(32)]),
        (f"{MAIN}.env", "must not hold more than 131072 characters"),
    ),
    "a working directory under /proc": (
        container(workingDir="/proc/self/fd/7"),
        (f"{MAIN}.workingDir", "must not be under /proc"),
    ),
    "a working directory that climbs": (
        container(workingDir="/tmp/../proc"),
        (f"{MAIN}.workingDir", "must be an absolute path without `.`, `..`"),
    ),
    "a capability that breaks out": (
        container(securityContext={"capabilities": {"add": ["SYS_ADMIN"]}}),
        (f"{MAIN}.securityContext.capabilities.add[0]", "SYS_ADMIN", "supported values", "NET_BIND_SERVICE"),
    ),
    "a sub-path that climbs": (
        mounted(subPath="../../etc"),
        (f"{MAIN}.volumeMounts[0].subPath", "must be a relative path without `.` or `..`"),
    ),
    "a field that does not exist": (container(comand=["true"]), (f'unknown field "{MAIN}.comand"',)),
    "a right that cannot be had": (
        container(securityContext={"privileged": True}),
        (f'unknown field "{MAIN}.securityContext.privileged"',),
    ),
}


@dataclass(frozen=True)
class Hosts:
    """Registries on loopback: one that serves, one whose port is closed, one that never answers."""

    registry: str
    closed: str
    silent: str

    def __call__(self, text: str) -> str:
        """The text with their addresses in it."""
        for word, host in (("REGISTRY", self.registry), ("CLOSED", self.closed), ("SILENT", self.silent)):
            text = text.replace(word, host)
        return text


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    folder: Path = tmp_path_factory.mktemp("registry")
    with images.registry(folder) as serving, images.stalled() as silent:
        serving.push("good:1", images.busybox_image())
        yield Hosts(serving.host, f"127.0.0.1:{images.free_port()}", silent.host)


@pytest.fixture(scope="module")
def local(hosts: Hosts) -> Iterator[LocalCluster]:
    """A cluster of one node, which knows these registries."""
    shim_env = {
        "OCI__INSECURE_REGISTRIES": json.dumps([hosts.registry, hosts.silent]),
        "OCI__IMAGE_PULL_TIMEOUT": str(PULL_SECONDS),
    }
    with whole_cluster(shims=1, engine="oci", shim_env=shim_env) as found:
        yield found
        leaks_of(found, 0).assert_none()


@pytest.fixture
def sandboxes(local: LocalCluster) -> Iterator[Sandboxes]:
    """A user's view; afterwards nothing is left on the node."""
    with fresh_namespace(local.kubectl) as namespace:
        yield Sandboxes(local.kubectl, namespace)
    with local.shim(0) as shim:
        assert not shim.list().sandboxes
    leaks_of(local, 0).assert_none()


def bad(change: Change, hosts: Hosts) -> Object:
    body = manifest("bad")
    change(body)
    found: Object = json.loads(hosts(json.dumps(body)))
    return found


def good_one_gets_ready(sandboxes: Sandboxes, **fields: Any) -> None:
    body = manifest("good", nodeName=NODE)
    container(**fields)(body)
    sandboxes.until_ready(sandboxes.apply(body))


@pytest.mark.parametrize(("change", "told"), TOLD.values(), ids=TOLD)
def test_it_is_told(sandboxes: Sandboxes, hosts: Hosts, change: Change, told: Told) -> None:
    name = sandboxes.apply(bad(change, hosts))
    good_one_gets_ready(sandboxes)
    body = sandboxes.until_reason(name, *told.reasons)
    ready = condition_of(body, "Ready")
    assert ready["status"] == "False"
    assert condition_of(body, "Stalled").get("status", "False") == str(told.stalled)
    event = sandboxes.until_event(name, told.reasons[0])
    assert event["type"] == "Warning"
    assert event["regarding"]["uid"] == body["metadata"]["uid"]
    for word in map(hosts, told.words):  # runtimes differ in case
        assert word.lower() in ready["message"].lower()
        assert word.lower() in event["note"].lower()
    assert not body["status"].get("pid")


@pytest.mark.parametrize(("change", "words"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(sandboxes: Sandboxes, hosts: Hosts, change: Change, words: tuple[str, ...]) -> None:
    with pytest.raises(KubectlError) as caught:
        # Not by `apply`: 1 MiB does not fit into its annotation, and that would be all it says.
        sandboxes.run("create", "-f", "-", input=json.dumps(bad(change, hosts)))
    for word in words:
        assert word in str(caught.value)
    assert not sandboxes.get("bad")
    good_one_gets_ready(sandboxes)


def test_a_silent_registry_delays_no_other_pull(sandboxes: Sandboxes, hosts: Hosts) -> None:
    name = sandboxes.apply(bad(container(image="SILENT/good:1"), hosts))
    sandboxes.until_reason(name, "PullingImage")
    good_one_gets_ready(sandboxes, image=hosts("REGISTRY/good:1"), imagePullPolicy="Always")
    assert condition_of(sandboxes.get(name), "Ready")["reason"] == "PullingImage"


def test_a_mended_spec_runs(sandboxes: Sandboxes, hosts: Hosts) -> None:
    """The next instance starts by itself, and nothing of the trouble stays in the status."""
    name = sandboxes.apply(bad(container(command=["/no/such/program"]), hosts))
    sandboxes.until_reason(name, "StartError")
    sandboxes.apply(manifest(name))
    body = sandboxes.until_instance(name, 2)
    assert not condition_of(body, "Stalled")
    assert "exitReason" not in body["status"]


def test_a_link_cannot_lead_a_sub_path_out_of_its_volume(sandboxes: Sandboxes) -> None:
    """The container puts a link to / in place of the folder, and is started again."""
    script = "rmdir /data/out && ln -s / /data/out; exit 1"
    body = manifest("bad", "sh", "-c", script, restartPolicy="OnFailure")
    spec(volumes=[{"name": "data", "emptyDir": {}}])(body)
    mounts = [{"name": "data", "mountPath": "/data"}, {"name": "data", "mountPath": "/out", "subPath": "out"}]
    container(volumeMounts=mounts)(body)
    name = sandboxes.apply(body)

    def message() -> str:
        return str(condition_of(sandboxes.get(name), "Ready").get("message"))

    eventually(lambda: "containers[main].volumeMounts[1].subPath" in message(), timeout=60, seen=message)
    assert sandboxes.until_event(name, "CrashLoopBackOff")["type"] == "Warning"
    good_one_gets_ready(sandboxes)
