"""manifests/ on a real API server: it takes them, their rights suffice and are not too many, attacks are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster import condition_of, eventually, leaks_of
from tests.faults.recorders import Objects
from tests.histories import violations
from tests.installed import (
    MANIFESTS,
    NODE,
    OPERATOR_ACCOUNT,
    SHIM_ACCOUNT,
    SYSTEM,
    Installed,
    built,
    granted,
    installed,
)
from tests.sandboxes import Object, Sandboxes

from sandkeeper.api import ASSIGNMENT_ANNOTATION
from sandkeeper.localcluster.apiserver import Kubectl
from sandkeeper.localcluster.watching import manifest

pytestmark = [pytest.mark.cluster, pytest.mark.oci]

EXAMPLES = Path(__file__).parents[2] / "examples"
OVERLAYS = [MANIFESTS, *sorted((MANIFESTS / "overlays").iterdir())]
TENANT = "tenant"
SPACES = {"life": None, "open": "privileged", "usual": None, "strict": "restricted", "typo": "restrictive"}
"""Namespaces and what they are labelled with."""
BARE = {"runAsNonRoot": True, "runAsUser": 65534, "capabilities": {"drop": ["ALL"]}}
"""What a restricted namespace asks for."""
# Rights that a short test does not see used, and why they are there.
UNSEEN = {
    ("sandkeeper.dev", "sandboxes", "assign"),  # no request: the policy sandkeeper-assignment asks for it
    ("events.k8s.io", "events", "patch"),  # a series: half a minute after the first
    ("certificates.k8s.io", "signers", "approve"),  # no requests: the API server asks for these two itself
    ("certificates.k8s.io", "signers", "sign"),
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Installed]:
    with installed() as found:
        admin = found.kubectl
        for name, level in SPACES.items():
            admin("create", "namespace", name)
            if level:
                admin("label", "namespace", name, f"sandkeeper.dev/enforce={level}")
            admin(
                "-n",
                name,
                "create",
                "rolebinding",
                TENANT,
                "--clusterrole=sandkeeper-edit",
                f"--user={TENANT}",
            )
            admin(
                "-n", name, "create", "rolebinding", "v", "--clusterrole=sandkeeper-view", f"--user={TENANT}"
            )
        # Policies act a moment after they were made.
        eventually(lambda: not tried(found, "usual", manifest("probe", network="Host")), timeout=60)
        eventually(lambda: not writes_assignment(found), timeout=60)
        yield found


def tried(cluster: Installed, namespace: str, body: Object) -> bool:
    """Whether a tenant may make this."""
    flags = ("--as", TENANT, "create", "--dry-run=server", "-f", "-")
    return cluster.kubectl.run("-n", namespace, *flags, input=json.dumps(body)).returncode == 0


def writes_assignment(cluster: Installed) -> bool:
    cluster.kubectl(
        "-n", "open", "apply", "-f", "-", input=json.dumps(manifest("idle", desiredState="Stopped"))
    )
    flags = (
        "--as",
        TENANT,
        "annotate",
        "sandbox",
        "idle",
        f"{ASSIGNMENT_ANNOTATION}={{}}",
        "--dry-run=server",
    )
    return cluster.kubectl.run("-n", "open", *flags).returncode == 0


# What the API server makes of the manifests


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_an_api_server_takes_every_object(cluster: Installed, folder: Path) -> None:
    objects = built(cluster.kubectl, folder)
    for each in objects:
        if (
            each["kind"] == "Namespace"
        ):  # a dry run makes none, and nothing can be tried in one that is not there
            cluster.kubectl("apply", "--server-side", "-f", "-", input=json.dumps(each))
    answer = cluster.apply(folder, "--dry-run=server", "-o", "name")
    assert len(answer.split()) == len(objects)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_every_object_says_what_it_is_part_of(cluster: Installed, folder: Path) -> None:
    for each in built(cluster.kubectl, folder):
        labels = each["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/part-of") == "sandkeeper", each["metadata"]
        generated = each["kind"] == "CustomResourceDefinition"
        assert generated or "app.kubernetes.io/name" in labels, each["metadata"]


def test_components_join_a_kustomization_of_ones_own(cluster: Installed, tmp_path: Path) -> None:
    """The step of docs/install.md, with the image pinned by digest."""
    there = Path(os.path.relpath(MANIFESTS, tmp_path.resolve()))
    components = [str(there / "components" / each.name) for each in (MANIFESTS / "components").iterdir()]
    digest = f"sha256:{'0' * 64}"
    image = {"name": "sandkeeper", "newName": "registry.example/sandkeeper", "digest": digest}
    own = {"resources": [str(there)], "components": components, "images": [image]}
    (tmp_path / "kustomization.yaml").write_text(json.dumps(own))
    found = built(cluster.kubectl, tmp_path)
    kinds = {each["kind"] for each in found}
    assert {"ServiceMonitor", "PrometheusRule", "ConfigMap"} <= kinds
    pods = [each["spec"]["template"]["spec"] for each in found if each["kind"] in ("Deployment", "DaemonSet")]
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert images == {f"registry.example/sandkeeper@{digest}"}
    for each in found:
        assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "sandkeeper"


def test_argo_cds_own_configuration_stays(cluster: Installed) -> None:
    """The step of docs/gitops.md. (kubectl apply --server-side would take over, and empty, what a client-side apply of
    Argo CD's own manifests wrote.)"""
    admin = cluster.kubectl
    admin("create", "namespace", "argocd")
    theirs = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "argocd-cm", "namespace": "argocd"},
    }
    admin("apply", "-f", "-", input=json.dumps({**theirs, "data": {"url": "https://argocd.example"}}))
    patch = MANIFESTS / "argocd" / "argocd-cm.yaml"
    admin("-n", "argocd", "patch", "configmap", "argocd-cm", "--type=merge", "--patch-file", str(patch))
    data = json.loads(admin("-n", "argocd", "get", "configmap", "argocd-cm", "-o", "json"))["data"]
    assert data.pop("url") == "https://argocd.example"
    assert data == yaml.safe_load(patch.read_text())["data"]


