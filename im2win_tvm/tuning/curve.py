"""Searches as a picture: how fast the best configuration was after each trial."""

from __future__ import annotations

from math import inf
from pathlib import Path

from ..bench.units import geomean
from .result import Result

__all__ = ["best_so_far", "draw"]

# Searches that are told apart by colour; more are thin lines around their mean.
_NAMED = 10


def best_so_far(result: Result) -> list[float]:
    """After each trial of the search, how many times as fast as the heuristic's configuration.

    Zero as long as nothing was right; empty where the heuristic's own was not.
    """
    trials = [record for record in result.records if record.protocol == "search"]
    heuristic = min((r.time_us for r in trials if r.config == result.heuristic), default=inf)
    best, curve = inf, []
    for record in trials if heuristic < inf else []:
        best = min(best, record.time_us)
        curve.append(heuristic / best)
    return curve


def draw(results: list[Result], path: Path, title: str = "") -> None:
    """Write the curves of searches as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    found = [(result, curve) for result in results if (curve := best_so_far(result))]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    few = len(found) <= _NAMED
    for result, curve in found:
        label = f"{result.problem} {result.schedule}" if few else None
        style = {} if few else {"color": "0.7", "linewidth": 0.8}
        axes.step(range(1, len(curve) + 1), curve, where="post", label=label, **style)
    if not few:
        # One that ended early stays where it was.
        longest = max(len(curve) for _, curve in found)
        means = [
            geomean([curve[min(at, len(curve) - 1)] or 1.0 for _, curve in found])
            for at in range(longest)
        ]
        label = f"geometric mean of {len(found)} searches"
        axes.step(range(1, longest + 1), means, where="post", color="C0", label=label)
    axes.set_xlabel("trial")
    axes.set_ylabel("times as fast as the heuristic's configuration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    if found:
        axes.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150)
