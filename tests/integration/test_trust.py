"""Certificates by the cluster's own means on a real API server, with the rights that manifests/ give and no other."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from cryptography import x509
from tests.cluster import eventually, leaks_of
from tests.installed import (
    CA,
    MANIFESTS,
    NODE,
    OPERATOR_ACCOUNT,
    SHIM_ACCOUNT,
    SYSTEM,
    Installed,
    built,
    granted,
    installed,
    right,
)
from tests.sandboxes import Object, Sandboxes

from sandkeeper.api import SHIM_SIGNER
from sandkeeper.cli.main import main
from sandkeeper.localcluster.apiserver import Kubectl, free_ports
from sandkeeper.localcluster.cluster import OPERATOR
from sandkeeper.shim.certificate import request_object
from sandkeeper.shim.registration import MANAGER
from sandkeeper.wire import node_pb2, node_pb2_grpc
from sandkeeper.wire.certificates import dns_names, issued_by, new_key, request
from sandkeeper.wire.tls import ClientTLS

pytestmark = [pytest.mark.cluster, pytest.mark.oci, pytest.mark.timeout(580)]

SHORT = 60.0
"""Life of a certificate that a test sees renewed, in seconds. Renewal is due well before its end."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Installed]:
    with installed() as made:
        yield made
        leaks_of(made.local, 0).assert_none()


@pytest.fixture
def operator(cluster: Installed) -> Iterator[Installed]:
    cluster.start_operator()
    try:
        yield cluster
    finally:
        cluster.stop_operator()


def shown(cluster: Installed) -> x509.Certificate:
    """The certificate that the shim shows to who connects now."""
    tls = cluster.local.tls
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.cert, tls.key)
    with socket.create_connection(("127.0.0.1", cluster.local.plan.shim_ports[0]), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="node-1") as line:
            der = line.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


def requests(kubectl: Kubectl) -> list[Object]:
    found: list[Object] = json.loads(kubectl("get", "csr", "-o", "json"))["items"]
    return [each for each in found if each["spec"]["signerName"] == SHIM_SIGNER]


def condition(kubectl: Kubectl, name: str, kind: str) -> Object:
    """The condition of this kind in a request, once it is there."""

    def found() -> Object:
        status = json.loads(kubectl("get", "csr", name, "-o", "json")).get("status", {})
        return next((each for each in status.get("conditions", []) if each["type"] == kind), {})

    return eventually(found, timeout=60)


# A node that nobody prepared


def test_a_node_gets_its_certificate_registers_itself_and_runs_a_sandbox(operator: Installed) -> None:
    admin = operator.kubectl
    admin("delete", "sandboxnode", "node-1")
    labels = {"zone": "a", "node-restriction.kubernetes.io/team": "t", "kubernetes.io/hostname": "host-1"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "labels": labels}}
    admin("create", "-f", "-", input=json.dumps(node))
    shutil.rmtree(operator.local.node_folder(0) / "state" / "certificate")
    try:
        operator.restart_shim(register=True)
        eventually(lambda: admin("get", "sandboxnode", "node-1", check=False), timeout=60)
        made = json.loads(admin("get", "sandboxnode", "node-1", "-o", "json"))
        port = operator.local.plan.shim_ports[0]
        assert made["spec"]["address"] == f"127.0.0.1:{port}"
        assert made["spec"]["serverName"] == "node-1"
        assert made["metadata"]["labels"] == {"zone": "a", "kubernetes.io/hostname": "host-1"}
        admin("wait", "sandboxnode", "node-1", "--for=condition=Ready", "--timeout=60s")
        runs(operator)
        # What an administrator says of a node stays when its shim registers again.
        spec = {"metadata": {"labels": {"pool": "p"}}, "spec": {"unschedulable": True}}
        admin("patch", "sandboxnode", "node-1", "--type=merge", "-p", json.dumps(spec))
        admin("label", "node", "node-1", "zone=b", "--overwrite")
        operator.restart_shim(register=True)
        path = ("get", "sandboxnode", "node-1", "-o", "jsonpath={.metadata.labels.zone}")
        eventually(lambda: admin(*path) == "b", timeout=60)
        made = json.loads(admin("get", "sandboxnode", "node-1", "-o", "json"))
        assert made["spec"]["unschedulable"]
        assert made["metadata"]["labels"]["pool"] == "p"
        # Where nothing changed, nothing is written.
        told, written = registrations(operator), applied(admin)
        operator.restart_shim(register=True)
        eventually(lambda: registrations(operator) > told, timeout=60)
        assert applied(admin) == written
    finally:
        admin("patch", "sandboxnode", "node-1", "--type=merge", "-p", '{"spec":{"unschedulable":null}}')
        admin("delete", "node", "node-1")
        operator.restart_shim()
    assert operator.refused(SHIM_ACCOUNT) == []
    # The API server asks for the right to create itself, where a server-side apply makes an object.
    unseen = {("sandkeeper.dev", "sandboxnodes", "create")}
    assert operator.used(SHIM_ACCOUNT) == granted(built(admin, MANIFESTS), SHIM_ACCOUNT) - unseen


