"""What the fault tests have found, one line per fault: what `make faults` ends with.

A test says by the mark `fault` which one it is about; the oracle notes what it has looked at.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field

FAULTS = {
    "F1": "operator killed at each effect",
    "F2": "shim killed at each effect",
    "F3": "both killed",
    "F4": "the runtime fails, hangs, prints garbage",
    "F5": "deadline exceeded, effect or not",
    "F6": "operator and shim cut off from each other",
    "F7": "API server down, slow, refusing",
    "F8": "watch events lost, repeated, reordered, old",
    "F9": "deleted and made again in mid-start",
    "F10": "two operators at once",
    "F11": "the machine restarted",
    "F12": "records truncated, corrupt, disk full",
    "F13": "clock jumps of an hour",
    "F14": "a burst of 1,000 with 20 % failing starts",
    "F15": "node gone for good",
    "F16": "certificates expire and rotate",
    "F17": "a sandbox that no object owns",
    "F18": "out of memory: container, sandbox process, shim",
    "F19": "objects replaced, restored, stripped",
}


@dataclass(slots=True)
class Finding:
    """Of one test. end, starts and leaks: None where the test did not come so far."""

    fault: str
    passed: bool = False
    end: bool | None = None
    starts: bool | None = None
    leaks: bool | None = None


@dataclass(slots=True)
class Findings:
    by_test: dict[str, Finding] = field(default_factory=dict)

    def note(self, *, end: bool | None = None, starts: bool | None = None, leaks: bool | None = None) -> None:
        """What was found in the test that runs now."""
        running = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        finding = self.by_test.get(running)
        if finding is None:
            return
        for name, value in (("end", end), ("starts", starts), ("leaks", leaks)):
            if value is not None:
                setattr(finding, name, value)

    def short(self) -> list[str]:
        """Of all faults, those that were not tried or did not hold."""
        tried = {each.fault for each in self.by_test.values()}
        failed = {each.fault for each in self.by_test.values() if not each.passed}
        return [name for name in FAULTS if name not in tried or name in failed]

    def table(self) -> list[str]:
        """Lines for people; a fault without a test is said to be untried."""
        grouped: defaultdict[str, list[Finding]] = defaultdict(list)
        for finding in self.by_test.values():
            grouped[finding.fault].append(finding)
        lines = [
            f"{'':4} {'fault':48} {'points':>6} {'end equal':>10} {'one start':>10} {'no leak':>8}  verdict"
        ]
        for name, what in FAULTS.items():
            found = grouped.get(name, [])
            if not found:
                lines.append(f"{name:4} {what:48} {'-':>6} {'-':>10} {'-':>10} {'-':>8}  not tried")
                continue
            verdict = "held" if all(each.passed for each in found) else "FELL SHORT"
            counts = [_count(found, part) for part in ("end", "starts", "leaks")]
            lines.append(
                f"{name:4} {what:48} {len(found):>6} {counts[0]:>10} {counts[1]:>10} {counts[2]:>8}  {verdict}"
            )
        return lines


def _count(found: list[Finding], part: str) -> str:
    return f"{sum(getattr(each, part) is True for each in found)}/{len(found)}"


FINDINGS = Findings()
