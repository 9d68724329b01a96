"""What a part of the bench gives back, and the arithmetic that the parts share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Result:
    """`figures`: plain numbers, the unit is the end of the name. `samples`: what they were made from,
    milliseconds unless the name ends in another unit. `curve`: one point per size, for the plot."""

    figures: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def figure(self, **figures: float) -> None:
        self.figures |= {name: round(float(value), 3) for name, value in figures.items()}

    def sample(self, name: str, seconds: Sequence[float]) -> None:
        """Kept in milliseconds."""
        self.samples[name] = [round(1000 * each, 3) for each in seconds]


def percentile(samples: Sequence[float], share: float) -> float:
    """Nearest rank, in the unit of the samples."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def milliseconds(name: str, seconds: Sequence[float], *shares: float) -> dict[str, float]:
    """{"NAME_p50_ms": ..., ...} for the shares asked for."""
    return {f"{name}_p{round(100 * share)}_ms": 1000 * percentile(seconds, share) for share in shares}
