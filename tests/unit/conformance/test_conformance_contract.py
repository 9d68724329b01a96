"""The contract's page, the rules that the package has of it, and the checks of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sandkeeper.conformance.contract import parse, rules, written
from sandkeeper.conformance.registry import checks

ROOT = Path(__file__).resolve().parents[3]


def test_the_package_has_the_rules_of_the_page() -> None:
    found = parse((ROOT / "docs" / "contract.md").read_text())
    packaged = ROOT / "operator" / "sandkeeper" / "conformance" / "rules.json"
    assert packaged.read_text() == written(found), "make rules"
    assert rules() == found


def test_every_check_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(check.name for check in checks()).items() if count > 1] == []


def test_the_numbers_of_a_section_have_no_gap() -> None:
    by_kind: dict[str, list[int]] = {}
    for rule in rules():
        kind, _, number = rule.number.partition("-")
        by_kind.setdefault(kind, []).append(int(number))
    assert by_kind
    for kind, numbers in by_kind.items():
        assert numbers == list(range(1, len(numbers) + 1)), kind


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("| A-1 | MUST | This. |\n| A-1 | MUST | That. |", "twice"),
        ("| A-1 | MAY | This. |", "no rule"),
        ("| A-1 | MUST |", "no rule"),
    ],
)
def test_a_table_that_is_no_table_of_rules_is_refused(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(page)


def test_a_rule_is_read_with_its_section() -> None:
    (rule,) = parse(
        "## Create\n\n| rule | level | |\n| --- | --- | --- |\n| CREATE-1 | SHOULD | It does. |\n"
    )
    assert (rule.number, rule.level, rule.text, rule.section) == ("CREATE-1", "SHOULD", "It does.", "Create")
