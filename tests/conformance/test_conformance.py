"""Every rule of docs/contract.md, by its number, against real servers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import pytest
from tests.cluster import eventually
from tests.conformance.shims import ENGINES, REAL, Shims, shims
from tests.conformance.targets import EngineTarget

from sandkeeper.conformance.contract import rules
from sandkeeper.conformance.registry import Check, checks
from sandkeeper.conformance.run import Result, run

CHECKS = checks()

UNOBSERVABLE: dict[str, str] = {}
"""Rules that nobody can check from outside, and why."""


def _marks(engine: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.oci] if engine in REAL else []


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
    outcome = await run(check, await EngineTarget(made, engine).server(check))
    if outcome.result == Result.INAPPLICABLE:
        pytest.skip(outcome.seen)
    if outcome.result == Result.BROKEN:
        raise AssertionError(outcome.seen) from outcome.error
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
