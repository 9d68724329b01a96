"""What a sandboxer cannot be asked to keep where a containerd stands between it and the caller, and why.

Seen with containerd 2.3.7. What is not its Controller is its own affair, and what it does not hand on cannot be heeded.
"""

from __future__ import annotations

_OWN_SERVER = "containerd answers for itself here, not for its sandboxer"
_NO_OWNER = "containerd hands no metadata on, so its sandboxer sees no owner"

WITHHELD: dict[str, str] = {
    "CALL-2": _OWN_SERVER,
    "CALL-3": "containerd chooses by the sandboxer, so it must be the right one",
    "CALL-5": _OWN_SERVER,
    "CALL-6": _OWN_SERVER,
    "AUTH-1": _OWN_SERVER,
    "AUTH-2": _OWN_SERVER,
    "AUTH-3": _OWN_SERVER,
    **{f"FENCE-{number}": _NO_OWNER for number in (1, 2, 3, 4, 6, 7, 8)},
    "PLATFORM-1": "containerd's Controller service has no Platform: UNIMPLEMENTED, whatever its sandboxer has",
}
