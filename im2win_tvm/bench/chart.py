"""A record as a picture: arithmetic rate of the best of each family, by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report, units

__all__ = ["draw"]


def draw(record: dict[str, Any], path: str | Path) -> None:
    """Write grouped bars as PNG: one group a layer, one bar a family."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = record["layers"]
    families = [f for f in report.families(record) if any(report.best(e, f) for e in layers)]
    unit = units.throughput_unit(record["target"]["kind"])
    figure = Figure(figsize=(max(6.0, 1.0 * len(layers) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(families))
    for index, family in enumerate(families):
        rates = [_rate(layer, family, unit) for layer in layers]
        places = [i + (index - (len(families) - 1) / 2) * width for i in range(len(layers))]
        axes.bar(places, rates, width, label=family)
    axes.set_xticks(range(len(layers)), [layer["name"] for layer in layers], rotation=30)
    axes.set_ylabel(unit)
    axes.set_title(report.device_line(record), fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if families:
        axes.legend()
    figure.savefig(path, format="png", dpi=150)


def _rate(layer: dict[str, Any], family: str, unit: str) -> float:
    entry = report.best(layer, family)
    if entry is None:
        return 0.0
    times = entry["times"]
    return units.throughput(layer["flops"], times[next(iter(times))]["median_us"], unit)
