"""A record under the device's two ceilings: arithmetic rate by FLOP a byte, one point a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report, units
from .ceilings import product
from .rivals import fastest, median_us, wanted

__all__ = ["RooflineError", "attainable", "draw", "points"]


class RooflineError(ValueError):
    """A record without measured ceilings."""


def attainable(intensity: float, ceilings: dict[str, Any], accuracy: str = "fp32") -> float:
    """TFLOPS under both ceilings of an accuracy class at `intensity` FLOP a byte."""
    return min(product(ceilings, accuracy)["tflops"], intensity * ceilings["copy"]["gb_s"] / 1e3)


def points(record: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(layer, FLOP a byte of input, weights and output once, TFLOPS) of our best."""
    found = []
    for layer in record["layers"]:
        ours = fastest(layer, ("im2win",))
        if ours is not None:
            rate = units.throughput(layer["flops"], median_us(ours), "TFLOPS")
            found.append((layer["name"], layer["flops"] / layer["min_bytes"], rate))
    return found


def draw(record: dict[str, Any], path: str | Path) -> None:
    """Write the roofline as PNG. Raises RooflineError where no ceilings were measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ceilings = record.get("ceilings")
    if ceilings is None:
        kind = record["target"]["kind"]
        raise RooflineError(f"roofline: ceilings are measured on cuda only; the record is {kind}")
    classes = list(dict.fromkeys(map(wanted, record["layers"])))
    if missing := [each for each in classes if product(ceilings, each) is None]:
        raise RooflineError(f"roofline: the record has no measured product of {missing[0]}")
    measured = points(record)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tops = {each: product(ceilings, each)["tflops"] for each in classes}
    ridges = [top * 1e3 / ceilings["copy"]["gb_s"] for top in tops.values()]
    reach = [*ridges, *(intensity for _, intensity, _ in measured)]
    low, high = min(reach) / 2, max(reach) * 2
    for each, ridge in zip(classes, ridges, strict=True):
        ends = [low, ridge, high]
        rates = [attainable(at, ceilings, each) for at in ends]
        axes.plot(ends, rates, color="black", label=f"ceilings, {each}")
    # Layers of like intensity lie close together: their names go below and above by turns.
    for index, (name, intensity, rate) in enumerate(sorted(measured, key=lambda each: each[1])):
        above = index % 2
        axes.plot(intensity, rate, "o", color="C0")
        axes.annotate(
            name,
            (intensity, rate),
            (0, 8 if above else -8),
            textcoords="offset points",
            fontsize=7,
            rotation=60,
            ha="left" if above else "right",
            va="bottom" if above else "top",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(top=1.4 * max(*tops.values(), *(rate for _, _, rate in measured), 0.0))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("FLOP a byte (input, weights and output once)")
    axes.set_ylabel("TFLOPS")
    copy = ceilings["copy"]
    products = (product(ceilings, each) for each in classes)
    told = [f"{each['what']}: {each['tflops']:.1f} TFLOPS" for each in products]
    told.append(f"{copy['what']}: {copy['gb_s']:.0f} GB/s")
    axes.set_title(
        f"{report.device_line(record)}\n{'; '.join(told)}",
        fontsize=8,
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
