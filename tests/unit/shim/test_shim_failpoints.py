"""The grammar of failpoints, and what each action does to a call."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandkeeper.failpoints import Effects, Term, parse
from sandkeeper.shim.engines.base import EngineError

METHODS = ("start", "kill")
OFF = Term(None, "off", "")


def failed(message: str) -> EngineError:
    return EngineError("Failpoint", message, retryable=True)


class Counted:
    """Counts how often an effect happened."""

    def __init__(self, text: str) -> None:
        self.effects = Effects(METHODS, {"start": text})
        self.count = 0

    async def call(self) -> None:
        async with self.effects.at("start", "box", failed):
            self.count += 1


async def test_what_strikes_after_the_effect_waits_for_one_that_happens() -> None:
    counted = Counted("1*lose(cut)")
    with pytest.raises(ZeroDivisionError):
        async with counted.effects.at("start", "box", failed):
            raise ZeroDivisionError
    with pytest.raises(EngineError, match="cut"):
        await counted.call()
    await counted.call()
    assert counted.count == 2


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("off", [OFF]),
        ("error(boom)", [Term(None, "error", "boom")]),
        ("1*error(boom)->2*delay(0.5)->off", [Term(1, "error", "boom"), Term(2, "delay", "0.5"), OFF]),
        ("1*error(a->b: c)->1*hang", [Term(1, "error", "a->b: c"), Term(1, "hang", "")]),
        ("12*lose", [Term(12, "lose", "")]),
        ("panic(after)", [Term(None, "panic", "after")]),
    ],
)
def test_terms(text: str, terms: list[Term]) -> None:
    assert parse("start", text) == terms


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("", "''"),
        ("explode", "'explode'"),
        ("1*off->explode(x)", "'explode(x)'"),
        ("0*off", "'0*off'"),
        ("-1*off", "'-1*off'"),
        ("x*off", "'x*off'"),
        ("error(boom", "'error(boom'"),
        ("1*off,1*hang", "'1*off,1*hang'"),
        ("1*off->", "''"),
        ("delay", "'delay'"),
        ("delay(soon)", "'delay(soon)'"),
        ("delay(-1)", "'delay(-1)'"),
        ("delay(inf)", "'delay(inf)'"),
        ("off(1)", "'off(1)'"),
        ("panic(later)", "'panic(later)'"),
        ("hang->off", "'hang'"),
    ],
)
def test_wrong_terms_are_refused_by_method_and_term(text: str, term: str) -> None:
    with pytest.raises(ValueError, match=r"failpoints\.start: term") as refused:
        Effects(METHODS, {"start": text})
    assert f"term {term}:" in str(refused.value)


def test_a_method_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match=r"failpoints\.begin: must be one of kill, start"):
        Effects(METHODS, {"begin": "off"})


async def test_counts_are_used_up_in_order_and_then_it_works() -> None:
    effects = Counted("1*off->2*error(boom)")
    await effects.call()
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            await effects.call()
        assert (caught.value.reason, caught.value.message, caught.value.retryable) == (
            "Failpoint", "boom", True,
        )  # fmt: skip
    await effects.call()
    assert effects.count == 2


async def test_without_a_count_it_never_ends() -> None:
    effects = Counted("error")
    for _ in range(100):
        with pytest.raises(EngineError, match="start: error"):
            await effects.call()
    assert effects.count == 0


async def test_other_methods_work() -> None:
    async with Effects(METHODS, {"start": "error"}).at("kill", "box", failed):
        pass


async def test_lose_fails_after_the_effect() -> None:
    effects = Counted("1*lose(gone)")
    with pytest.raises(EngineError, match="gone"):
        await effects.call()
    assert effects.count == 1


async def test_an_effect_that_failed_by_itself_keeps_its_own_error() -> None:
    with pytest.raises(KeyError):
        async with Effects(METHODS, {"start": "lose"}).at("start", "box", failed):
            raise KeyError("its own")


async def test_delay_waits_first() -> None:
    effects = Counted("1*delay(0.05)")
    before = asyncio.get_running_loop().time()
    await effects.call()
    assert asyncio.get_running_loop().time() - before >= 0.05
    assert effects.count == 1


async def test_hang_ends_only_when_cancelled() -> None:
    effects = Counted("1*hang")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await effects.call()
    assert effects.count == 0
    await effects.call()
    assert effects.count == 1


@pytest.mark.parametrize(("text", "said"), [("panic", b""), ("panic(after)", b"effect\n")])
def test_panic_ends_the_process_as_kill_9_does(text: str, said: bytes) -> None:
    program = f"""
import asyncio, atexit
from sandkeeper.failpoints import Effects
atexit.register(print, "cleaned up", flush=True)
async def call():
    async with Effects(["start"], {{"start": {text!r}}}).at("start", "box", RuntimeError):
        print("effect", flush=True)
asyncio.run(call())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, stdout=subprocess.PIPE, timeout=30, close_fds=True
    )
    assert (ended.returncode, ended.stdout) == (137, said)


def test_what_is_no_coroutine_fails_the_same_way() -> None:
    effects = Effects(METHODS, {"start": "1*error(full)->1*lose(cut)"})
    happened = []
    for message in ("full", "cut"):
        with pytest.raises(OSError, match=message), effects.at_once("start", "box", OSError):
            happened.append(message)
    assert happened == ["cut"]


def test_the_trace_has_what_happened_and_only_that(tmp_path: Path) -> None:
    effects = Effects(METHODS, {"start": "1*error->1*lose"}, tmp_path / "effects")
    for _ in range(3):
        with contextlib.suppress(OSError), effects.at_once("start", "box", OSError):
            pass
    lines = [json.loads(line) for line in (tmp_path / "effects").read_text().splitlines()]
    assert [(each["effect"], each["subject"], each["process"]) for each in lines] == [
        ("start", "box", os.getpid())
    ] * 2
