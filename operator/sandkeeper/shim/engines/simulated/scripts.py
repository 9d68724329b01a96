"""What a simulated process does, read from its command line, so that a test can say it.

    sleep SECONDS            ends with 0 after a while (`infinity`: never)
    exit STATUS, true, false ends at once
    signal NUMBER            is ended by a signal at once
    oom                      is ended for want of memory at once
    echo WORD...             writes a line and ends
    ignore-term COMMAND...   does as COMMAND does, but takes no notice of SIGTERM
    sh -c SCRIPT             one after the other of the above and `trap '' TERM`, `trap 'exit N' TERM`,
                             `kill -NUMBER $$`, `echo ... >&2`, between `;`, `&&` or line breaks

Anything else runs until it is killed. A program whose name has `missing` or `nonexistent` in it does not start.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

TERMINATED = 143


class Line(NamedTuple):
    """A line of output and when it comes, in seconds from the start."""

    after: float
    stream: Literal["stdout", "stderr"]
    text: str


@dataclass(frozen=True, slots=True)
class Script:
    """What a process does. seconds: until it ends by itself, None for never. term: the status with which it
    answers SIGTERM; None: it takes no notice."""

    seconds: float | None = None
    status: int = 0
    signal: int = 0
    oom: bool = False
    term: int | None = TERMINATED
    lines: tuple[Line, ...] = ()


FOREVER = Script()


def startable(words: Sequence[str]) -> bool:
    """Whether there is such a program."""
    return not words or not any(part in words[0] for part in ("missing", "nonexistent"))


def read(words: Sequence[str]) -> Script:
    """The script of a command line; no words: the image's own program, which runs until it is killed."""
    match [PurePosixPath(words[0]).name, *words[1:]] if words else []:
        case ["ignore-term", *rest]:
            return replace(read(rest), term=None)
        case ["sleep", text]:
            return Script(seconds=_seconds(text))
        case ["true"]:
            return _ends()
        case ["false"]:
            return _ends(1)
        case ["exit", text] if text.isdecimal():
            return _ends(int(text) & 0xFF)
        case ["signal", text] if text.isdecimal():
            return replace(_ends(128 + int(text)), signal=int(text))
        case ["kill", option, "$$"] if option[1:].isdecimal():
            return read(["signal", option[1:]])
        case ["oom"]:
            return replace(_ends(137), signal=9, oom=True)
        case ["echo", *rest, "1", ">&", "2"] | ["echo", *rest, ">&", "2"]:
            return replace(_ends(), lines=(Line(0.0, "stderr", " ".join(rest)),))
        case ["echo", *rest]:
            return replace(_ends(), lines=(Line(0.0, "stdout", " ".join(rest)),))
        case ["sh", "-c", text, *_]:
            return _shell(text)
    return FOREVER


def _ends(status: int = 0) -> Script:
    return Script(seconds=0.0, status=status)


def _seconds(text: str) -> float | None:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else None


def _shell(text: str) -> Script:
    whole = _ends()
    for words in _statements(text):
        match words:
            case ["trap", "", "TERM" | "SIGTERM"]:
                whole = replace(whole, term=None)
            case ["trap", action, "TERM" | "SIGTERM"] if read(action.split()).seconds == 0:
                whole = replace(whole, term=read(action.split()).status)
            case ["exec", *rest]:
                return _then(whole, read(rest))
            case _:
                whole = _then(whole, read(words))
                if words[0] == "exit":
                    return whole
        if whole.seconds is None or whole.signal:
            return whole
    return whole


def _then(first: Script, second: Script) -> Script:
    begun = first.seconds or 0.0
    return Script(
        seconds=None if second.seconds is None else begun + second.seconds,
        status=second.status,
        signal=second.signal,
        oom=second.oom,
        term=None if second.term is None else first.term,
        lines=first.lines + tuple(line._replace(after=begun + line.after) for line in second.lines),
    )


def _statements(text: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(text.replace("\n", ";"), posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for word in lexer:
            if word in (";", "&&"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)
    except ValueError:  # an open quote
        words = ["exit", "2"]
    if words:
        yield words
