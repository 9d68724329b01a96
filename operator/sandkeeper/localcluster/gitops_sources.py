"""Where what the GitOps tests run comes from: Flux's two controllers, built from pinned Go modules, and the CRDs of
Flux and Argo CD.

`python -m sandkeeper.localcluster.gitops_sources` makes what is missing: 6 minutes on 2 cores with an empty cache.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from sandkeeper.localcluster import binaries, gobuild
from sandkeeper.localcluster.binaries import BinariesError
from sandkeeper.localcluster.gobuild import ARGOCD, FLUX_KUSTOMIZE, FLUX_SOURCE, Module

FLUX = {"source-controller": FLUX_SOURCE, "kustomize-controller": FLUX_KUSTOMIZE}
# Module -> (Go module, its files).
_CRDS = (
    (FLUX_SOURCE, "github.com/fluxcd/source-controller", "config/crd/bases/*.yaml"),
    (FLUX_KUSTOMIZE, "github.com/fluxcd/kustomize-controller", "config/crd/bases/*.yaml"),
    (ARGOCD, "github.com/argoproj/argo-cd/v3", "manifests/crds/application-crd.yaml"),
)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sources:
    """flux: controller -> its path. crds: files of CustomResourceDefinitions."""

    flux: dict[str, Path]
    crds: tuple[Path, ...]


def find() -> Sources | None:
    """None where it has not been made yet."""
    programs = {name: binaries.cache_dir(module.folder) / name for name, module in FLUX.items()}
    crds = [sorted(crd_folder(module).glob("*.yaml")) for module, _, _ in _CRDS]
    if not all(crds) or not all(binaries.executable(path) for path in programs.values()):
        return None
    return Sources(programs, tuple(path for each in crds for path in each))


def ensure(*, say: Say | None = None) -> Sources:
    """What is missing is built, or fetched, first. Raises BinariesError."""
    say = say or (lambda _line: None)
    if found := find():
        return found
    with binaries.lock(say):  # whoever held it may have made it
        for module, package, files in _CRDS:
            if not crd_folder(module).exists():
                _copy_crds(module, package, files, say)
        for name, module in FLUX.items():
            target = binaries.cache_dir(module.folder)
            if not binaries.executable(target / name):
                gobuild.build([name], target, say, module)
        if found := find():
            return found
    raise BinariesError("Flux could not be built from its Go modules; what go said is above")


def crd_folder(module: Module) -> Path:
    """Where its CRDs are, or will be: not in the go command's own cache, which may be emptied."""
    return binaries.cache_dir(module.folder) / "crds"


def _copy_crds(module: Module, package: str, files: str, say: Say) -> None:
    source = gobuild.source(package, binaries.cache_root(), say, module)
    if source is None:
        return
    target = crd_folder(module)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".crds-") as work:
        made = Path(work) / "crds"
        made.mkdir()
        for path in source.glob(files):
            shutil.copyfile(path, made / path.name)  # not its mode: the go command's files are read-only
        made.rename(target)  # at once: whoever finds the folder finds all of it


@click.command()
def main() -> None:
    """Make what is missing, and say where it is."""
    try:
        found = ensure(say=lambda line: click.echo(line, err=True))
    except (BinariesError, OSError) as error:
        click.echo(f"gitops: {error}", err=True)
        sys.exit(1)
    for name, path in found.flux.items():
        click.echo(f"{name:<21} {path}")


if __name__ == "__main__":
    main(prog_name="gitops_sources")
