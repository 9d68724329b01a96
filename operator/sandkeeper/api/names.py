"""The fixed names of the API: group, kinds, keys. Never change one; objects in clusters carry them."""

from __future__ import annotations

from typing import Final

GROUP = "sandkeeper.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "sandkeeper.dev/v1alpha1"
CATEGORY = "sandkeeper"

SANDBOX: Final = "Sandbox"
SANDBOXES = "sandboxes"
SANDBOX_NODE: Final = "SandboxNode"
SANDBOX_NODES = "sandboxnodes"

FINALIZER = f"{GROUP}/shutdown"
"""Kept on a Sandbox from before its first Start until its absence from the node is proven."""

ASSIGNMENT_ANNOTATION = f"{GROUP}/assignment"
"""Node, instance, digest and runtime as JSON, written before Start, so that no lost reply can lead to a
second copy."""

SHIM_SIGNER: Final = f"{GROUP}/shim"
"""Signer (CertificateSigningRequest) of the shims' certificates."""

SCHEDULED = "Scheduled"
RUNNING = "Running"
FINISHED = "Finished"
READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"
CONDITIONS = (SCHEDULED, RUNNING, FINISHED, READY)
"""Condition types that are always present after the operator's first status write."""
TRANSIENT_CONDITIONS = (RECONCILING, STALLED)
"""Condition types that are present only while True (kstatus)."""
