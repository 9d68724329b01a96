#!/usr/bin/env python3
"""Writes crds/ and docs/reference.md from the pydantic models: `make crds`."""

import sys
from pathlib import Path

from sandkeeper.api.generate import write

for name in write(Path(__file__).resolve().parents[1]):
    sys.stdout.write(f"wrote {name}\n")
