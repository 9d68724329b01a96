"""`make conformance`: every rule against every engine, and against our shim with containerd as its client.

Exit status 1 where a MUST is broken anywhere. ENGINE names one of the engines, or `sandboxer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator

from tests.conformance.shims import ENGINES, shims
from tests.conformance.targets import EngineTarget, containerd_target

from sandkeeper.conformance import report
from sandkeeper.conformance.contract import rules
from sandkeeper.conformance.registry import checks
from sandkeeper.conformance.run import Outcome, Target, run_all
from sandkeeper.localcluster.containerd_sources import Source

CONTAINERD, SANDBOXER = "containerd", "sandboxer"


@contextlib.asynccontextmanager
async def engine_target(engine: str, source: Source = "module") -> AsyncIterator[Target]:
    with shims(engine, source) as made:
        yield EngineTarget(made, engine)


async def main(wanted: str) -> int:
    targets = {f"engine {engine}": engine_target(engine) for engine in ENGINES if wanted in ("", engine)}
    if wanted in ("", CONTAINERD):
        targets["engine containerd, with Debian's containerd 1.6"] = engine_target(CONTAINERD, "debian")
    if wanted in ("", SANDBOXER):
        targets["engine oci, as containerd's sandboxer"] = containerd_target("oci")
    if not targets:
        print(f"ENGINE={wanted}: not one of {', '.join((*ENGINES, SANDBOXER))}", file=sys.stderr)
        return 2
    summaries, failed = [], False
    for name, made in targets.items():
        began = time.monotonic()
        async with made as target:
            outcomes = await run_all(target, checks(), _progress)
        verdicts = report.verdicts(rules(), outcomes)
        print(f"\n==> {name}\n{report.table(verdicts)}", flush=True)
        summaries.append(f"{name}: {report.summary(verdicts)} ({time.monotonic() - began:.0f} s)")
        failed |= report.failed(verdicts)
    print("\n" + "\n".join(summaries))
    return 1 if failed else 0


def _progress(outcome: Outcome) -> None:
    if sys.stderr.isatty():
        print(f"{outcome.check.name[:100]:<100}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(os.environ.get("ENGINE", ""))))
