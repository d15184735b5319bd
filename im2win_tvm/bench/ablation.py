"""What each optimisation of the paper is worth: switched off alone, everything else as it is.

The starting point of a layer is the configuration that the heuristic gives it. Two switches cannot
be turned alone: without shared memory there is nothing to buffer twice, to prefetch into or to keep
a table in, so these go with it; and without the micro-kernel the block's tile shrinks to what the
same number of threads covers with one output each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..problem import ConvProblem
from ..schedules import SCHEDULES, ScheduleError
from ..schedules.cuda_simt import Config
from ..target import CudaTarget, Target
from . import report, timing, units
from .baselines.im2win import Im2win
from .rivals import median_us
from .run import Progress, run

__all__ = ["ALL_ON", "SWITCHES", "ablate", "config_without", "draw", "kept", "table"]

SCHEDULE = "cuda_simt"
ALL_ON = "all on"


def _no_micro_kernel(config: Config) -> Config:
    """One output a thread, in a block of as many threads."""
    return replace(
        config,
        block_m=config.block_m // config.thread_m,
        block_p=config.block_p // config.thread_p,
        thread_m=1,
        thread_p=1,
    )


#: What each switch changes in a configuration.
SWITCHES: dict[str, Callable[[Config], Config]] = {
    ALL_ON: lambda config: config,
    "no shared memory": lambda config: replace(
        config, shared=False, double_buffer=False, prefetch=False, table=False
    ),
    "no micro-kernel": _no_micro_kernel,
    "no double buffer": lambda config: replace(config, double_buffer=False),
    "no prefetch": lambda config: replace(config, prefetch=False),
    "no vector loads": lambda config: replace(config, vector=1),
}


def config_without(switch: str, problem: ConvProblem, target: CudaTarget) -> Config:
    """The layer's default configuration with one switch turned off.

    Raises ScheduleError where the schedule does not take what is left.
    """
    schedule = SCHEDULES[SCHEDULE]
    config = SWITCHES[switch](schedule.default(problem, target))
    reason = schedule.check(config, problem, target)
    if reason is not None:
        raise ScheduleError(f"{switch}: {reason}")
    return config


class Ablated(Im2win):
    """The schedule with one switch turned off, on every problem from the problem's own default."""

    def __init__(self, switch: str) -> None:
        super().__init__(SCHEDULE, name=switch)

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        reason = super().available(problem, target)
        if reason is None:
            try:
                self.config_for(problem, target)
            except ScheduleError as error:
                reason = str(error)
        return reason

    def config_for(self, problem: ConvProblem, target: Target) -> Config:
        return config_without(self.name, problem, target)


def ablate(
    problems: Mapping[str, ConvProblem],
    target: CudaTarget,
    limits: timing.Limits | None = None,
    progress: Progress = lambda what: None,
) -> dict[str, Any]:
    """Check and time every switch on every problem: a record as `run` makes, with what is kept."""
    record = run(problems, target, [Ablated(switch) for switch in SWITCHES], limits, progress)
    return record | {"kind": "ablation", "kept": kept(record)}


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """By switch: the fraction of the speed that is left on each layer, and the geometric mean.

    None where either side was not measured.
    """
    found: dict[str, Any] = {}
    for switch in SWITCHES:
        if switch == ALL_ON:
            continue
        layers = {layer["name"]: _fraction(layer, switch) for layer in record["layers"]}
        values = [value for value in layers.values() if value is not None]
        found[switch] = {"layers": layers, "geomean": units.geomean(values)}
    return found


def _fraction(layer: dict[str, Any], switch: str) -> float | None:
    entries = {entry["name"]: entry for entry in layer["implementations"]}
    base, without = entries.get(ALL_ON), entries.get(switch)
    if not (base and without and base.get("times") and without.get("times")):
        return None
    return median_us(base) / median_us(without)


def table(record: dict[str, Any], published: Mapping[str, float] | None = None) -> list[list[str]]:
    """Heading, a row a layer, the geometric means, and published ones beneath where there are any.

    The first column of figures is the time with everything on, in microseconds.
    """
    fractions = record["kept"]
    rows = [["layer", f"{ALL_ON} us", *fractions]]
    for layer in record["layers"]:
        base = next(e for e in layer["implementations"] if e["name"] == ALL_ON)
        time = units.microseconds(median_us(base)) if base.get("times") else "-"
        values = (each["layers"][layer["name"]] for each in fractions.values())
        rows.append([layer["name"], time, *map(_cell, values)])
    rows.append(["geomean", "", *(_cell(each["geomean"]) for each in fractions.values())])
    if published:
        rows.append(["published", "", *(_cell(published.get(switch)) for switch in fractions)])
    return rows


def _cell(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.2f}"


def draw(
    record: dict[str, Any], path: str | Path, published: Mapping[str, float] | None = None
) -> None:
    """Write grouped bars as PNG: one group a layer and one for the mean, one bar a switch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [layer["name"] for layer in record["layers"]]
    fractions = record["kept"]
    figure = Figure(figsize=(max(6.0, len(names) + 3), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(fractions)
    for index, (switch, each) in enumerate(fractions.items()):
        shift = (index - (len(fractions) - 1) / 2) * width
        values = [*(each["layers"][name] for name in names), each["geomean"]]
        places = [at + shift for at in range(len(values))]
        axes.bar(places, [value or 0.0 for value in values], width, label=switch)
        if published and switch in published:
            axes.scatter([places[-1]], [published[switch]], marker="_", color="black", zorder=3)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names) + 1), [*names, "geomean"], rotation=30)
    axes.set_ylabel("speed kept with one switch off")
    note = "; black marks: the paper's means" if published else ""
    axes.set_title(report.device_line(record) + note, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, format="png", dpi=150)
