"""Which faults are tried: a quick cut in `make test`, all with `--faults=all` (`make faults`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.report import FINDINGS, Finding


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the fault tests, those marked `thorough` are left out of the quick cut."""
    if config.getoption("--faults") == "all":
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    mark = item.get_closest_marker("fault")
    if mark is not None:
        FINDINGS.by_test[item.nodeid] = Finding(str(mark.args[0]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    finding = FINDINGS.by_test.get(report.nodeid)
    if finding is not None:
        if report.when == "call":
            finding.passed = report.passed
        elif report.failed:
            finding.passed = False


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """`make faults` as a whole fails also where a fault was not tried, or its test was skipped."""
    if _is_whole(session.config) and exitstatus == pytest.ExitCode.OK and FINDINGS.short():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_whole(config: pytest.Config) -> bool:
    """All faults were asked for, and nothing chooses among their tests."""
    chosen = (
        config.option.keyword or config.option.markexpr or config.option.deselect or config.option.collectonly
    )
    folders = all(Path(str(config.invocation_params.dir), arg).is_dir() for arg in config.args)
    return config.getoption("--faults") == "all" and folders and not chosen


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FINDINGS.by_test:
        terminalreporter.section("faults")
        for line in FINDINGS.table():
            terminalreporter.write_line(line)
