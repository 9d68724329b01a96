"""`sandkeeper conformance`."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import click

from sandkeeper.conformance import report
from sandkeeper.conformance.address import Address, Uncheckable, target
from sandkeeper.conformance.contract import rules
from sandkeeper.conformance.registry import Check, checks
from sandkeeper.conformance.run import Outcome, Result, run_all
from sandkeeper.conformance.server import Containerd
from sandkeeper.wire.errors import ShimError
from sandkeeper.wire.tls import ClientTLS, TLSFiles

IMAGE = "docker.io/library/busybox:1.37"
_FILE = click.Path(path_type=Path, dir_okay=False)


class CannotCheck(click.ClickException):
    exit_code = 2


@click.command()
@click.argument("address")
@click.option("--tls-ca", type=_FILE, help="The CA of the server's certificate, for host:port.")
@click.option("--tls-cert", type=_FILE, help="Our certificate, with a name that may call.")
@click.option("--tls-key", type=_FILE, help="Its private key.")
@click.option("--server-name", default="", help="The name in the server's certificate. [default: the host]")
@click.option("--sandboxer", default="", help="ADDRESS is containerd's own; check this sandboxer through it.")
@click.option(
    "--namespace",
    default="sandkeeper-conformance",
    show_default=True,
    help="containerd's namespace for that.",
)
@click.option("--image", default=IMAGE, show_default=True, help="What the checks run; it must have `sh`.")
@click.option(
    "--rule",
    "patterns",
    multiple=True,
    metavar="RULE",
    help="Only these rules, as CREATE-2 or 'STOP-*'. Repeatable.",
)
@click.option(
    "-o", "--output", type=click.Choice(["table", "wide", "json"]), default="table", show_default=True
)
def conformance(
    address: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    server_name: str,
    sandboxer: str,
    namespace: str,
    image: str,
    patterns: tuple[str, ...],
    output: str,
) -> None:
    """Check a server of containerd's sandbox Controller, rule by rule, against the shim's contract.

    ADDRESS is unix:/path or host:port. The checks make sandboxes there, run them and shut them down; nothing is left.
    Exit status: 0 where no MUST is broken, 1 where one is, 2 where the server cannot be checked.
    """
    tls = None
    if tls_ca and tls_cert and tls_key:
        tls = ClientTLS(TLSFiles(tls_ca, tls_cert, tls_key))
    elif tls_ca or tls_cert or tls_key:
        raise click.UsageError("--tls-ca, --tls-cert and --tls-key belong together")
    if not __debug__:
        raise CannotCheck("the checks are asserts, which python -O leaves out")
    between = Containerd(namespace, sandboxer) if sandboxer else None
    wanted = [rule for rule in rules() if _wanted(rule.number, patterns)]
    if not wanted:
        raise click.UsageError(f"no rule is called {' or '.join(patterns)}")
    chosen = [check for check in checks() if any(_wanted(number, patterns) for number in check.rules)]
    try:
        says, outcomes = asyncio.run(_check(Address(address, tls, server_name, between), image, chosen))
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise CannotCheck("cut short; what was made there is shut down") from None
    except (Uncheckable, ShimError, OSError, ValueError) as error:
        raise CannotCheck(f"{address}: {error}") from error
    verdicts = report.verdicts(wanted, outcomes)
    if output == "json":
        about = {"address": address, "server": says}
        click.echo(json.dumps(report.document(verdicts, about), indent=2))
    else:
        click.echo(f"{address}: {says}\n\n{report.table(verdicts, wide=output == 'wide')}\n")
        click.echo(report.summary(verdicts))
    sys.exit(1 if report.failed(verdicts) else 0)


def _wanted(number: str, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(number, pattern) for pattern in patterns)


async def _check(at: Address, image: str, chosen: list[Check]) -> tuple[str, list[Outcome]]:
    """Who the server says that it is, and how each check ended."""
    this = asyncio.current_task()
    assert this is not None  # noqa: S101
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGTERM, this.cancel
    )  # and what was made is shut down
    done = 0

    def progress(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if outcome.result == Result.BROKEN:
            _say(f"broken: {'/'.join(outcome.check.rules)}: not that {outcome.check.sentence}\n")
        _say(f"{done}/{len(chosen)}\r")

    async with target(at, image) as found:
        return found.says, await run_all(found, chosen, progress)


def _say(text: str) -> None:
    """To people who wait, not into files."""
    if sys.stderr.isatty():
        click.echo(text, err=True, nl=False)