def pod_of(cluster: Installed, kind: str) -> Object:
    """A Pod as the controller would make it."""
    owner = next(each for each in built(cluster.kubectl, MANIFESTS) if each["kind"] == kind)
    template = owner["spec"]["template"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        **template,
        "metadata": {**template["metadata"], "name": "one"},
    }


def admitted(cluster: Installed, namespace: str, pod: Object) -> bool:
    flags = ("-n", namespace, "create", "--dry-run=server", "-f", "-")
    return cluster.kubectl.run(*flags, input=json.dumps(pod)).returncode == 0


def test_the_operator_is_a_restricted_pod_and_a_shim_has_its_own_namespace(cluster: Installed) -> None:
    operator, shim = pod_of(cluster, "Deployment"), pod_of(cluster, "DaemonSet")
    assert admitted(cluster, SYSTEM, operator)
    assert admitted(cluster, NODE, shim)
    # Pod Security is really on.
    shim["spec"]["serviceAccountName"] = OPERATOR_ACCOUNT
    assert not admitted(cluster, SYSTEM, shim)


def test_examples_are_allowed_where_nothing_was_said(cluster: Installed) -> None:
    for file in sorted(EXAMPLES.glob("*.yaml")):
        cluster.kubectl("-n", "usual", "--as", TENANT, "create", "--dry-run=server", "-f", str(file))
    untrusted = EXAMPLES / "untrusted.yaml"
    cluster.kubectl("-n", "strict", "--as", TENANT, "create", "--dry-run=server", "-f", str(untrusted))


# The operator with its own rights alone


def test_the_operators_rights_suffice_and_are_used(cluster: Installed) -> None:
    cluster.start_operator()
    try:
        sandboxes = Sandboxes(cluster.kubectl, "life")
        with Objects(cluster.local.kubeconfig) as objects:
            whole_life(cluster, sandboxes)
            node_lost_and_found(cluster, sandboxes)
            wrong = [line for history in objects.histories() for line in violations(history)]
        assert not wrong
    finally:
        cluster.stop_operator()
    assert cluster.refused() == []
    rights = granted(built(cluster.kubectl, MANIFESTS), OPERATOR_ACCOUNT)
    assert rights - UNSEEN <= cluster.used() <= rights
    leaks_of(cluster.local, 0).assert_none()


