"""The rules of docs/contract.md, read from its tables: the one source of what is checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contract.md"

_ROW = re.compile(r"\| (?P<number>[A-Z]+-[0-9]+) \| (?P<level>MUST|SHOULD) \| (?P<text>.+) \|")


@dataclass(frozen=True, slots=True)
class Rule:
    """number: `CREATE-2`. level: MUST or SHOULD, as in RFC 2119. section: the heading above it."""

    number: str
    level: str
    text: str
    section: str


def rules(page: str | None = None) -> tuple[Rule, ...]:
    """Every rule in the order of the page (default: docs/contract.md). Raises ValueError for a number that stands
    there twice, and for a row of a table that is no rule and no heading."""
    found: dict[str, Rule] = {}
    section = ""
    for line in (PAGE.read_text() if page is None else page).splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("|") and not line.startswith(("| rule |", "| --- |")):
            row = _ROW.fullmatch(line)
            if row is None:
                raise ValueError(f"no rule: {line}")
            if row["number"] in found:
                raise ValueError(f"{row['number']} stands there twice")
            found[row["number"]] = Rule(row["number"], row["level"], row["text"], section)
    return tuple(found.values())
