"""`sandkeeper certificates`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import click

from sandkeeper.localcluster.pki import CA, LIFE
from sandkeeper.wire.ids import valid_node_name
from sandkeeper.wire.tls import OPERATOR_IDENTITY


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("nodes", nargs=-1)
def certificates(folder: Path, nodes: tuple[str, ...]) -> None:
    """Make a CA in FOLDER, the operator's certificate and one for each of NODES, named as the SandboxNodes are.

    Again: makes what is missing. FOLDER/operator holds ca.crt, tls.crt and tls.key, FOLDER/NODE ca.crt, node.crt and
    node.key. FOLDER/ca.key signs all of them: keep it off the cluster.
    """
    if wrong := [name for name in nodes if not valid_node_name(name) or name == "operator"]:
        raise click.BadParameter(f"{wrong[0]!r} cannot be the name of a node", param_hint="NODES")
    try:
        os.umask(0o077)
        ca = CA.create(folder, "sandkeeper")
        for name in ("operator", *nodes):
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(ca.cert, folder / name / "ca.crt")
        ca.client(OPERATOR_IDENTITY, hosts=(OPERATOR_IDENTITY,), file="operator/tls")
        for name in nodes:
            ca.server(name, (name,), file=f"{name}/node")
    except OSError as error:
        raise click.ClickException(str(error)) from error
    click.echo(
        f"{folder}: the operator's certificate and those of {len(nodes)} nodes, good for {LIFE.days} days"
    )
