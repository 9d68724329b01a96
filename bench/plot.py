"""The picture of the README: what a Sandbox costs as their number grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, GRID = "#1f2933", "#d5dbe1"


def draw(curve: list[dict[str, Any]], path: Path) -> None:
    """One small panel per cost, over the number of Sandboxes. Needs matplotlib (the dev extra)."""
    from matplotlib.figure import Figure

    panels = (
        ("per_s", "Ready per second", "#0b7285"),
        ("operator_cpu_ms", "operator CPU, ms each", "#2b8a3e"),
        ("rss_mib", "operator memory, MiB", "#a61e4d"),
        ("writes", "API writes each", "#5f3dc4"),
    )
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    for axes, (name, title, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.plot(
            [point["sandboxes"] for point in curve],
            [point[name] for point in curve],
            color=colour,
            marker="o",
            markersize=3,
        )
        axes.set_ylim(0, 1.2 * max(point[name] for point in curve))
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.tick_params(labelsize=7, colors=INK)
        axes.grid(color=GRID, linewidth=0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Sandboxes", fontsize=8, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
