"""Runs checks against a server, one after another, and says how each ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import grpc

from sandkeeper.conformance.observed import Inapplicable, explain, shorten
from sandkeeper.conformance.registry import WANTING, Ability, Check
from sandkeeper.conformance.server import Server
from sandkeeper.wire.errors import ShimError

CHECK_SECONDS = 100.0


class Result(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    INAPPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one check. seen: what was seen of the server; where it is not applicable, why."""

    check: Check
    result: Result
    seen: str
    error: BaseException | None = None


class Target(Protocol):
    """What is checked."""

    @property
    def abilities(self) -> frozenset[Ability]: ...

    @property
    def withheld(self) -> Mapping[str, str]:
        """Rules that it cannot be asked to keep, and why."""

    async def server(self, check: Check) -> Server:
        """The server to run a check against."""


async def run_all(
    target: Target, checks: Iterable[Check], progress: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Every check, in order. progress: called with each outcome as it comes."""
    outcomes = []
    gone = ""
    for check in checks:
        reason = gone or why_not(check, target)
        if reason:
            outcome = Outcome(check, Result.INAPPLICABLE, reason)
        else:
            outcome = await run(check, await target.server(check))
            if outcome.result == Result.BROKEN and not await _answers(await target.server(check)):
                gone = f"the server has not answered since the check of {'/'.join(check.rules)}"
        progress(outcome)
        outcomes.append(outcome)
    return outcomes


async def _answers(server: Server) -> bool:
    async with server:
        return await server.answers()


def why_not(check: Check, target: Target) -> str:
    """Why this check cannot be run against this target; empty where it can."""
    for number in check.rules:
        if number in target.withheld:
            return target.withheld[number]
    return next((WANTING[need] for need in sorted(check.needs - target.abilities)), "")


async def run(check: Check, server: Server) -> Outcome:
    """One check, what it made being shut down at the end."""
    if not __debug__:
        raise RuntimeError("the checks are asserts, which python -O leaves out")
    outcome: Outcome | None = None
    try:
        async with server:
            outcome = await _tried(check, server)
    except TimeoutError as error:  # by leaving the server
        if outcome is None or outcome.result != Result.BROKEN:
            left = f"what was made there cannot be shut down ({server.calls})"
            outcome = Outcome(check, Result.BROKEN, left, error)
    return outcome


async def _tried(check: Check, server: Server) -> Outcome:
    try:
        async with asyncio.timeout(CHECK_SECONDS):
            await check.run(server)
    except Inapplicable as reason:
        return Outcome(check, Result.INAPPLICABLE, str(reason))
    except Exception as error:
        return Outcome(check, Result.BROKEN, f"{_said(error)} ({server.calls})", error)
    return Outcome(check, Result.KEPT, str(server.calls))


def _said(error: Exception) -> str:
    match error:
        case AssertionError():
            return " ".join(explain(error).split())
        case ShimError():
            return f"{error.code.name}: {shorten(error.message)}"
        case grpc.aio.AioRpcError():
            return f"{error.code().name}: {shorten(error.details() or '')}"
        case TimeoutError():
            return f"not over within {CHECK_SECONDS:g} s"
    return f"{type(error).__name__}: {shorten(str(error))}"
