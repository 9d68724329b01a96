"""What is run against which server, and what becomes of a server that goes away."""

from __future__ import annotations

from pathlib import Path

import grpc

from sandkeeper.conformance.between import WITHHELD
from sandkeeper.conformance.contract import rules
from sandkeeper.conformance.registry import WANTING, Ability, Check
from sandkeeper.conformance.run import Result, run_all, why_not
from sandkeeper.conformance.server import Images, Server


class Target:
    """Whatever serves at a path."""

    def __init__(self, path: Path, *abilities: Ability, withheld: dict[str, str] | None = None) -> None:
        self.abilities = frozenset(abilities)
        self.withheld = withheld or {}
        self._path = path

    async def server(self, check: Check) -> Server:
        return Server(f"unix:{self._path}", Images(""))


async def holds(server: Server) -> None: ...


async def breaks(server: Server) -> None:
    raise AssertionError("it does not")


def check(run: object, *needs: Ability) -> Check:
    return Check(("A-1",), run, frozenset(needs))  # type: ignore[arg-type]


def test_a_check_is_not_run_without_what_it_needs_or_where_something_is_in_between(tmp_path: Path) -> None:
    assert why_not(check(holds), Target(tmp_path)) == ""
    assert why_not(check(holds, "local"), Target(tmp_path, "local")) == ""
    assert why_not(check(holds, "local", "restart"), Target(tmp_path, "local")) == WANTING["restart"]
    assert why_not(check(holds), Target(tmp_path, withheld={"A-1": "it cannot"})) == "it cannot"


def test_every_rule_that_is_withheld_is_one() -> None:
    assert set(WITHHELD) <= {rule.number for rule in rules()}


async def test_a_server_that_has_gone_is_not_blamed_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    server = grpc.aio.server()
    server.add_insecure_port(f"unix:{path}")
    await server.start()

    async def ends(_: Server) -> None:
        await server.stop(None)
        raise AssertionError("it ended")

    outcomes = await run_all(
        Target(path), [check(holds), check(breaks), check(holds), check(ends), check(holds)]
    )
    assert [each.result for each in outcomes] == [
        *(Result.KEPT, Result.BROKEN, Result.KEPT, Result.BROKEN),
        Result.INAPPLICABLE,
    ]
    assert "it does not" in outcomes[1].seen
    assert "A-1" in outcomes[4].seen
