"""restartPolicy, and how a sandbox's end follows from its containers' ends: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sandkeeper.wire import node_pb2


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits that double, in seconds."""

    first: float
    longest: float

    def wait(self, attempt: int) -> float:
        """Before attempt 0, 1, 2, ..."""
        return float(min(self.first * 2.0 ** min(attempt, 32), self.longest))


def restarts(policy: int, status: int) -> bool:
    """Whether a container that ended with `status` is started again."""
    if policy == node_pb2.RESTART_POLICY_ALWAYS:
        return True
    return policy == node_pb2.RESTART_POLICY_ON_FAILURE and status != 0


def ended_for_good(containers: Sequence[node_pb2.ContainerRecord]) -> bool:
    """All containers have, and there is at least one."""
    return bool(containers) and all(c.state == node_pb2.CONTAINER_STATE_EXITED for c in containers)


_JUST_BEFORE = 5.0
"""Seconds from the end of a process to its being in the record, at most."""


def sandbox_exit(
    containers: Sequence[node_pb2.ContainerRecord], stop_at: float, ended: Collection[str] = ()
) -> node_pb2.Exit:
    """The end that Wait answers with: of the first container to fail, else of the first in the list.

    `stop_at`: Unix time of the first Stop, 0 for none. ended: what had ended before it, by the record. What ended
    after it ended because of it; that it did is no matter of times alone, which may have been set in between.
    """
    failed = [c for c in containers if c.exit.status != 0]
    chosen = min(failed, key=lambda c: c.exit.exited_at.ToNanoseconds()) if failed else containers[0]
    found = node_pb2.Exit()
    found.CopyFrom(chosen.exit)
    if len(containers) > 1 and not found.message and found.status:
        found.message = f"container {chosen.name} ended with exit status {found.status}"
    # A hundredth: an exit's time comes from a file's, which the kernel rounds down to its tick.
    at = chosen.exit.exited_at.ToNanoseconds()
    # One that has no time since its start: what it had was from before that, so the clock was set back.
    by_itself = 0 < stop_at - 0.01 - at / 1e9 < _JUST_BEFORE and at > chosen.started_at.ToNanoseconds()
    if stop_at and chosen.name not in ended and not by_itself:
        found.reason = "Stopped"
    # The sandbox has ended when its last container has.
    last = max(containers, key=lambda c: c.exit.exited_at.ToNanoseconds())
    found.exited_at.CopyFrom(last.exit.exited_at)
    return found
