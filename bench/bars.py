"""The bars: what the figures must hold on 2 cores, and what they aim at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bar:
    figure: str
    sense: Literal["<=", ">="]
    bar: float
    aim: float | None = None

    def holds(self, value: float) -> bool:
        return value <= self.bar if self.sense == "<=" else value >= self.bar


BARS = (
    Bar("ready_p50_over_floor", "<=", 2.5, aim=1.8),
    Bar("ready_p99_over_p50", "<=", 3),
    Bar("containerd_ready_over_ctr", "<=", 2, aim=1.5),
    Bar("burst50_per_s", ">=", 40, aim=60),
    Bar("sim_5000_per_s", ">=", 100),
    Bar("sim_5000_lost", "<=", 0),
    Bar("writes_to_ready", "<=", 2),
    Bar("writes_per_life", "<=", 4),
    Bar("writes_at_rest_60s", "<=", 0),
    Bar("exit_to_status_p99_ms", "<=", 300),
    Bar("restart_starts", "<=", 0),
    Bar("restart_shutdowns", "<=", 0),
    Bar("restart_writes", "<=", 0),
    Bar("restart_serving_s", "<=", 5),
    Bar("shim_readopt_s", "<=", 2),
    Bar("rss_mib_at_1000", "<=", 150),
    Bar("rss_mib_at_10000", "<=", 400),
)


def missed(figures: Mapping[str, float]) -> list[str]:
    """The bars that do not hold. What was not measured is not missed."""
    return [bar.figure for bar in BARS if bar.figure in figures and not bar.holds(figures[bar.figure])]


def table(figures: Mapping[str, float]) -> Iterator[str]:
    """One line per bar."""
    yield f"  {'figure':<24} {'bar':>9} {'aim':>7} {'value':>10}"
    for bar in BARS:
        value = figures.get(bar.figure)
        aim = "" if bar.aim is None else f"{bar.aim:g}"
        said = "not measured" if value is None else "holds" if bar.holds(value) else "DOES NOT HOLD"
        shown = "" if value is None else f"{value:g}"
        yield f"  {bar.figure:<24} {f'{bar.sense} {bar.bar:g}':>9} {aim:>7} {shown:>10}  {said}"