def whole_life(cluster: Installed, sandboxes: Sandboxes) -> None:
    sandboxes.make("box")
    sandboxes.until_ready("box")
    for wish in ("Paused", "Running"):
        sandboxes.patch("box", {"spec": {"desiredState": wish}})
        sandboxes.until_reason("box", wish)
    sandboxes.make("box", "sleep", "3600")
    sandboxes.until_instance("box", 2)
    sandboxes.patch("box", {"spec": {"desiredState": "Stopped"}})
    sandboxes.until_reason("box", "Stopped")
    sandboxes.make("fails", "sh", "-c", "exit 3")
    sandboxes.until_event("fails", "Error")
    sandboxes.make("brief", "true", ttlSecondsAfterFinished=0)
    sandboxes.until_gone("brief")
    # Whoever takes the finalizer off leaves something on the node that nobody owns.
    sandboxes.make("torn")
    sandboxes.until_ready("torn")
    sandboxes.patch("torn", {"metadata": {"finalizers": None}})
    sandboxes.run("delete", "sandbox", "--all", "--wait=false")
    for name in ("box", "fails", "torn"):
        sandboxes.until_gone(name)
    eventually(lambda: not on_node(cluster), timeout=60)


def node_lost_and_found(cluster: Installed, sandboxes: Sandboxes) -> None:
    sandboxes.make("lost")
    sandboxes.until_ready("lost")
    node = json.loads(cluster.kubectl("get", "sandboxnode", "node-1", "-o", "json"))
    cluster.kubectl("delete", "sandboxnode", "node-1")
    sandboxes.until_reason("lost", "ShimLost")
    metadata = {"name": "node-1", "labels": node["metadata"]["labels"]}
    back = {
        "apiVersion": node["apiVersion"],
        "kind": node["kind"],
        "metadata": metadata,
        "spec": node["spec"],
    }
    cluster.kubectl("create", "-f", "-", input=json.dumps(back))
    sandboxes.delete("lost")
    sandboxes.until_gone("lost")
    eventually(lambda: not on_node(cluster), timeout=60)


def on_node(cluster: Installed) -> list[str]:
    with cluster.local.shim(0) as shim:
        return [each.sandbox_id for each in shim.list().sandboxes]


def test_an_operator_for_one_namespace_needs_rights_nowhere_else(cluster: Installed) -> None:
    overlay = MANIFESTS / "overlays" / "namespaced"
    admin = cluster.kubectl
    admin("delete", "clusterrolebinding", OPERATOR_ACCOUNT)
    before = len(cluster.requests())
    try:
        cluster.apply(overlay)
        admin("-n", "usual", "apply", "-f", "-", input=json.dumps(manifest("other")))
        cluster.until_operator_may_list("sandboxes", may=True)
        cluster.until_operator_may_list("usual", may=False)
        cluster.start_operator(NAMESPACES="sandboxes")
        sandboxes = Sandboxes(admin, "sandboxes")
        body = manifest("box")
        body["spec"]["containers"][0]["securityContext"] = BARE
        sandboxes.apply(body)
        sandboxes.until_ready("box")
        sandboxes.delete("box")
        sandboxes.until_gone("box")
        other = json.loads(admin("-n", "usual", "get", "sandbox", "other", "-o", "json"))
        assert condition_of(other, "Ready")["reason"] == "Pending"
    finally:
        cluster.stop_operator()
        admin("-n", "usual", "delete", "sandbox", "other", "--ignore-not-found")
        cluster.apply()
    assert cluster.refused() == []
    named = [each["objectRef"] for each in cluster.requests()[before:] if "objectRef" in each]
    # Its own certificates are in its own namespaces.
    others = [each for each in named if each["resource"] not in ("secrets", "configmaps")]
    assert {each.get("namespace") for each in others} == {None, "sandboxes"}
    assert {each.get("namespace") for each in named} == {None, "sandboxes", SYSTEM, NODE}


# Attacks


def forbidden(kubectl: Kubectl, *args: str, body: Object | None = None, by: str = "") -> None:
    """The API server refuses it for want of a right, or `by` a policy of this name; nothing else may be wrong."""
    done = kubectl.run(*args, input=None if body is None else json.dumps(body))
    assert done.returncode != 0, done.stdout
    assert "orbidden" in done.stderr, done.stderr
    assert (f"ValidatingAdmissionPolicy '{by}'" if by else "cannot") in done.stderr, done.stderr


