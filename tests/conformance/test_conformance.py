"""Every rule of docs/contract.md, by its number, against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from tests.cluster import eventually
from tests.conformance.contract import rules
from tests.conformance.registry import Check, checks
from tests.conformance.server import Inapplicable
from tests.conformance.shims import ENGINES, OF_ITS_OWN, Shims, shims

CHECKS = checks()

CHECK_SECONDS = 100.0

UNOBSERVABLE: dict[str, str] = {}
"""Rules that nobody can check from outside, and why."""


def _marks(engine: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.oci] if engine == "oci" else []


@pytest.fixture(scope="module")
def nodes() -> Iterator[Callable[[str], Shims]]:
    """The shims of an engine; no parameter, for pytest would group by check and start them anew for each."""
    with contextlib.ExitStack() as closing:
        yield functools.cache(lambda engine: closing.enter_context(shims(engine)))


@pytest.mark.parametrize(
    ("engine", "check"),
    [
        pytest.param(engine, check, id=f"{engine}-{check.name}", marks=_marks(engine))
        for engine, abilities in ENGINES.items()
        for check in CHECKS
        if check.needs <= abilities
    ],
)
async def test_the_rule_is_kept(nodes: Callable[[str], Shims], engine: str, check: Check) -> None:
    made = nodes(engine)
    async with await made.server(own=bool(check.needs & OF_ITS_OWN)) as server:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                await check.run(server)
        except Inapplicable as reason:
            pytest.skip(str(reason))
    eventually(lambda: not made.files(), seen=made.files)


def test_every_rule_has_a_check() -> None:
    """One at least that some server here can be asked to keep."""
    checked = {
        number
        for check in CHECKS
        if any(check.needs <= abilities for abilities in ENGINES.values())
        for number in check.rules
    }
    numbers = {rule.number for rule in rules()}
    assert numbers - checked == set(UNOBSERVABLE)
    assert checked - numbers == set()


def test_every_check_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(check.name for check in CHECKS).items() if count > 1] == []


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
        rules(page)


def test_a_rule_is_read_with_its_section() -> None:
    (rule,) = rules(
        "## Create\n\n| rule | level | |\n| --- | --- | --- |\n| CREATE-1 | SHOULD | It does. |\n"
    )
    assert (rule.number, rule.level, rule.text, rule.section) == ("CREATE-1", "SHOULD", "It does.", "Create")
