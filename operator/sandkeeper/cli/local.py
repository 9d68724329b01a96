"""`sandkeeper local`, `demo` and `crds`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import click

from sandkeeper.localcluster.apiserver import KubectlError, NotReady
from sandkeeper.localcluster.apiserver import crds as crd_documents
from sandkeeper.localcluster.binaries import BinariesError
from sandkeeper.localcluster.cluster import Engine, LocalCluster
from sandkeeper.localcluster.processes import ProcessDied
from sandkeeper.wire.errors import ShimError

FAILURES = (BinariesError, KubectlError, NotReady, ProcessDied, ShimError, OSError)
DIRECTORY = "SANDKEEPER_LOCAL_DIR"


def _default_directory() -> Path:
    # Short (unix sockets lie below it) and ours alone.
    return Path(os.environ.get(DIRECTORY) or Path(tempfile.gettempdir()) / f"sandkeeper-{os.getuid()}")


directory_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=_default_directory,
    help=f"Where the cluster lives. [env: {DIRECTORY}] [default: sandkeeper-<uid> in the temporary folder]",
)


@click.group()
def local() -> None:
    """A whole cluster of plain processes on this machine: etcd, kube-apiserver, shims, operator. No Docker."""


@local.command()
@directory_option
@click.option("--shims", type=click.IntRange(1, 64), default=1, show_default=True, help="How many nodes.")
@click.option(
    "--engine", type=click.Choice(["oci", "containerd", "simulated"]), default="oci", show_default=True
)
@click.option("--operator/--no-operator", default=True, help="Whether to run the operator.")
def up(directory: Path, shims: int, engine: Engine, operator: bool) -> None:
    """Start it; again: start what is missing."""
    cluster = LocalCluster(directory)
    try:
        cluster.up(shims=shims, engine=engine, operator=operator, say=click.echo)
    except FAILURES as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"\nexport KUBECONFIG={cluster.kubeconfig}\nkubectl get sandboxnodes")


@local.command()
@directory_option
@click.option("--keep-files", is_flag=True, help="Keep the folder with logs and state.")
def down(directory: Path, keep_files: bool) -> None:
    """End every sandbox and every process of it, and delete its folder."""
    try:
        LocalCluster(directory).down(delete=not keep_files)
    except FAILURES as error:
        raise click.ClickException(str(error)) from error


@local.command()
@directory_option
def status(directory: Path) -> None:
    """Which of its processes run. Exit status 1 when one does not."""
    cluster = LocalCluster(directory)
    found = cluster.status()
    if not found:
        click.echo(f"No cluster in {directory}")
        sys.exit(1)
    for name, pid in found.items():
        click.echo(f"{name:<16} {'pid ' + str(pid) if pid else 'does not run'}")
    click.echo(f"kubeconfig       {cluster.kubeconfig}")
    sys.exit(0 if all(found.values()) else 1)


@click.command()
def crds() -> None:
    """Print the CustomResourceDefinitions, for kubectl apply -f -."""
    click.echo(crd_documents(), nl=False)


@click.command()
@directory_option
@click.option(
    "--keep/--no-keep", default=lambda: os.environ.get("KEEP", "") not in ("", "0"), help="[env: KEEP]"
)
@click.option("--engine", type=click.Choice(["oci", "simulated"]), default="oci", hidden=True)
def demo(directory: Path, keep: bool, engine: Engine) -> None:
    """From kubectl apply to an exit status in the object, on a real API server and a real runtime."""
    from sandkeeper.localcluster.demo import DemoFailed, run

    try:
        run(directory.with_name(f"{directory.name}-demo"), keep=keep, engine=engine, say=click.echo)
    except (*FAILURES, DemoFailed) as error:
        raise click.ClickException(str(error)) from error
