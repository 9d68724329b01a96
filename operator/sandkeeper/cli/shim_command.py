"""`sandkeeper shim`."""

from __future__ import annotations

from sandkeeper.cli.flags import settings_command
from sandkeeper.shim.main import main as run
from sandkeeper.shim.settings import ShimSettings

shim = settings_command(
    "shim",
    ShimSettings,
    run,
    help="Run a node's shim: keep its sandboxes, and serve the operator. Each setting may come from a flag, the"
    " environment or the file, in this order of precedence.",
)