def with_rights(**context: Any) -> Object:
    body = manifest("bad")
    body["spec"]["containers"][0]["securityContext"] = context
    return body


def one_of_two() -> Object:
    body = with_rights(**BARE)
    body["spec"]["containers"].append({**manifest("bad")["spec"]["containers"][0], "name": "second"})
    return body


@pytest.mark.parametrize(
    ("namespace", "body"),
    [
        pytest.param("usual", manifest("bad", network="Host"), id="the node's network"),
        pytest.param("usual", manifest("bad", nodeName="node-1"), id="a node by name"),
        pytest.param("usual", with_rights(capabilities={"add": ["NET_RAW"]}), id="raw sockets"),
        pytest.param("strict", manifest("bad"), id="maybe user 0"),
        pytest.param("strict", with_rights(**BARE, allowPrivilegeEscalation=True), id="set-user-ID programs"),
        pytest.param("strict", with_rights(**{**BARE, "capabilities": {}}), id="default capabilities"),
        pytest.param(
            "strict",
            with_rights(**{**BARE, "capabilities": {"drop": ["ALL"], "add": ["SETUID"]}}),
            id="a capability back",
        ),
        pytest.param("strict", one_of_two(), id="hidden in the second container"),
        pytest.param("typo", manifest("bad"), id="a level that nobody knows"),
    ],
)
def test_a_tenant_gets_only_what_the_namespace_allows(
    cluster: Installed, namespace: str, body: Object
) -> None:
    tenant = ("-n", namespace, "--as", TENANT, "create", "--dry-run=server", "-f", "-")
    forbidden(cluster.kubectl, *tenant, body=body, by="sandkeeper-tenants")
    assert tried(cluster, "open", body)


def test_a_change_is_judged_and_an_old_one_can_still_end(cluster: Installed) -> None:
    admin, name = cluster.kubectl, "grown"
    admin("create", "namespace", name)
    admin("-n", name, "create", "rolebinding", TENANT, "--clusterrole=sandkeeper-edit", f"--user={TENANT}")
    admin("-n", name, "create", "rolebinding", "view", "--clusterrole=sandkeeper-view", f"--user={TENANT}")
    admin("-n", name, "create", "-f", "-", input=json.dumps(manifest("old")))
    admin("label", "namespace", name, "sandkeeper.dev/enforce=restricted")
    patch = ("-n", name, "--as", TENANT, "patch", "sandbox", "old", "--type=merge", "-p")
    host = json.dumps({"spec": {"network": "Host"}})
    # The label acts a moment after it was written.
    eventually(lambda: admin.run(*patch, host, "--dry-run=server").returncode != 0, timeout=60)
    forbidden(admin, *patch, host, by="sandkeeper-tenants")
    admin(*patch, json.dumps({"spec": {"desiredState": "Stopped"}}))
    admin(*patch, json.dumps({"metadata": {"finalizers": ["sandkeeper.dev/shutdown"]}}))
    admin(*patch, json.dumps({"metadata": {"finalizers": None}}))
    admin("-n", name, "--as", TENANT, "delete", "sandbox", "old", "--timeout=30s")


@pytest.mark.parametrize(
    "args",
    [
        pytest.param("-n open patch sandbox idle --subresource=status --type=merge -p {}", id="a status"),
        pytest.param("get sandboxnodes", id="where the shims are"),
        pytest.param("create -f -", id="a node of one's own"),
        pytest.param("patch sandboxnode node-1 --type=merge -p {}", id="a node declared gone"),
        pytest.param("-n default get sandboxes", id="another namespace"),
        pytest.param(
            "label namespace strict sandkeeper.dev/enforce=privileged --overwrite", id="a wider label"
        ),
        pytest.param("delete validatingadmissionpolicybinding sandkeeper-tenants", id="no policy"),
        pytest.param("-n sandkeeper-system get secrets", id="the operator's key"),
        pytest.param("-n sandkeeper-system create token sandkeeper-operator", id="the operator's token"),
    ],
)
def test_a_tenant_has_no_right_to(cluster: Installed, args: str) -> None:
    node = {"apiVersion": "sandkeeper.dev/v1alpha1", "kind": "SandboxNode", "metadata": {"name": "mine"}}
    body = {**node, "spec": {"address": "203.0.113.1:7443"}} if args.endswith("-f -") else None
    forbidden(cluster.kubectl, "--as", TENANT, *args.split(), body=body)


