#!/usr/bin/env python3
"""Writes the rules of docs/contract.md into the package: `make rules`."""

import sys
from pathlib import Path

from sandkeeper.conformance.contract import parse, written

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "operator" / "sandkeeper" / "conformance" / "rules.json"

TARGET.write_text(written(parse((ROOT / "docs" / "contract.md").read_text())))
sys.stdout.write(f"wrote {TARGET.relative_to(ROOT)}\n")
