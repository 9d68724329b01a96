"""`sandkeeper certificates`: operator and shims trust each other by it, and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509

from sandkeeper.cli.main import main


def make(folder: Path, *nodes: str) -> Path:
    result = CliRunner().invoke(main, ["certificates", str(folder), *nodes])
    assert result.exit_code == 0, result.output
    return folder


def names(path: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found.get_values_for_type(x509.DNSName)


def test_every_party_has_three_files_and_its_name(tmp_path: Path) -> None:
    long = ".".join(["node" * 10] * 4)
    pki = make(tmp_path / "pki", "node-1", long)
    assert names(pki / "operator" / "tls.crt") == ["sandkeeper-operator"]
    assert names(pki / "node-1" / "node.crt") == ["node-1"]
    assert names(pki / long / "node.crt") == [long]
    for party in ("operator", "node-1", long):
        assert (pki / party / "ca.crt").read_bytes() == (pki / "ca.crt").read_bytes()
        assert len(list((pki / party).iterdir())) == 3
    loose = [path for path in pki.rglob("*") if path.stat().st_mode & 0o077]
    assert loose == []


def test_again_makes_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    pki = make(tmp_path, "node-1")
    before = {path: path.read_bytes() for path in pki.rglob("*") if path.is_file()}
    make(tmp_path, "node-1", "node-2")
    assert all(path.read_bytes() == content for path, content in before.items())
    issuer = x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes())
    x509.load_pem_x509_certificate((pki / "node-2" / "node.crt").read_bytes()).verify_directly_issued_by(
        issuer
    )


@pytest.mark.parametrize("name", ["operator", "../elsewhere", "Node", ""])
def test_what_cannot_be_a_node_is_refused(tmp_path: Path, name: str) -> None:
    result = CliRunner().invoke(main, ["certificates", str(tmp_path / "pki"), name])
    assert result.exit_code == 2
    assert not (tmp_path / "pki").exists()
