"""Which function checks which rule. No pytest here nor in the checks: a command can run them against any server."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from sandkeeper.conformance.server import Server

Ability = Literal["failpoints", "leaks", "local", "processes", "registry", "restart", "tcp"]
"""What a check needs beyond a server that answers:

failpoints  faults on command (implies restart)
leaks       somebody who finds what a sandbox left on the machine
local       the server is on this machine: its socket and its kernel can be looked at
processes   its pids are those of real processes on this machine
registry    it fetches images from a registry that gets new ones on command
restart     it can be killed and started again
tcp         it listens on TCP, and there are certificates to call it with
"""

WANTING: Mapping[Ability, str] = {
    "failpoints": "its faults cannot be commanded from here",
    "leaks": "what its sandboxes have on its machine cannot be told from what others have there",
    "local": "it is not reached by a unix socket, so nothing says that it is on this machine",
    "processes": "its pids are not known to be processes of this machine",
    "registry": "no registry is known that gets new images on command",
    "restart": "it is not killed and started again from here",
    "tcp": "there are no certificates of strangers to call it with",
}
"""Why a check is not run where it needs what is not there."""

CheckFunction = Callable[[Server], Awaitable[None]]
F = TypeVar("F", bound=CheckFunction)

MODULES = (
    *("calls", "auth", "fencing", "create", "create_fails", "start", "wait", "status", "stop", "shutdown"),
    *("restarts", "node", "watch", "streams", "plain"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """run: passes, or raises AssertionError, or Inapplicable where the server does not offer what is checked."""

    rules: tuple[str, ...]
    run: CheckFunction
    needs: frozenset[Ability]

    @property
    def sentence(self) -> str:
        """`a repeated create changes nothing`."""
        return self.run.__name__.replace("_", " ")

    @property
    def name(self) -> str:
        """`CREATE-2-a_repeated_create_changes_nothing`."""
        return f"{'/'.join(self.rules)}-{self.run.__name__}"


_checks: list[Check] = []


def rule(*numbers: str, needs: tuple[Ability, ...] = ()) -> Callable[[F], F]:
    """Registers a check of the rules with these numbers."""

    def register(run: F) -> F:
        _checks.append(Check(numbers, run, frozenset(needs)))
        return run

    return register


def checks() -> tuple[Check, ...]:
    """All of them, in the order of the contract's sections."""
    for module in MODULES:
        importlib.import_module(f"sandkeeper.conformance.rules_{module}")
    return tuple(_checks)
