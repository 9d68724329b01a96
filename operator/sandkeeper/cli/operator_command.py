"""`sandkeeper operator`."""

from __future__ import annotations

from sandkeeper.cli.flags import settings_command
from sandkeeper.control.main import main as run
from sandkeeper.control.settings import OperatorSettings

operator = settings_command(
    "operator",
    OperatorSettings,
    run,
    help="Run the operator: make Sandboxes so by calling the shims of the nodes. Each setting may come from a"
    " flag, the environment or the file, in this order of precedence.",
)