def test_a_tenant_cannot_write_an_assignment(cluster: Installed) -> None:
    tenant = ("-n", "open", "--as", TENANT, "annotate", "--overwrite", "sandbox", "idle")
    new = f'{ASSIGNMENT_ANNOTATION}={{"node":"node-1"}}'
    forbidden(cluster.kubectl, *tenant, new, by="sandkeeper-assignment")
    cluster.kubectl("-n", "open", "annotate", "sandbox", "idle", new)
    forbidden(cluster.kubectl, *tenant, f"{ASSIGNMENT_ANNOTATION}=other", by="sandkeeper-assignment")
    # kubectl replace leaves it out, and the operator puts it back.
    cluster.kubectl(*tenant, f"{ASSIGNMENT_ANNOTATION}-")


@pytest.fixture(scope="module")
def shims(cluster: Installed) -> dict[str, Kubectl]:
    """kubectl with the token that the shim's Pod on a node has, by node."""
    return {node: shim_of(cluster, node) for node in ("node-1", "node-2")}


def shim_of(cluster: Installed, node: str) -> Kubectl:
    return cluster.as_bearer(cluster.shim_token(node), f"shim-{node}")


@pytest.mark.parametrize(
    "args",
    [
        "get sandboxes -A",
        "get sandboxnodes",
        "delete sandboxnode node-1",
        "patch sandboxnode node-1 --subresource=status --type=merge -p {}",
        "-n open patch sandbox idle --type=merge -p {}",
        "-n sandkeeper-system get secrets",
        "-n sandkeeper-system get secret sandkeeper-ca",
        "-n sandkeeper-node get configmap kube-root-ca.crt",
        "-n sandkeeper-node patch configmap sandkeeper-ca --type=merge -p {}",
        "get certificatesigningrequests",
        "get nodes",
        "delete node node-1",
        "get pods -A",
    ],
)
def test_a_stolen_shim_has_no_rights(shims: dict[str, Kubectl], args: str) -> None:
    forbidden(shims["node-1"], *args.split())


@pytest.fixture(scope="module")
def generous(cluster: Installed, shims: dict[str, Kubectl]) -> Installed:
    """Somebody gave the shims' account all rights on our kinds: now the policy alone stands."""
    resources = [
        f"{kind}.sandkeeper.dev{sub}" for kind in ("sandboxes", "sandboxnodes") for sub in ("", "/status")
    ]
    rights = ("--verb=get,list,create,update,patch,delete", f"--resource={','.join(resources)}")
    cluster.kubectl("create", "clusterrole", "generous", *rights)
    account = f"--serviceaccount={NODE}:{SHIM_ACCOUNT}"
    cluster.kubectl("create", "clusterrolebinding", "generous", "--clusterrole=generous", account)
    eventually(lambda: shims["node-1"].run("get", "sandboxnodes").returncode == 0, timeout=60)
    node_2 = {"apiVersion": "sandkeeper.dev/v1alpha1", "kind": "SandboxNode", "metadata": {"name": "node-2"}}
    closed = {**node_2, "spec": {"address": "127.0.0.1:1", "serverName": "node-2", "unschedulable": True}}
    cluster.kubectl("create", "-f", "-", input=json.dumps(closed))
    return cluster


@pytest.mark.usefixtures("generous")
def test_a_shim_may_write_its_own_node(shims: dict[str, Kubectl]) -> None:
    shim = shims["node-1"]
    shim("patch", "sandboxnode", "node-1", "--type=merge", "-p", '{"metadata":{"labels":{"zone":"a"}}}')
    shim(
        "patch",
        "sandboxnode",
        "node-1",
        "--subresource=status",
        "--type=merge",
        "-p",
        '{"status":{"version":"1"}}',
    )


