"""The rules of docs/contract.md: read from its tables by `make rules`, and from `rules.json` ever after, so that an
installed command has them too."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass
from importlib.resources import files

_ROW = re.compile(r"\| (?P<number>[A-Z]+-[0-9]+) \| (?P<level>MUST|SHOULD) \| (?P<text>.+) \|")


@dataclass(frozen=True, slots=True)
class Rule:
    """number: `CREATE-2`. level: MUST or SHOULD, as in RFC 2119. section: the heading above it."""

    number: str
    level: str
    text: str
    section: str


@functools.cache
def rules() -> tuple[Rule, ...]:
    """Every rule, in the order of the page."""
    return tuple(Rule(**each) for each in json.loads(files(__package__).joinpath("rules.json").read_text()))


def parse(page: str) -> tuple[Rule, ...]:
    """The rules of a page. Raises ValueError for a number that stands there twice, and for a row of a table that is
    no rule and no heading."""
    found: dict[str, Rule] = {}
    section = ""
    for line in page.splitlines():
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


def written(found: tuple[Rule, ...]) -> str:
    """What `rules.json` holds of them."""
    return json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False) + "\n"
