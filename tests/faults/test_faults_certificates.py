"""F16: certificates run out, are renewed, and change their CA, while everything runs."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.cluster import condition_of, eventually
from tests.faults.network import Network, Trial, broken_network, running, sandbox
from tests.faults.tcpproxy import TcpProxy
from tests.faults.workload import RUNNING, Workload
from tests.histories import Object

from sandkeeper.localcluster.cluster import OPERATOR
from sandkeeper.localcluster.pki import CA
from sandkeeper.wire.tls import OPERATOR_IDENTITY, TLSFiles

pytestmark = [pytest.mark.cluster, pytest.mark.fault("F16")]
THOROUGH = pytest.mark.thorough

NODE = "node-1"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with broken_network() as made:
        yield made


@pytest.fixture
def trial(network: Network) -> Iterator[Trial]:
    """Every certificate is as it was afterwards."""
    folder = network.local.folder / "pki" / "sandkeeper"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with network.trial() as made:
        try:
            yield made
        finally:
            for path, content in before.items():
                replace(path, content)
            cut_lines(network)


def replace(path: Path, content: bytes) -> None:
    """As a rotation does it: nobody ever sees half a file."""
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_bytes(content)
    fresh.replace(path)


def renew(
    files: TLSFiles,
    *,
    valid: tuple[float, float] = (-3600, 3600),
    ca: CA | None = None,
    name: str = "",
) -> None:
    """Replaces a certificate and its key by others that say the same.

    valid: from when until when, in seconds from now. ca: another issuer. name: another name than before.
    """
    before = x509.load_pem_x509_certificate(files.cert.read_bytes())
    issuer = CA(files.ca.parent) if ca is None else ca
    authority = x509.load_pem_x509_certificate(issuer.cert.read_bytes())
    signing = serialization.load_pem_private_key(issuer.key.read_bytes(), password=None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(before.subject)
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(seconds=valid[0]))
        .not_valid_after(now + timedelta(seconds=valid[1]))
    )
    for extension in before.extensions:
        value = extension.value
        if isinstance(value, x509.AuthorityKeyIdentifier):
            value = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
        if isinstance(value, x509.SubjectAlternativeName) and name:
            value = x509.SubjectAlternativeName([x509.DNSName(name)])
        builder = builder.add_extension(value, critical=extension.critical)
    pem = serialization.Encoding.PEM
    # The key first: whoever reads in between finds a pair that does not match, and must read again.
    replace(
        files.key,
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    replace(files.cert, builder.sign(signing, hashes.SHA256()).public_bytes(pem))


EXPIRED = (-7200.0, -3600.0)


def shim_files(network: Network, node: str = NODE) -> TLSFiles:
    folder = network.local.folder / "pki" / "sandkeeper"
    return TLSFiles(folder / "ca.crt", folder / f"{node}.crt", folder / f"{node}.key")


def cut_lines(network: Network) -> None:
    """Whoever was connected has to show a certificate again."""
    for line in network.lines:
        line.cut()
        line.heal()


def refused(server: str, files: TLSFiles) -> bool:
    """The API server knows nobody by this certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(files.cert, files.key)
    try:
        with urllib.request.urlopen(f"{server}/api", timeout=10, context=context):  # noqa: S310 - https
            return False
    except urllib.error.HTTPError as error:
        error.close()
        return error.code in (401, 403)


