"""What was seen of a server: the calls of a check and how each ended, and what a failed assert was about."""

from __future__ import annotations

import ast
import contextlib
import linecache
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import grpc

_SHORT = 200
"""Characters of a value that are shown."""


class Inapplicable(Exception):
    """The server does not offer what the check is about."""


class Calls:
    """How the calls of one check ended, in the order in which they did."""

    def __init__(self) -> None:
        self._ended: list[tuple[str, str]] = []

    def ended(self, call: str, code: str) -> None:
        self._ended.append((call, code))

    def __str__(self) -> str:
        """`Create OK, Status OK 3 times, Start FAILED_PRECONDITION`."""
        return ", ".join(
            f"{call} {code}" if count == 1 else f"{call} {code} {count} times"
            for (call, code), count in Counter(self._ended).items()
        )


class Observed:
    """A stub whose calls are noted. The calls themselves are the stub's own."""

    def __init__(self, stub: Any, calls: Calls) -> None:
        self._stub, self._calls = stub, calls

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._stub, name)

        def call(*args: Any, **options: Any) -> Any:
            made = method(*args, **options)
            made.add_done_callback(lambda done: self._calls.ended(name, _code(done)))
            return made

        return call


class Absent:
    """The stub of a service that the server does not have."""

    def __init__(self, service: str) -> None:
        self._service = service

    def __getattr__(self, name: str) -> NoReturn:
        raise Inapplicable(f"it has no {self._service}")


def _code(done: Any) -> str:
    """The code of a call that is over: its coroutine has nothing to wait for."""
    asking: Coroutine[Any, Any, grpc.StatusCode] = done.code()
    try:
        asking.send(None)
    except StopIteration as result:
        return str(result.value.name)
    finally:
        asking.close()
    return "unknown"


def explain(error: AssertionError) -> str:
    """Its message; for an assert that has none, what it says and what the names in it were."""
    if str(error):
        return str(error)
    frame, line = _innermost(error)
    if frame is None:
        return "an assert failed"
    path = frame.f_code.co_filename
    place = f"{Path(path).name}:{line}"
    found = _assert_at("".join(linecache.getlines(path)), line)
    if found is None:
        return f"not so at {place}"
    seen = [
        f"{ast.unparse(part)} is {shorten(value)}" for part in _parts(found) for value in _value(part, frame)
    ]
    return f"not so ({place}): {ast.unparse(found)}" + (f"; {', '.join(seen)}" if seen else "")


def shorten(value: object) -> str:
    """On one line, and not long."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


def _innermost(error: AssertionError) -> tuple[FrameType | None, int]:
    trace, frame, line = error.__traceback__, None, 0
    while trace is not None:
        frame, line, trace = trace.tb_frame, trace.tb_lineno, trace.tb_next
    return frame, line


def _assert_at(source: str, line: int) -> ast.expr | None:
    """What the assert says that this line is part of."""
    with contextlib.suppress(SyntaxError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or 0):
                return node.test
    return None


def _parts(test: ast.expr) -> Iterator[ast.expr]:
    """The sides of a comparison; where a side is a tuple, what is in it."""
    sides = [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]
    for side in sides:
        yield from side.elts if isinstance(side, ast.Tuple) else [side]


def _value(part: ast.expr, frame: FrameType) -> Iterator[object]:
    """Its value, where finding it calls nothing again and it is not plain to see."""
    harmless = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.expr_context, ast.UnaryOp, ast.USub)
    if isinstance(part, ast.Constant) or not all(isinstance(each, harmless) for each in ast.walk(part)):
        return
    code = compile(ast.Expression(part), "<assert>", "eval")
    with contextlib.suppress(Exception):
        yield eval(code, frame.f_globals, frame.f_locals)  # noqa: S307 - an expression of our own source
