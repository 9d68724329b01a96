"""Faults on command, in containerd's failpoint grammar, one line per engine method.

    TERM[->TERM]...        TERM: [COUNT*]ACTION[(ARG)]

Each call of the method uses up one count of the first term that has any left; a term without a count never ends;
after the last term the method works. Actions:

    off              works
    error(MESSAGE)   fails with EngineError `Failpoint`, retryable, before any effect
    delay(SECONDS)   works after a while
    hang             never answers, until it is cancelled; no effect
    lose(MESSAGE)    works, and the caller gets the error: a lost reply
    panic            ends the shim as kill -9 does, before the effect; panic(after): after it

Source: containerd pkg/failpoint/fail.go. Ours: hang, lose, seconds for milliseconds, and counts may be left out.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sandkeeper.shim.engines.base import EngineError

_TERM = re.compile(r"(?:([0-9]+)\*)?([a-z]+)(?:\(([^()]*)\))?")
_ACTIONS = frozenset({"off", "error", "delay", "hang", "lose", "panic"})
_KILLED = 137


@dataclass(slots=True)
class Term:
    """One term; `left` is None for ever."""

    left: int | None
    action: str
    argument: str


def parse(method: str, text: str) -> list[Term]:
    """Raises ValueError naming the method and the term at fault."""
    terms: list[Term] = []
    position = 0
    while True:
        found = _TERM.match(text, position)
        if found is None or (found.end() != len(text) and not text.startswith("->", found.end())):
            raise _wrong(method, text[position:], "must be [COUNT*]ACTION[(ARG)], joined by `->`")
        terms.append(_term(method, found))
        if found.end() == len(text):
            return terms
        if terms[-1].left is None:
            raise _wrong(method, found[0], "without a count it never ends: it must be the last")
        position = found.end() + len("->")


def _term(method: str, found: re.Match[str]) -> Term:
    count, action, argument = found[1], found[2], found[3] or ""
    if action not in _ACTIONS:
        raise _wrong(method, found[0], f"action must be one of {', '.join(sorted(_ACTIONS))}")
    if count is not None and int(count) == 0:
        raise _wrong(method, found[0], "count must be at least 1")
    if action == "delay" and not _is_seconds(argument):
        raise _wrong(method, found[0], "delay needs seconds, such as delay(0.5)")
    if (action in ("off", "hang") and argument) or (action == "panic" and argument not in ("", "after")):
        raise _wrong(method, found[0], f"{action} takes no such argument")
    return Term(None if count is None else int(count), action, argument)


def _is_seconds(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _wrong(method: str, term: str, why: str) -> ValueError:
    return ValueError(f"failpoints.{method}: term {term!r}: {why}")


class Failpoints:
    """What is to go wrong, and how much of it is left."""

    def __init__(self, failpoints: Mapping[str, str], methods: Collection[str]) -> None:
        """failpoints: method -> terms. Raises ValueError for a method that is not in `methods` or wrong terms."""
        for method in failpoints:
            if method not in methods:
                raise ValueError(f"failpoints.{method}: must be one of {', '.join(sorted(methods))}")
        self._terms = {method: parse(method, text) for method, text in failpoints.items()}

    @asynccontextmanager
    async def at(self, method: str) -> AsyncIterator[None]:
        """Around the effect of one call. Raises EngineError `Failpoint` before it, or (lose) after it."""
        term = next((each for each in self._terms.get(method, ()) if each.left != 0), None)
        if term is None:
            yield
            return
        if term.left is not None:
            term.left -= 1
        failure = EngineError("Failpoint", term.argument or f"{method}: {term.action}", retryable=True)
        match term.action:
            case "error":
                raise failure
            case "delay":
                await asyncio.sleep(float(term.argument))
            case "hang":
                await asyncio.Event().wait()
            case "panic" if not term.argument:
                os._exit(_KILLED)
        yield
        if term.action == "lose":
            raise failure
        if term.action == "panic":
            os._exit(_KILLED)