def registrations(cluster: Installed) -> int:
    return [right(each["objectRef"], "")[1] for each in cluster.requests(SHIM_ACCOUNT)].count("sandboxnodes")


def applied(admin: Kubectl) -> list[Object]:
    """What the shim wrote of its SandboxNode, and when the object took it."""
    node = json.loads(admin("get", "sandboxnode", "node-1", "-o", "json", "--show-managed-fields"))
    return [each for each in node["metadata"]["managedFields"] if each["manager"] == MANAGER]


def runs(cluster: Installed) -> None:
    sandboxes = Sandboxes(cluster.kubectl, "default")
    sandboxes.make("box")
    sandboxes.until_ready("box")
    sandboxes.delete("box")
    sandboxes.until_gone("box")


def test_the_certificate_on_the_disk_serves_while_nobody_signs_and_no_api_server_answers(
    cluster: Installed,
) -> None:
    before = shown(cluster)
    try:
        cluster.restart_shim(KUBERNETES__SERVER="https://127.0.0.1:1")
        assert shown(cluster) == before
    finally:
        cluster.restart_shim()
    assert shown(cluster) == before
    folder = cluster.local.node_folder(0) / "state" / "certificate"
    assert {each.stat().st_mode & 0o777 for each in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700


# Rotation


def test_certificates_are_renewed_and_nothing_is_dropped(cluster: Installed, tmp_path: Path) -> None:
    cluster.start_operator(CERTIFICATE_LIFE=str(SHORT))
    sandboxes = Sandboxes(cluster.kubectl, "default")
    try:
        # The certificate of a week would be kept for days.
        shutil.rmtree(cluster.local.node_folder(0) / "state" / "certificate")
        cluster.restart_shim()
        sandboxes.make("box")
        pid = sandboxes.until_ready("box")["status"]["pid"]
        first = shown(cluster)
        with watching(cluster) as events, executing(cluster, tmp_path) as command:
            # Twice, so that one was asked for by a shim with a renewed one.
            second = eventually(lambda: another(cluster, first), timeout=180)
            third = eventually(lambda: another(cluster, second), timeout=180)
            for one, next_ in ((first, second), (second, third)):
                assert next_.not_valid_after_utc > one.not_valid_after_utc
            assert command.poll() is None
            seen = len(events)
            sandboxes.make("other")
            sandboxes.until_ready("other")
            eventually(lambda: len(events) > seen, timeout=60)
            assert command.poll() is None
            (tmp_path / "stop").touch()
            assert command.wait(60) == 7
        assert sandboxes.until_ready("box")["status"]["pid"] == pid
        for name in ("box", "other"):
            sandboxes.delete(name)
            sandboxes.until_gone(name)
    finally:
        cluster.stop_operator()
        shutil.rmtree(cluster.local.node_folder(0) / "state" / "certificate")
        cluster.start_operator()
        cluster.restart_shim()
        cluster.stop_operator()


def another(cluster: Installed, before: x509.Certificate) -> x509.Certificate | None:
    try:
        now = shown(cluster)
    except OSError:  # so slow a machine that the old one has run out
        return None
    return now if now.serial_number != before.serial_number else None


@contextlib.contextmanager
def watching(cluster: Installed) -> Iterator[list[Any]]:
    """What a Watch stream of ours sends; it is still open at the end."""
    events: list[Any] = []
    ended: list[Exception] = []
    address = f"127.0.0.1:{cluster.local.plan.shim_ports[0]}"
    options = [("grpc.ssl_target_name_override", "node-1")]
    channel = grpc.secure_channel(address, ClientTLS(cluster.local.tls).credentials(), options=options)
    with channel, cluster.local.shim(0) as shim:
        listed = shim.list()
        stub: Any = node_pb2_grpc.NodeStub(channel)
        stream = stub.Watch(node_pb2.WatchRequest(epoch=listed.epoch, after_sequence=listed.sequence))

        def follow() -> None:
            try:
                events.extend(iter(stream))
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        try:
            yield events
            assert not ended, "the stream was dropped"
            assert thread.is_alive()
        finally:
            stream.cancel()
            thread.join(30)


@contextlib.contextmanager
def executing(cluster: Installed, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the sandbox `box`, which ends with status 7 when `folder`/stop is there, by its input's end."""
    tls = cluster.local.tls
    argv = [sys.executable, "-c", "from sandkeeper.cli.main import kubectl_plugin as p; p()", "exec"]
    argv += ["-n", "default", "--kubeconfig", str(cluster.local.kubeconfig), "-i", "box"]
    argv += ["--tls-ca", str(tls.ca), "--tls-cert", str(tls.cert), "--tls-key", str(tls.key)]
    argv += ["--", "sh", "-c", "cat >/dev/null; exit 7"]
    command = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    stop = folder / "stop"

    def feed() -> None:
        assert command.stdin is not None
        with contextlib.suppress(BrokenPipeError), command.stdin:
            while command.poll() is None and not stop.exists():
                command.stdin.write(b"x\n")
                command.stdin.flush()
                time.sleep(0.2)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        yield command
    finally:
        stop.touch()
        if command.poll() is None:
            command.kill()
        command.wait(30)
        thread.join(30)


# Requests that must come to nothing


def ask(
    cluster: Installed, kubectl: Kubectl, name: str, node: str, **spec: Any
) -> subprocess.CompletedProcess[str]:
    body = request_object(name, request(new_key(), node))
    body["spec"].update(spec)
    cluster.kubectl("delete", "csr", name, "--ignore-not-found")
    return kubectl.run("create", "-f", "-", input=json.dumps(body))


@pytest.fixture(scope="module")
def thief(cluster: Installed) -> Kubectl:
    """kubectl with the token of node-2's shim."""
    return cluster.as_bearer(cluster.shim_token("node-2"), "thief")


@pytest.mark.parametrize(
    ("node", "spec", "reason"),
    [
        pytest.param("node-1", {}, "WrongSubject", id="another node's name"),
        pytest.param("sandkeeper-operator", {}, "WrongSubject", id="the operator's identity"),
        pytest.param(
            "node-2", {"usages": ["digital signature", "client auth"]}, "WrongUsages", id="the right to call"
        ),
    ],
)
def test_a_stolen_shim_is_denied_with_the_reason(
    operator: Installed, thief: Kubectl, node: str, spec: Object, reason: str
) -> None:
    assert ask(operator, thief, "stolen", node, **spec).returncode == 0
    assert condition(operator.kubectl, "stolen", "Denied")["reason"] == reason


@pytest.mark.parametrize(
    "signer",
    ["kubernetes.io/kube-apiserver-client", "kubernetes.io/kubelet-serving", "sandkeeper.dev/operator"],
)
def test_a_stolen_shim_asks_no_other_signer(cluster: Installed, thief: Kubectl, signer: str) -> None:
    def refused() -> bool:
        answer = ask(cluster, thief, "other-signer", "node-2", signerName=signer)
        return "ValidatingAdmissionPolicy 'sandkeeper-certificates'" in answer.stderr

    eventually(refused, timeout=60)  # policies act a moment after they were made


def test_whoever_is_no_shim_is_denied_and_a_token_of_no_node_is_told_what_it_lacks(
    operator: Installed,
) -> None:
    admin = operator.kubectl
    assert ask(operator, admin, "anybody", "node-1").returncode == 0
    assert condition(admin, "anybody", "Denied")["reason"] == "NotAShim"
    loose = operator.as_bearer(operator.token(NODE, SHIM_ACCOUNT), "loose")
    assert ask(operator, loose, "loose", "node-1").returncode == 0
    denied = condition(admin, "loose", "Denied")
    assert denied["reason"] == "NoNodeName"
    assert "authentication.kubernetes.io/node-name" in denied["message"]


def test_what_an_administrator_approved_by_mistake_is_not_signed(cluster: Installed, thief: Kubectl) -> None:
    assert ask(cluster, thief, "mistaken", "node-1").returncode == 0
    cluster.kubectl("certificate", "approve", "mistaken")
    cluster.start_operator()
    try:
        assert condition(cluster.kubectl, "mistaken", "Failed")["reason"] == "WrongSubject"
    finally:
        cluster.stop_operator()


def test_a_stolen_shim_approves_nothing_and_a_stolen_operator_only_its_signers(
    cluster: Installed, thief: Kubectl
) -> None:
    admin = cluster.kubectl
    assert ask(cluster, thief, "own", "node-2").returncode == 0
    assert "orbidden" in thief.run("certificate", "approve", "own").stderr
    client = {
        "signerName": "kubernetes.io/kube-apiserver-client",
        "usages": ["digital signature", "client auth"],
    }
    assert ask(cluster, admin, "client", "admin", **client).returncode == 0
    stolen = cluster.as_bearer(cluster.token(SYSTEM, OPERATOR_ACCOUNT), "stolen")
    answer = stolen.run("certificate", "approve", "client").stderr
    assert "not permitted to approve requests with signerName" in answer, answer
    for name in ("own", "client"):
        admin("delete", "csr", name)


def test_a_shim_whose_request_is_denied_does_not_listen_and_one_that_is_mended_does(
    operator: Installed,
) -> None:
    """Its Pod is not ready: the port is what the probe looks at."""
    local, before = operator.local, {each["metadata"]["name"] for each in requests(operator.kubectl)}
    folder = local.node_folder(0) / "state" / "certificate"
    local.processes.stop("node-1")
    shutil.rmtree(folder)
    settings = operator.shim_settings()
    token = Path(settings["KUBERNETES__TOKEN_FILE"])
    right = token.read_text()
    token.write_text(operator.shim_token("node-2"))
    local._spawn_shim(0, settings)

    def denied() -> list[str]:
        new = [each for each in requests(operator.kubectl) if each["metadata"]["name"] not in before]
        told = [c["type"] for each in new for c in each.get("status", {}).get("conditions", [])]
        return told if "Denied" in told else []

    eventually(denied, timeout=60)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", local.plan.shim_ports[0]), timeout=10)
    assert local.processes.alive("node-1")
    token.write_text(right)
    local._wait_shim(0)
    assert dns_names(shown(operator)) == ["node-1"]


# An operator that is cut off


@pytest.fixture(scope="module")
def simulated() -> Iterator[Installed]:
    with installed("simulated") as made:
        yield made


def nothing_yet(cluster: Installed) -> None:
    """As before the first operator."""
    local, admin = cluster.local, cluster.kubectl
    local.processes.stop("node-1")
    shutil.rmtree(local.node_folder(0) / "state" / "certificate", ignore_errors=True)
    admin("-n", SYSTEM, "delete", "secret", CA, "--ignore-not-found")
    admin("-n", NODE, "patch", "configmap", CA, "--type=merge", "-p", '{"data":null}')
    admin("delete", "csr", "--all")


def secret(cluster: Installed) -> str:
    return cluster.kubectl("-n", SYSTEM, "get", "secret", CA, "-o", "jsonpath={.data.tls\\.crt}", check=False)


def bundle(cluster: Installed) -> list[x509.Certificate]:
    data = json.loads(cluster.kubectl("-n", NODE, "get", "configmap", CA, "-o", "json")).get("data") or {}
    text = data.get("ca.crt", "")
    return x509.load_pem_x509_certificates(text.encode()) if text else []


def all_is_well(cluster: Installed) -> None:
    """One CA, published; the shim's certificate is of it, and the operator reaches the shim."""
    cluster.take_ca()
    cluster.local._wait_shim(0)
    (authority,) = bundle(cluster)
    assert authority == x509.load_pem_x509_certificate(base64.b64decode(secret(cluster)))
    assert issued_by(shown(cluster), authority)
    cluster.kubectl("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
    signed = [each for each in requests(cluster.kubectl) if each.get("status", {}).get("certificate")]
    assert len(signed) == 1


@pytest.mark.parametrize("effect", ["make_ca", "publish_ca", "approve", "sign"])
@pytest.mark.parametrize("terms", ["1*panic", "1*panic(after)", "1*lose"])
def test_an_operator_that_is_cut_off_is_put_right_by_the_next_pass(
    simulated: Installed, effect: str, terms: str
) -> None:
    local = simulated.local
    nothing_yet(simulated)
    failing = {**simulated.operator_settings(), "FAILPOINTS": json.dumps({effect: terms})}
    local.start_operator(env=failing, ready=False)
    local._spawn_shim(0, simulated.shim_settings())
    try:
        if terms.startswith("1*panic"):
            eventually(lambda: not local.processes.alive(OPERATOR), timeout=60)
            local.start_operator(env=simulated.operator_settings())
        all_is_well(simulated)
    finally:
        simulated.stop_operator()


def test_two_operators_at_once_end_with_one_ca(simulated: Installed) -> None:
    local = simulated.local
    nothing_yet(simulated)
    second = "operator-2"
    settings = {**simulated.operator_settings(), "HTTP_PORT": str(free_ports(1)[0])}
    local.start_operator(env=simulated.operator_settings(), ready=False)
    local._spawn(second, "operator", "SANDKEEPER_OPERATOR_", settings, ())
    local._spawn_shim(0, simulated.shim_settings())
    try:
        all_is_well(simulated)
        # Each of them by itself.
        simulated.stop_operator()
        shutil.rmtree(local.node_folder(0) / "state" / "certificate")
        simulated.restart_shim()
    finally:
        local.processes.stop(second)
        simulated.stop_operator()


def test_a_ca_of_ones_own_is_used_and_then_replaced_while_all_runs(
    simulated: Installed, tmp_path: Path
) -> None:
    """The steps of docs/install.md, "Certificates"."""
    local, admin = simulated.local, simulated.kubectl
    nothing_yet(simulated)
    for name in ("own", "new"):
        assert CliRunner().invoke(main, ["certificates", str(tmp_path / name)]).exit_code == 0
    own, new = tmp_path / "own", tmp_path / "new"
    pair = (f"--cert={own / 'ca.crt'}", f"--key={own / 'ca.key'}")
    admin("-n", SYSTEM, "create", "secret", "tls", CA, *pair)
    # Whoever has certificates of a short life looks at the CA more often.
    local.start_operator(env={**simulated.operator_settings(), "CERTIFICATE_LIFE": "120"}, ready=False)
    local._spawn_shim(0, simulated.shim_settings())
    try:
        all_is_well(simulated)
        old = x509.load_pem_x509_certificate((own / "ca.crt").read_bytes())
        assert bundle(simulated) == [old]
        (tmp_path / "both.crt").write_bytes((new / "ca.crt").read_bytes() + (own / "ca.crt").read_bytes())
        files = {"tls.crt": new / "ca.crt", "tls.key": new / "ca.key", "ca.crt": tmp_path / "both.crt"}
        with watching(simulated):
            replace_ca(admin, files)
            authority = x509.load_pem_x509_certificate((new / "ca.crt").read_bytes())
            eventually(lambda: bundle(simulated) == [authority, old], timeout=120)
            # Ours is still of the old one, which is believed as well.
            local.tls.ca.write_bytes((tmp_path / "both.crt").read_bytes())
            eventually(lambda: issued_by(shown(simulated), authority), timeout=120)
        replace_ca(admin, {**files, "ca.crt": new / "ca.crt"})
        eventually(lambda: bundle(simulated) == [authority], timeout=120)
        admin("wait", "sandboxnodes", "--all", "--for=condition=Ready", "--timeout=60s")
    finally:
        simulated.stop_operator()


def replace_ca(admin: Kubectl, files: dict[str, Path]) -> None:
    flags = ["--type=kubernetes.io/tls", "--dry-run=client", "-o", "yaml"]
    flags += [f"--from-file={key}={path}" for key, path in files.items()]
    made = admin("-n", SYSTEM, "create", "secret", "generic", CA, *flags)
    admin("-n", SYSTEM, "replace", "-f", "-", input=made)
