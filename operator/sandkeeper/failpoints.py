"""Faults on command at named effects, in containerd's failpoint grammar, and a trace of the effects that happened.

    TERM[->TERM]...        TERM: [COUNT*]ACTION[(ARG)]

Each call of the effect uses up one count of the first term that has any left (what strikes after the effect: each
that happened); a term without a count never ends;
after the last term the effect works. Actions:

    off              works
    error(MESSAGE)   fails before the effect, with an error that may pass
    delay(SECONDS)   works after a while
    hang             never answers, until it is cancelled; no effect
    lose(MESSAGE)    works, and the caller gets the error: a lost reply
    panic            ends the process as kill -9 does, before the effect; panic(after): after it

The effects are listed in `sandkeeper.control.faults` and `sandkeeper.shim.faults`; where neither a failpoint nor a
trace is asked for, nothing of this is in the way of a call.

Source: containerd pkg/failpoint/fail.go. Ours: hang, lose, seconds for milliseconds, and counts may be left out.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

_TERM = re.compile(r"(?:([0-9]+)\*)?([a-z]+)(?:\(([^()]*)\))?")
_ACTIONS = frozenset({"off", "error", "delay", "hang", "lose", "panic"})
_KILLED = 137

Failure = Callable[[str], Exception]
Note = dict[str, object]


@dataclass(slots=True)
class Term:
    """One term; `left` is None for ever."""

    left: int | None
    action: str
    argument: str

    @property
    def is_after(self) -> bool:
        """It strikes when the effect has happened."""
        return self.action == "lose" or (self.action, self.argument) == ("panic", "after")


def parse(name: str, text: str) -> list[Term]:
    """Raises ValueError naming the effect and the term at fault."""
    terms: list[Term] = []
    position = 0
    while True:
        found = _TERM.match(text, position)
        if found is None or (found.end() != len(text) and not text.startswith("->", found.end())):
            raise _wrong(name, text[position:], "must be [COUNT*]ACTION[(ARG)], joined by `->`")
        terms.append(_term(name, found))
        if found.end() == len(text):
            return terms
        if terms[-1].left is None:
            raise _wrong(name, found[0], "without a count it never ends: it must be the last")
        position = found.end() + len("->")


def _term(name: str, found: re.Match[str]) -> Term:
    count, action, argument = found[1], found[2], found[3] or ""
    if action not in _ACTIONS:
        raise _wrong(name, found[0], f"action must be one of {', '.join(sorted(_ACTIONS))}")
    if count is not None and int(count) == 0:
        raise _wrong(name, found[0], "count must be at least 1")
    if action == "delay" and not _is_seconds(argument):
        raise _wrong(name, found[0], "delay needs seconds, such as delay(0.5)")
    if (action in ("off", "hang") and argument) or (action == "panic" and argument not in ("", "after")):
        raise _wrong(name, found[0], f"{action} takes no such argument")
    return Term(None if count is None else int(count), action, argument)


def _is_seconds(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _wrong(name: str, term: str, why: str) -> ValueError:
    return ValueError(f"failpoints.{name}: term {term!r}: {why}")


@contextmanager
def _counted(term: Term | None) -> Iterator[None]:
    """Around the effect itself: one that failed by itself has no time after it, and that term is still to come."""
    try:
        yield
    except BaseException:
        if term is not None and term.left is not None and term.is_after:
            term.left += 1
        raise


class Effects:
    """The effects of one process: which of them are to fail, how much of that is left, and what has happened."""

    def __init__(
        self,
        names: Collection[str],
        failpoints: Mapping[str, str],
        trace: Path | None = None,
    ) -> None:
        """failpoints: effect -> terms. trace: a file that gets a line of JSON after each effect, at once, so that
        it outlives a kill.

        Raises ValueError for an effect that is not in `names` or wrong terms, OSError for the file.
        """
        for name in failpoints:
            if name not in names:
                raise ValueError(f"failpoints.{name}: must be one of {', '.join(sorted(names))}")
        self._terms = {name: parse(name, text) for name, text in failpoints.items()}
        self._trace = -1
        if trace is not None:
            self._trace = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    @asynccontextmanager
    async def at(self, name: str, subject: str, failure: Failure) -> AsyncIterator[Note]:
        """Around one effect on `subject`. Raises what `failure` makes of a message, before it or (lose) after it.

        What is put into the note that it yields is in the trace as well.
        """
        term = self._next(name)
        if term is not None and term.action == "hang":
            await asyncio.Event().wait()
        if term is not None and term.action == "delay":
            await asyncio.sleep(float(term.argument))
        self._before(name, term, failure)
        note: Note = {"effect": name, "subject": subject}
        with _counted(term):
            yield note
        self._after(note, term, failure)

    @contextmanager
    def at_once(self, name: str, subject: str, failure: Failure) -> Iterator[Note]:
        """The same for what is no coroutine, such as a write to the disk."""
        term = self._next(name)
        if term is not None and term.action in ("hang", "delay"):
            time.sleep(float(term.argument or 1e9))
        self._before(name, term, failure)
        note: Note = {"effect": name, "subject": subject}
        with _counted(term):
            yield note
        self._after(note, term, failure)

    def _next(self, name: str) -> Term | None:
        term = next((each for each in self._terms.get(name, ()) if each.left != 0), None)
        if term is not None and term.left is not None:
            term.left -= 1
        return term

    def _before(self, name: str, term: Term | None, failure: Failure) -> None:
        if term is None:
            return
        if term.action == "error":
            raise failure(term.argument or f"{name}: error")
        if term.action == "panic" and not term.argument:
            os._exit(_KILLED)

    def _after(self, note: Note, term: Term | None, failure: Failure) -> None:
        if self._trace >= 0:
            line = {**note, "process": os.getpid(), "at": time.time()}
            os.write(self._trace, f"{json.dumps(line)}\n".encode())
        if term is None:
            return
        if term.action == "lose":
            raise failure(term.argument or f"{note['effect']}: lose")
        if term.action == "panic":
            os._exit(_KILLED)
