"""The paper's comparison from a record of ours, with the published figures beside it.

Ours and the paper's stand in panels of their own and are never divided by each other: the devices
differ, and so do the protocols (see `published`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import published, report, units
from .rivals import CUDNN_FAMILIES, Rival, median_us

__all__ = ["SIDES", "draw_memory", "draw_rates", "memory", "rates", "summary"]

#: The paper's four implementations by the field names of `published`. cuDNN is the best of all its
#: algorithms, of its engines and of PyTorch's use of them, TF32 off.
SIDES: dict[str, Rival] = {
    "cublas": Rival("cublas", "im2col + cuBLAS", ("cublas",)),
    "cudnn": Rival("cudnn", "cuDNN, best", CUDNN_FAMILIES),
    "direct": Rival("direct", "direct", ("direct",)),
    "im2win": Rival("im2win", "im2win", ("im2win",)),
}

Figures = dict[str, dict[str, float | None]]


def rates(record: dict[str, Any]) -> Figures:
    """TFLOPS of our run by side and layer; None where nothing ran."""

    def rate(layer: dict[str, Any], entry: dict[str, Any]) -> float:
        return units.throughput(layer["flops"], median_us(entry), "TFLOPS")

    return _by_side(record, rate)


def memory(record: dict[str, Any]) -> Figures:
    """Bytes above input, weights and output of the entry that `rates` shows, by side and layer."""
    return _by_side(record, lambda layer, entry: entry["workspace_bytes"])


def _by_side(record: dict[str, Any], figure: Callable[..., float | None]) -> Figures:
    found: Figures = {}
    for side, rival in SIDES.items():
        chosen = {layer["name"]: (layer, rival.best(layer)) for layer in record["layers"]}
        found[side] = {
            name: None if entry is None else figure(layer, entry)
            for name, (layer, entry) in chosen.items()
        }
    return found


def summary(record: dict[str, Any]) -> list[list[str]]:
    """Heading and rows: TFLOPS and memory of each side, the paper's in brackets.

    Memory: ours above input, weights and output; the paper's that of the whole process. The last
    row holds the geometric mean of im2win's speed over each side's.
    """
    speed, taken = rates(record), memory(record)
    rows = [["layer", *(f"{side} TFLOPS" for side in SIDES), *(f"{side} memory" for side in SIDES)]]
    for layer in record["layers"]:
        name = layer["name"]
        row = [name]
        for side in SIDES:
            row.append(_pair(speed[side][name], published.tflops(side).get(name), "{:.2f}".format))
        for side in SIDES:
            mib = published.memory(side).get(name)
            row.append(_pair(taken[side][name], None if mib is None else mib << 20, units.size))
        rows.append(row)
    means = []
    for side in SIDES:
        ours = _mean_ratio(speed["im2win"], speed[side])
        theirs = _mean_ratio(published.tflops("im2win"), published.tflops(side))
        means.append(_pair(ours, theirs, units.ratio))
    rows.append(["im2win / it", *means, *[""] * len(SIDES)])
    return rows


def _pair(ours: Any, theirs: Any, write: Callable[[Any], str]) -> str:
    cell = "-" if ours is None else write(ours)
    return cell if theirs is None else f"{cell} ({write(theirs)})"


def _mean_ratio(
    over: Mapping[str, float | None], under: Mapping[str, float | None]
) -> float | None:
    pairs = [(over[name], under[name]) for name in over]
    return units.geomean([a / b for a, b in pairs if a is not None and b is not None])


def draw_rates(record: dict[str, Any], path: str | Path) -> None:
    """Write TFLOPS by layer as PNG: ours above, the paper's below."""
    theirs: Figures = {side: dict(published.tflops(side)) for side in SIDES}
    _two_panels(record, path, rates(record), theirs, ("TFLOPS", "TFLOPS"))


def draw_memory(record: dict[str, Any], path: str | Path) -> None:
    """Write memory by layer as PNG: ours above the tensors themselves, the paper's of all."""
    ours: Figures = {
        side: {name: None if size is None else size / 2**20 for name, size in layers.items()}
        for side, layers in memory(record).items()
    }
    theirs: Figures = {side: dict(published.memory(side)) for side in SIDES}
    labels = ("MiB above input, weights, output", "MiB of the process")
    _two_panels(record, path, ours, theirs, labels, "symlog")


def _two_panels(
    record: dict[str, Any],
    path: str | Path,
    ours: Figures,
    theirs: Figures,
    labels: tuple[str, str],
    scale: str = "linear",
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [layer["name"] for layer in record["layers"]]
    figure = Figure(figsize=(max(6.0, len(names) + 2), 7), layout="constrained")
    FigureCanvasAgg(figure)
    batch = record["layers"][0]["batch"]
    titles = (f"{report.device_line(record)}; batch {batch}", published.SOURCE)
    width = 0.8 / len(SIDES)
    for panel, figures, label, title in zip(
        figure.subplots(2, 1), (ours, theirs), labels, titles, strict=True
    ):
        for index, (side, rival) in enumerate(SIDES.items()):
            shift = (index - (len(SIDES) - 1) / 2) * width
            heights = [figures[side].get(name) or 0.0 for name in names]
            panel.bar([at + shift for at in range(len(names))], heights, width, label=rival.label)
        panel.set_yscale(scale)
        panel.set_xticks(range(len(names)), names, rotation=30)
        panel.set_ylabel(label)
        panel.set_title(title, fontsize=8)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, format="png", dpi=150)
