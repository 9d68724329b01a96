"""hack/image.py: with what it builds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HACK = Path(__file__).parents[3] / "hack" / "image.py"


@pytest.fixture
def image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sandkeeper_image", HACK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ({}, "buildah"),
        ({"docker": 0, "podman": 0}, "docker"),
        ({"docker": 1}, "buildah"),  # a client whose daemon is away, or is another machine's
        ({"docker": 1, "podman": 0}, "podman"),
    ],
)
def test_the_image_is_built_with_what_answers(
    image: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, int], chosen: str
) -> None:
    for name, status in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert image.builder() == chosen
