"""The layout's traps: things that break far from where they were changed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "operator" / "sandkeeper").rglob("*.py"))


def test_operator_is_a_source_root_and_no_package() -> None:
    """`operator/__init__.py` would shadow the standard library's `operator` and break `import collections`."""
    assert not (ROOT / "operator" / "__init__.py").exists()


def test_the_standard_library_survives_in_the_root_and_in_the_source_root() -> None:
    for cwd in (ROOT, ROOT / "operator"):
        code = "import operator, collections, sandkeeper; assert operator.itemgetter"
        subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, timeout=30)


def test_modules_stay_small() -> None:
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if "_pb2" not in path.name and (lines := len(path.read_text().splitlines())) > 440
    }
    assert not too_long


def test_app_fits_a_screen() -> None:
    assert len((ROOT / "operator/sandkeeper/control/app.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "shell":
            pytest.fail(f"{path}:{node.value.lineno}: shell=")
