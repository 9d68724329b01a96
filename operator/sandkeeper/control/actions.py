"""What a decision can be. `act` has one function for each action."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sandkeeper.control.observation import Assignment


class Verdict(Enum):
    """What an observation means for the condition Ready, and so for kubectl wait, Flux and Argo CD."""

    READY = "observed is what the spec asks for: Ready=True"
    PROGRESSING = "on the way: Ready=False, Reconciling=True"
    FAILED = "stays so until somebody changes something: Ready=False, Stalled=True"
    UNKNOWN = "cannot be seen: Ready=Unknown, Reconciling=True"
    UNSAID = "nothing is known yet: the status stays as it is"


@dataclass(frozen=True, slots=True)
class Assign:
    """Write the assignment (and the finalizer) to the object: the write-ahead of everything on the node."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class Start:
    """Create and Start the assigned instance on its node."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Freeze the running instance."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Unfreeze it."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End its processes; the node keeps the record of how they ended."""

    grace_seconds: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Remove the instance from the node, with whatever runs. NOT_FOUND is what proves absence."""

    # Seconds for its processes to end by themselves; None where none runs.
    grace_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Release:
    """Take our finalizer off the object: the API server may forget it."""


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete the object (its time to live is over)."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing to do; a change or the clock brings us back."""


Action = Assign | Start | Pause | Resume | Stop | Shutdown | Release | Delete | Rest


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next, and what to say meanwhile."""

    action: Action
    reason: str
    verdict: Verdict
    message: str = ""
    # Seconds until the clock alone makes a difference; None for never.
    requeue_after: float | None = None
