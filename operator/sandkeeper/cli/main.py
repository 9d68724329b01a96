"""`sandkeeper`, and the kubectl plugin `kubectl sandbox`."""

from __future__ import annotations

import click

from sandkeeper.cli.lazy import LazyGroup

_SETTINGS = {"help_option_names": ["-h", "--help"]}


@click.group(
    cls=LazyGroup,
    context_settings=_SETTINGS,
    lazy={
        "shim": ("sandkeeper.cli.shim_command:shim", "Run a node's shim."),
        "operator": ("sandkeeper.cli.operator_command:operator", "Run the operator."),
        "local": ("sandkeeper.cli.local:local", "A whole cluster of plain processes on this machine."),
        "demo": ("sandkeeper.cli.local:demo", "From kubectl apply to an exit status in the object."),
        "certificates": (
            "sandkeeper.cli.certificates:certificates",
            "A CA and the certificates of a cluster.",
        ),
        "crds": ("sandkeeper.cli.local:crds", "Print the CustomResourceDefinitions."),
        "conformance": (
            "sandkeeper.cli.conformance_command:conformance",
            "Check a server against the shim's contract.",
        ),
        "version": ("sandkeeper.cli.main:version", "Print the version."),
    },
)
@click.version_option(package_name="sandkeeper", message="%(version)s")
def main() -> None:
    """Sandboxes on Kubernetes without a Pod per sandbox."""


@click.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    click.echo(installed("sandkeeper"))


@click.group(
    cls=LazyGroup,
    context_settings=_SETTINGS,
    lazy={
        "logs": ("sandkeeper.cli.plugin:logs", "Print a container's log."),
        "exec": ("sandkeeper.cli.plugin:exec_", "Run a command in a container."),
    },
)
def kubectl_plugin() -> None:
    """Logs of Sandboxes, and commands in them, straight from their node's shim."""


if __name__ == "__main__":
    main(prog_name="sandkeeper")