@pytest.mark.parametrize(
    "args",
    [
        pytest.param("patch sandboxnode node-1 --type=merge -p %s", id="another's node"),
        pytest.param(
            "patch sandboxnode node-1 --subresource=status --type=merge -p %s", id="another's status"
        ),
        pytest.param("patch sandboxnode node-2 --type=merge -p %s", id="its own declared gone"),
        pytest.param("patch sandboxnode node-2 --type=merge -p %s", id="its own opened"),
        pytest.param("patch sandboxnode node-2 --type=merge -p %s", id="another's certificate for its own"),
        pytest.param("patch sandboxnode node-2 --type=merge -p %s", id="a label kept for administrators"),
        pytest.param("delete sandboxnode node-2", id="its own deleted"),
        pytest.param("-n open patch sandbox idle --type=merge -p %s", id="a Sandbox"),
        pytest.param(
            "-n open patch sandbox idle --subresource=status --type=merge -p %s", id="a Sandbox's status"
        ),
        pytest.param("-n open delete sandbox idle", id="a Sandbox deleted"),
    ],
)
@pytest.mark.usefixtures("generous")
def test_a_stolen_shim_is_held_by_the_policy(
    shims: dict[str, Kubectl], args: str, request: pytest.FixtureRequest
) -> None:
    spec: Object = {"metadata": {"labels": {"zone": "b"}}}
    case = request.node.callspec.id
    if "declared gone" in case:
        spec = {"spec": {"outOfService": True}}
    if "opened" in case:
        spec = {"spec": {"unschedulable": False}}
    if "certificate" in case:
        spec = {"spec": {"serverName": "node-1"}}
    if "label" in case:
        spec = {"metadata": {"labels": {"node-restriction.kubernetes.io/team": "a"}}}
    words = [json.dumps(spec) if word == "%s" else word for word in args.split()]
    forbidden(shims["node-2"], *words, by="sandkeeper-nodes")


@pytest.mark.parametrize("name", ["node-1", "node-9"])
def test_a_stolen_shim_registers_no_other_node(shims: dict[str, Kubectl], name: str) -> None:
    """With the rights that are shipped."""
    body = {
        "apiVersion": "sandkeeper.dev/v1alpha1",
        "kind": "SandboxNode",
        "metadata": {"name": name},
        "spec": {"address": "203.0.113.1:7443", "serverName": "node-2"},
    }
    apply = ("apply", "--server-side", "--force-conflicts", "--validate=ignore", "-f", "-")
    forbidden(shims["node-2"], *apply, body=body, by="sandkeeper-nodes")


def test_a_token_of_no_node_writes_no_node(generous: Installed) -> None:
    loose = generous.as_bearer(generous.token(NODE, SHIM_ACCOUNT), "loose")
    body = '{"metadata":{"labels":{"zone":"c"}}}'
    forbidden(loose, "patch", "sandboxnode", "node-1", "--type=merge", "-p", body, by="sandkeeper-nodes")


@pytest.fixture(scope="module")
def stolen(cluster: Installed) -> Kubectl:
    """kubectl with the operator's token."""
    return cluster.as_bearer(cluster.token(SYSTEM, OPERATOR_ACCOUNT), "stolen")


@pytest.mark.parametrize(
    "args",
    [
        "get secrets -A",
        "get pods -A",
        "get nodes",
        "-n sandkeeper-system create configmap mine",
        "-n sandkeeper-system patch secret sandkeeper-ca --type=merge -p {}",
        "-n sandkeeper-system get secret other",
        "-n sandkeeper-node create secret generic mine",
        "patch sandboxnode node-1 --type=merge -p {}",
        "-n open create -f -",
        "label namespace strict sandkeeper.dev/enforce=privileged --overwrite",
        "-n sandkeeper-node create token sandkeeper-shim",
        "--as system:admin get namespaces",
    ],
)
def test_a_stolen_operator_reaches_nothing_but_sandboxes(stolen: Kubectl, args: str) -> None:
    forbidden(stolen, *args.split(), body=manifest("bad") if args.endswith("-f -") else None)


def test_a_stolen_operator_makes_no_secret_but_its_cas(stolen: Kubectl) -> None:
    create = ("-n", SYSTEM, "create", "--dry-run=server")
    forbidden(stolen, *create, "secret", "generic", "mine", by="sandkeeper-ca")
    annotations = {"kubernetes.io/service-account.name": OPERATOR_ACCOUNT}
    token = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "sandkeeper-ca", "annotations": annotations},
        "type": "kubernetes.io/service-account-token",
    }
    forbidden(stolen, *create, "-f", "-", body=token, by="sandkeeper-ca")
