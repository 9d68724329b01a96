"""An engine that could not be opened says why, and can be closed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandkeeper.shim.engines.base import EngineError
from sandkeeper.shim.engines.oci import engine as module
from sandkeeper.shim.engines.oci.engine import OCIEngine
from sandkeeper.shim.engines.oci.options import Options


class NoImages:
    async def open(self) -> None:
        raise EngineError("NodeUnsupported", "no images")

    async def close(self) -> None:
        pass

    async def ensure(self, *_: Any) -> Any:
        raise NotImplementedError

    async def collect(self, in_use: frozenset[str]) -> None:
        raise NotImplementedError


async def test_an_engine_that_did_not_open_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.shutil, "which", lambda *_a, **_k: "/bin/true")
    engine = OCIEngine(Options(root_dir=tmp_path), images=NoImages())
    with pytest.raises(EngineError, match="no images"):
        await engine.open()
    await engine.close()