def was_refused(port: int) -> bool:
    """An operator, with HTTP on this port, was."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return 'code="401"' in answer.read().decode()


def unreachable(body: Object) -> bool:
    return condition_of(body, "Ready")["reason"] == "NodeUnreachable"


def relist_ages(network: Network) -> list[float]:
    """Seconds since each node has answered the operator last."""
    lines = network.local.operator_get("/metrics").splitlines()
    ages = [line for line in lines if line.startswith("sandkeeper_node_relist_age_seconds{")]
    assert len(ages) == len(network.local.nodes)
    return [float(line.rpartition(" ")[2]) for line in ages]


def nodes_ready(network: Network) -> bool:
    listed = json.loads(network.kubectl("get", "sandboxnodes", "-o", "json"))["items"]
    return all(condition_of(node, "Ready").get("status") == "True" for node in listed)


def test_certificates_that_are_renewed_cut_no_stream(trial: Trial) -> None:
    network = trial.network
    work = Workload(trial)
    work.begin()
    accepted = [line.accepted for line in network.lines]
    for node in network.local.nodes:
        renew(shim_files(network, node))
    renew(network.local.tls)
    work.go_on()
    work.assert_right()
    assert [line.accepted for line in network.lines] == accepted


@pytest.mark.parametrize("whose", ["shim", "operator", pytest.param("wrong name", marks=THOROUGH)])
def test_a_certificate_that_has_run_out_is_replaced_while_all_runs(trial: Trial, whose: str) -> None:
    network = trial.network
    trial.make(sandbox("one", nodeName=NODE))
    pid = trial.until("one", running)["status"]["pid"]
    processes = network.local.status()
    files = shim_files(network) if whose == "shim" else network.local.tls
    if whose == "wrong name":
        renew(files, name="somebody-else")
    else:
        renew(files, valid=EXPIRED)
    cut_lines(network)
    trial.until("one", unreachable)
    trial.make(sandbox("two", nodeName=NODE))
    trial.until("two", lambda body: bool(body) and body["status"]["observedGeneration"] > 0)
    assert not running(trial.get("two"))
    renew(files, name=OPERATOR_IDENTITY if whose == "wrong name" else "")
    trial.until("one", running)
    trial.oracle().assert_right({"one": RUNNING, "two": RUNNING})
    assert trial.get("one")["status"]["pid"] == pid
    assert network.local.status() == processes, "nobody was started anew"


@THOROUGH
def test_the_ca_is_replaced_in_the_four_steps_that_keep_everybody_connected(trial: Trial) -> None:
    network, certificate = trial.network, trial.network.local.tls.ca
    new = CA.create(network.local.folder / "new-ca", "the next CA")
    old = certificate.read_bytes()

    def step() -> None:
        cut_lines(network)
        cut = time.monotonic()
        eventually(lambda: time.monotonic() - cut > max(relist_ages(network)), timeout=60)

    work = Workload(trial)
    work.begin()
    replace(certificate, old + new.cert.read_bytes())
    step()
    for node in network.local.nodes:
        renew(shim_files(network, node), ca=new)
    step()
    renew(network.local.tls, ca=new)
    step()
    replace(certificate, new.cert.read_bytes())
    step()
    work.go_on()
    work.assert_right()
    eventually(lambda: nodes_ready(network), timeout=60)


def test_an_api_server_whose_certificate_has_run_out_is_waited_for(trial: Trial) -> None:
    api = trial.network.api
    files = api.ca.server("apiproxy", ("127.0.0.1", "localhost"))
    work = Workload(trial)
    work.begin()
    renew(files, valid=EXPIRED)
    api.present(files)
    api.down()
    api.up()
    work.go_on()
    renew(files)
    api.present(files)
    work.assert_right()


@THOROUGH
def test_an_operator_whose_own_certificate_has_run_out_goes_on_when_its_kubeconfig_is_renewed(
    trial: Trial,
) -> None:
    """Past the proxy: the API server itself refuses the certificate, with 401."""
    local = trial.network.local
    kubernetes = CA(local.folder / "pki" / "kubernetes")
    lasting = kubernetes.client("short-lived", organizations=("system:masters",))
    document = yaml.safe_load(local.kubeconfig.read_text())
    server = document["clusters"][0]["cluster"]
    with TcpProxy(int(server["server"].rpartition(":")[2])) as line:
        server["server"] = f"https://{line.address}"
        document["users"][0]["user"] = {
            "client-certificate": str(lasting.cert),
            "client-key": str(lasting.key),
        }
        kubeconfig = local.folder / "short-lived.kubeconfig"
        kubeconfig.write_text(yaml.safe_dump(document))
        local.processes.stop(OPERATOR)
        renew(lasting, valid=(-3600, 30))  # long enough for an operator to start with it
        try:
            with trial.network.another_operator(kubeconfig=kubeconfig) as port:
                trial.make(sandbox("before"))
                trial.until("before", running)
                eventually(lambda: refused(server["server"], lasting), timeout=60)
                trial.make(sandbox("meanwhile"))
                line.cut()  # the watch as well has to begin anew
                line.heal()
                eventually(lambda: was_refused(port), timeout=60)
                assert not running(trial.get("meanwhile"))
                renew(lasting)
                trial.until("meanwhile", running)
                trial.make(sandbox("after"))
                trial.until("after", running)
        finally:
            local.start_operator()
    names = ("before", "meanwhile", "after")
    trial.oracle().assert_right(dict.fromkeys(names, RUNNING))
