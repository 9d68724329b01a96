"""The local cluster's certificates hold what shims, operator and API server look at."""

from __future__ import annotations

import ipaddress
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandkeeper.localcluster.pki import CA, signing_key


@pytest.fixture
def ca(tmp_path: Path) -> CA:
    return CA.create(tmp_path / "pki", "test")


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_a_server_has_its_names_and_may_only_serve(ca: CA) -> None:
    certificate = read(ca.server("node-1", ("node-1", "127.0.0.1")).cert)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-1"]
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("127.0.0.1")]
    assert usages(certificate) == [ExtendedKeyUsageOID.SERVER_AUTH]


def test_a_client_has_user_and_groups_and_may_only_call(ca: CA) -> None:
    certificate = read(ca.client("admin", organizations=("system:masters",)).cert)
    subject = certificate.subject
    assert [a.value for a in subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["admin"]
    assert [a.value for a in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)] == ["system:masters"]
    assert usages(certificate) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_what_it_issues_is_signed_by_it_and_no_authority(ca: CA) -> None:
    certificate = read(ca.server("node-1", ("node-1",)).cert)
    certificate.verify_directly_issued_by(read(ca.cert))
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    assert certificate.not_valid_before_utc < datetime.now(UTC) < certificate.not_valid_after_utc


def test_another_authority_did_not_sign_it(ca: CA, tmp_path: Path) -> None:
    other = CA.create(tmp_path / "other", "test")  # of the same name
    with pytest.raises(Exception):  # noqa: B017, PT011 - InvalidSignature, or ValueError of another key's kind
        read(ca.server("node-1", ("node-1",)).cert).verify_directly_issued_by(read(other.cert))


def test_what_is_there_is_taken(ca: CA) -> None:
    first = ca.server("node-1", ("node-1",))
    before = (ca.cert.read_bytes(), first.cert.read_bytes(), first.key.read_bytes())
    again = CA.create(ca.folder, "test").server("node-1", ("node-1",))
    assert (ca.cert.read_bytes(), again.cert.read_bytes(), again.key.read_bytes()) == before


def test_keys_are_for_their_owner_alone(ca: CA, tmp_path: Path) -> None:
    for key in (ca.key, ca.client("c").key, signing_key(tmp_path / "sa.key")):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_a_key_belongs_to_its_certificate(ca: CA) -> None:
    files = ca.client("c", file="tls")
    key = load_pem_private_key(files.key.read_bytes(), password=None)
    assert key.public_key() == read(files.cert).public_key()
    assert files.cert.name == "tls.crt"


def test_the_service_accounts_key_is_of_the_kind_that_the_api_server_reads(tmp_path: Path) -> None:
    path = signing_key(tmp_path / "sa.key")
    assert path.read_text().startswith("-----BEGIN EC PRIVATE KEY-----")
    before = path.read_bytes()
    assert signing_key(path).read_bytes() == before
