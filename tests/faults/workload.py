"""A bit of everything that Sandboxes do, in two acts: what breaks, breaks in between."""

from __future__ import annotations

from tests.cluster import eventually
from tests.faults.network import Trial, sandbox
from tests.faults.oracle import Oracle, wanted
from tests.histories import Object, kstatus

from sandkeeper.wire import node_pb2

RUNNING = wanted("Running", "True Running", on_node="RUNNING")
END: dict[str, Object | None] = {
    "stays": RUNNING,
    "comes": RUNNING,
    "changes": wanted("Running", "True Running", instance=2, on_node="RUNNING"),
    "pauses": wanted("Paused", "True Paused", on_node="PAUSED"),
    "stops": wanted("Stopped", "True Stopped", exited="137 Stopped"),
    "ends": wanted("Failed", "False Error", exited="4 Error", Stalled="True"),
    "fails": wanted("Failed", "False Error", exited="7 Error", Stalled="True"),
    "completes": wanted("Succeeded", "True Completed", exited="0 Completed"),
    "leaves": None,
}
"""How it ends, whatever happens on the way."""


class Workload:
    """`begin`, then the fault, `go_on`, the fault's end, `assert_right`."""

    def __init__(self, trial: Trial, lives: float = 1.5) -> None:
        """lives: seconds that `ends` runs, so that it ends while the fault lasts."""
        self.trial = trial
        self._lives = lives

    def begin(self) -> None:
        """Six that run."""
        names = ("stays", "changes", "pauses", "stops", "leaves")
        dies = sandbox("ends", "sh", "-c", f"sleep {self._lives}; exit 4")
        self.trial.make(*(sandbox(name) for name in names), dies)
        for name in names:
            self.trial.until(name, lambda body: body and kstatus(body) == "Current")
        self.trial.until("ends", lambda body: body.get("status", {}).get("startedAt"))

    def go_on(self) -> None:
        """Three come, one goes, three are changed; one has ended by itself on its node at the end of this."""
        user = self.trial.user
        user.delete("leaves")
        user.patch("stops", {"spec": {"desiredState": "Stopped"}})
        user.patch("pauses", {"spec": {"desiredState": "Paused"}})
        self.trial.make(
            sandbox("comes"),
            sandbox("changes", "sleep", "90000"),
            sandbox("fails", "sh", "-c", "exit 7"),
            sandbox("completes", "true"),
        )
        self.until_ended("ends")

    def until_ended(self, name: str) -> None:
        """On its node, whether or not the object says so."""
        uid = self.trial.uid(name)

        def over() -> bool:
            lives = self.trial.network.shims.lives(uid)
            return bool(lives) and lives[-1].record.state == node_pb2.STATE_EXITED

        eventually(over, timeout=60, seen=lambda: self.trial.network.shims.lives(uid))

    def assert_right(self, oracle: Oracle | None = None, *, timeout: float = 60.0) -> None:
        (oracle or self.trial.oracle()).assert_right(END, timeout=timeout)
