"""From the outcomes of checks to a verdict on every rule, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandkeeper.conformance.contract import Rule
from sandkeeper.conformance.run import Outcome, Result

WIDTH = 150
"""Characters of what was seen that a table shows, but for a wide one."""
UNCHECKED = "no check of it could be run"


@dataclass(frozen=True, slots=True)
class Verdict:
    """seen: a line for each check that says the most."""

    rule: Rule
    result: Result
    seen: tuple[str, ...]


def verdicts(rules: Iterable[Rule], outcomes: Sequence[Outcome]) -> tuple[Verdict, ...]:
    """A rule is broken where one of its checks found it broken, kept where one at least found it kept."""
    return tuple(
        _verdict(rule, [each for each in outcomes if rule.number in each.check.rules]) for rule in rules
    )


def _verdict(rule: Rule, outcomes: Sequence[Outcome]) -> Verdict:
    for result in (Result.BROKEN, Result.KEPT):
        found = [each for each in outcomes if each.result == result]
        if found:
            return Verdict(rule, result, tuple(_line(each) for each in found))
    reasons = dict.fromkeys(each.seen for each in outcomes)  # each once
    return Verdict(rule, Result.INAPPLICABLE, tuple(reasons) or (UNCHECKED,))


def _line(outcome: Outcome) -> str:
    if outcome.result == Result.BROKEN:
        return f"not that {outcome.check.sentence}: {outcome.seen}"
    return f"{outcome.check.sentence} ({outcome.seen})" if outcome.seen else outcome.check.sentence


def failed(found: Iterable[Verdict]) -> bool:
    """Whether a MUST is broken."""
    return any(each.result == Result.BROKEN and each.rule.level == "MUST" for each in found)


def counts(found: Sequence[Verdict]) -> Mapping[Result, int]:
    return {result: sum(each.result == result for each in found) for result in Result}


def summary(found: Sequence[Verdict]) -> str:
    """`93 rules: 90 kept, 0 broken, 3 not applicable`."""
    return f"{len(found)} rules: " + ", ".join(f"{count} {result}" for result, count in counts(found).items())


def table(found: Sequence[Verdict], *, wide: bool = False) -> str:
    """A line for each rule. wide: and below it what it says, and all that was seen; else the first of what was."""
    rows = [("RULE", "LEVEL", "RESULT", "SEEN")]
    for each in found:
        more = len(each.seen) - 1
        first = each.seen[0]
        if not wide:
            first = _cut(first) + (f" [and {more} more]" if more else "")
        rows.append((each.rule.number, each.rule.level, str(each.result), first))
        if wide:
            rows += [("", "", "", line) for line in each.seen[1:]]
            rows.append(("", "", "", f"The rule: {each.rule.text}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip()
        for row in rows
    )


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def document(found: Sequence[Verdict], about: Mapping[str, Any]) -> dict[str, Any]:
    """For -o json. about: what was checked."""
    return {
        **about,
        "summary": {str(result): count for result, count in counts(found).items()},
        "rules": [
            {
                "rule": each.rule.number,
                "level": each.rule.level,
                "section": each.rule.section,
                "text": each.rule.text,
                "result": str(each.result),
                "seen": list(each.seen),
            }
            for each in found
        ],
    }
