"""From outcomes to verdicts, and what a table, a document and a failed assert say."""

from __future__ import annotations

import json

import pytest

from sandkeeper.conformance import report
from sandkeeper.conformance.contract import Rule
from sandkeeper.conformance.observed import Calls, explain
from sandkeeper.conformance.registry import Check
from sandkeeper.conformance.run import Outcome, Result
from sandkeeper.conformance.server import Server, about

KEPT, BROKEN, INAPPLICABLE = Result.KEPT, Result.BROKEN, Result.INAPPLICABLE
MUST = Rule("A-1", "MUST", "It must.", "All")
SHOULD = Rule("A-2", "SHOULD", "It should.", "All")


async def it_does(server: Server) -> None: ...


def outcome(result: Result, seen: str = "", *rules: str) -> Outcome:
    return Outcome(Check(rules or ("A-1",), it_does, frozenset()), result, seen)


@pytest.mark.parametrize(
    ("outcomes", "result", "seen"),
    [
        ([], INAPPLICABLE, (report.UNCHECKED,)),
        ([outcome(KEPT, "x", "A-2")], INAPPLICABLE, (report.UNCHECKED,)),
        ([outcome(KEPT, "Start OK")], KEPT, ("it does (Start OK)",)),
        ([outcome(KEPT)], KEPT, ("it does",)),
        ([outcome(KEPT, "x"), outcome(INAPPLICABLE, "no")], KEPT, ("it does (x)",)),
        ([outcome(INAPPLICABLE, "no"), outcome(INAPPLICABLE, "no")], INAPPLICABLE, ("no",)),
        ([outcome(KEPT), outcome(BROKEN, "why"), outcome(KEPT)], BROKEN, ("not that it does: why",)),
        ([outcome(KEPT, "x", "A-2", "A-1")], KEPT, ("it does (x)",)),
    ],
)
def test_a_rule_is_as_its_checks_are(outcomes: list[Outcome], result: Result, seen: tuple[str, ...]) -> None:
    (verdict,) = report.verdicts([MUST], outcomes)
    assert (verdict.result, verdict.seen) == (result, seen)


def test_only_a_broken_must_fails() -> None:
    assert not report.failed(report.verdicts([MUST, SHOULD], [outcome(BROKEN, "", "A-2")]))
    assert report.failed(report.verdicts([MUST, SHOULD], [outcome(BROKEN, "", "A-1")]))


def test_a_table_has_a_line_for_each_rule() -> None:
    found = report.verdicts([MUST, SHOULD], [outcome(KEPT, "y" * 500), outcome(KEPT, "x")])
    lines = report.table(found).splitlines()
    assert lines[0].split() == ["RULE", "LEVEL", "RESULT", "SEEN"]
    assert [line.split()[:3] for line in lines[1:]] == [["A-1", "MUST", "kept"], ["A-2", "SHOULD", "not"]]
    assert lines[1].endswith("... [and 1 more]")
    wide = report.table(found, wide=True)
    assert "y" * 500 in wide
    assert "The rule: It must." in wide
    assert report.summary(found) == "2 rules: 1 kept, 0 broken, 1 not applicable"


def test_a_document_has_all_that_was_seen() -> None:
    found = report.verdicts([MUST], [outcome(BROKEN, "why")])
    assert json.loads(json.dumps(report.document(found, {"address": "unix:/x"}))) == {
        "address": "unix:/x",
        "summary": {"kept": 0, "broken": 1, "not applicable": 0},
        "rules": [
            {
                "rule": "A-1",
                "level": "MUST",
                "section": "All",
                "text": "It must.",
                "result": "broken",
                "seen": ["not that it does: why"],
            }
        ],
    }


def test_an_assert_says_what_its_names_were() -> None:
    # Compiled, for pytest gives the asserts of a test a message of its own.
    names: dict[str, object] = {"found": "three", "record": type("Record", (), {"state": 3})}
    with pytest.raises(AssertionError) as caught:
        exec(compile("assert found == record.state", __file__, "exec"), names)  # noqa: S102
    assert explain(caught.value).startswith("not so at test_conformance_report.py:1")


def test_an_assert_of_the_package_is_found_in_its_source() -> None:
    from sandkeeper.conformance import rules_auth

    with pytest.raises(AssertionError) as caught:
        rules_auth._clients(Server("unix:/nowhere", images=None))  # type: ignore[arg-type]
    said = explain(caught.value)
    assert "rules_auth.py:" in said
    assert said.endswith("server.clients is not None; server.clients is None")


def test_a_message_is_kept_and_says_of_which_case_it_is() -> None:
    with pytest.raises(AssertionError, match="Stop: it did not"):
        with about("Stop"):
            raise AssertionError("it did not")


def test_calls_are_counted_in_the_order_of_their_first() -> None:
    calls = Calls()
    for call, code in (("Create", "OK"), ("Start", "NOT_FOUND"), ("Create", "OK")):
        calls.ended(call, code)
    assert str(calls) == "Create OK 2 times, Start NOT_FOUND"
