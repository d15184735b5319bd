"""What is printed of a record: one line a layer, ratios, geometric means, gaps and losses."""

from __future__ import annotations

from typing import Any

from ..accuracy import OWN, TF32
from . import algorithms, units
from .ceilings import product
from .cells import aligned, time_cell, workspace_cell
from .rivals import NO_WORKSPACE, Rival, accuracy, fastest, median_us, rivals, wanted

__all__ = ["aligned", "best", "families", "markdown", "speedup", "table", "text"]

#: Families of many entries: one column in the table, and all of them in tables of their own.
_GROUPED = ("cudnn", "cudnn-frontend")
# Rivals whose times fit beside their ratios in the README.
FEW = 3


def best(layer: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The fastest of a family that computed the layer in its own class; None if none did."""
    return fastest(layer, (family,))


def families(record: dict[str, Any]) -> list[str]:
    """The families in a record, the project's own first."""
    present = [e["family"] for layer in record["layers"] for e in layer["implementations"]]
    return list(dict.fromkeys(present))


def text(record: dict[str, Any]) -> str:
    """The whole report: what was measured how, the table, geometric means, gaps."""
    lines = [*_heading(record), "", *aligned(table(record)), "", *algorithms.lines(record)]
    return "\n".join([*lines, *_summary(record), *_notes(record)])


def table(record: dict[str, Any]) -> list[list[str]]:
    """Heading and one row a layer.

    Times are medians in microseconds, with a cold cache where both states were measured; GB/s
    counts input, weights and output once; ratios are the competitor's time over ours, in the
    accuracy class that was asked for. cuDNN's algorithms and engines are one column each, the
    fastest of them, and in float32 another for the fastest with TF32; `text` lists all of them.
    """
    names = list(
        dict.fromkeys(
            e["name"]
            for layer in record["layers"]
            for e in layer["implementations"]
            if e["family"] not in _GROUPED
        )
    )
    present = families(record)
    against = rivals(record)
    grouped = [family for family in _GROUPED if family in present]
    in_tf32 = [
        family
        for family in grouped
        if any(
            wanted(layer) != TF32 and fastest(layer, (family,), of_class=TF32)
            for layer in record["layers"]
        )
    ]
    ceilings = record.get("ceilings")
    hot = _states(record) == ("cold", "hot")
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", *(f"{name} us" for name in names)]
    for family in grouped:
        head += [f"{family} us", *(["cudnn algorithm"] if family == "cudnn" else [])]
        head += [f"{family} tf32 us"] if family in in_tf32 else []
    head += ["best im2win", unit, "GB/s", *([_share_head(record)] if ceilings else [])]
    head += [f"vs {rival.key}" for rival in against]
    head += [f"{family} hot us" for family in present if hot]
    head += [f"{family} workspace" for family in present]
    rows = [head]
    for layer in record["layers"]:
        entries = {e["name"]: e for e in layer["implementations"]}
        ours = best(layer, "im2win")
        row = [layer["name"], *(time_cell(entries.get(name)) for name in names)]
        for family in grouped:
            chosen = best(layer, family)
            row.append(time_cell(chosen))
            if family == "cudnn":
                row.append("-" if chosen is None else algorithms.name_of(chosen))
            if family in in_tf32:
                row.append(time_cell(fastest(layer, (family,), of_class=TF32)))
        if ours is None:
            row += ["-", "-", "-", *(["-"] if ceilings else [])]
        else:
            rate = units.throughput(layer["flops"], median_us(ours), unit)
            bandwidth = units.bandwidth(layer["min_bytes"], median_us(ours))
            row += [ours["name"], f"{rate:.1f}", f"{bandwidth:.1f}"]
            if ceilings:
                row.append(_share_cell(layer, rate, ceilings))
        row += [_ratio_cell(layer, rival) for rival in against]
        for family in present if hot else []:
            entry = best(layer, family)
            row.append("-" if entry is None else units.microseconds(median_us(entry, "hot")))
        for family in present:
            row.append(workspace_cell(best(layer, family)))
        rows.append(row)
    return rows


def speedup(layer: dict[str, Any], rival: Rival) -> float | None:
    """Time of the rival's best over the time of our best: above 1 we are faster."""
    ours, theirs = best(layer, "im2win"), rival.best(layer)
    return None if ours is None or theirs is None else median_us(theirs) / median_us(ours)


def markdown(record: dict[str, Any]) -> str:
    """The README's table: the best of each family, ratios and workspaces.

    With more than FEW rivals their times are left out: ours and the ratios tell them.
    """
    against = [rival for rival in rivals(record) if any(map(rival.best, record["layers"]))]
    timed = against if len(against) <= FEW else []
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", "im2win us", unit, *(f"{rival.label} us" for rival in timed)]
    head += [f"vs {rival.label}" for rival in against]
    head += ["im2win workspace"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for layer in record["layers"]:
        ours = best(layer, "im2win")
        row = [layer["name"]]
        if ours is None:
            row += ["-", "-"]
        else:
            rate = units.throughput(layer["flops"], median_us(ours), unit)
            row += [units.microseconds(median_us(ours)), f"{rate:.1f}"]
        row += [time_cell(rival.best(layer)) for rival in timed]
        row += [_ratio_cell(layer, rival) for rival in against]
        row.append(workspace_cell(ours))
        rows.append(row)
    means = (units.geomean(_speedups(record, rival)) for rival in against)
    bold = [f"**{units.ratio(mean)}**" if mean is not None else "-" for mean in means]
    rows.append(["geomean", "", "", *[""] * len(timed), *bold, ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def device_line(record: dict[str, Any]) -> str:
    """The device and the versions, in one sentence."""
    where = record["environment"]
    versions = where["versions"]
    if record["target"]["kind"] == "cuda":
        smi = where["cuda"]["nvidia_smi"] or {}
        device = f"{where['cuda']['gpu']}, driver {smi.get('driver_version', 'unknown')}"
    else:
        cpu = where["cpu"]
        device = f"{cpu['model']} ({cpu['llvm']}), {cpu['threads']} threads"
    stack = f"Python {versions['python']}, TVM {versions['apache-tvm']}"
    if versions["torch"]:
        stack += f", PyTorch {versions['torch']}"
    return f"{device}; {stack}"


def kind(layer: dict[str, Any]) -> str:
    """What a layer was measured in, its class where that is not its dtype's own."""
    classes = "" if wanted(layer) == OWN[layer["dtype"]] else f", {wanted(layer)}"
    return f"{layer['dtype']} {layer['layout']} batch {layer['batch']}{classes}"


def _heading(record: dict[str, Any]) -> list[str]:
    protocol, layers = record["protocol"], record["layers"]
    limits = protocol["limits"]
    kinds = sorted({kind(layer) for layer in layers})
    return [
        device_line(record),
        f"{record['target']['kind']}, {'; '.join(kinds)}; "
        f"{record['date']}, commit {(record['environment']['git_commit'] or 'unknown')[:12]}",
        f"{protocol['clock']}; {protocol['cache']}; "
        f"warm-up {limits['warmup'] * 1e3:.3g} ms each, {protocol['order']}, medians",
    ]


def _summary(record: dict[str, Any]) -> list[str]:
    lines = []
    for name, ceiling in (record.get("ceilings") or {}).items():
        rate = (
            f"{ceiling['gb_s']:.0f} GB/s" if name == "copy" else f"{ceiling['tflops']:.1f} TFLOPS"
        )
        lines.append(f"ceiling, {ceiling['what']}: {rate}")
    for rival in rivals(record):
        values = _speedups(record, rival)
        if not values:
            continue
        wins = sum(value > 1 for value in values)
        lines.append(
            f"vs {rival.key}: geomean {units.ratio(units.geomean(values))} "
            f"({units.ratio(min(values))} to {units.ratio(max(values))}), "
            f"faster on {wins} of {len(values)}"
        )
        lost = [
            f"{layer['name']} {units.ratio(value)}"
            for layer in record["layers"]
            if (value := speedup(layer, rival)) is not None and value <= 1
        ]
        if lost:
            lines.append(f"  not faster on {', '.join(lost)}")
        if rival.algorithms:
            lines.append(_asked_for(record, rival))
    return lines


def _asked_for(record: dict[str, Any], rival: Rival) -> str:
    """The workspace of those that a rival was: it is a selection by name, not by figure."""
    chosen = [entry for layer in record["layers"] if (entry := rival.best(layer)) is not None]
    sizes = [entry["workspace_bytes"] for entry in chosen]
    return (
        f"  the faster of {' and '.join(NO_WORKSPACE)}; workspace by cuDNN's own figure "
        f"{units.size(min(sizes))} to {units.size(max(sizes))}"
    )


def _notes(record: dict[str, Any]) -> list[str]:
    """Gaps, failures and outputs outside the accuracy class, each reason once."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            if entry["status"] != "ok":
                key = (entry["status"], entry["name"], entry["reason"])
                seen.setdefault(key, []).append(layer["name"])
    words = {"failed": "FAILED", "absent": "-", "outside": "~ outside the accuracy class:"}
    together: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (status, name, reason), layers in seen.items():
        together.setdefault((status, reason, tuple(layers)), []).append(name)
    lines = []
    for (status, reason, layers), names in together.items():
        everywhere = len(layers) == len(record["layers"]) and len(layers) > 1
        where = "all layers" if everywhere else ", ".join(layers)
        lines.append(f"{words[status]} {_named(record, names)} ({where}): {reason}")
    if any(
        e.get("times") and e["workspace_bytes"] is None
        for layer in record["layers"]
        for e in layer["implementations"]
    ):
        lines.append("workspace '?': not told by the implementation")
    told = {
        wanted(layer) == TF32
        for layer in record["layers"]
        for e in layer["implementations"]
        if e.get("times") and accuracy(layer, e) == TF32
    }
    if False in told:
        lines.append("tf32: float32 with TF32 allowed, a class of its own; in no ratio")
    if True in told:
        lines.append(
            "tf32: float32 with TF32 allowed, ours and theirs; who has no TF32 takes part in fp32"
        )
    return lines


def _named(record: dict[str, Any], names: list[str]) -> str:
    """Names in a row, a family of many by its own where all of it is meant."""
    families: dict[str, list[str]] = {}
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            families.setdefault(entry["family"], []).append(entry["name"])
    shown = list(names)
    for family in _GROUPED:
        every = list(dict.fromkeys(families.get(family, [])))
        if len(every) > 1 and set(every) <= set(names):
            shown = [f"{family} (all {len(every)})", *(n for n in shown if n not in every)]
    return ", ".join(shown)


def _states(record: dict[str, Any]) -> tuple[str, ...]:
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            if entry.get("times"):
                return tuple(entry["times"])
    return ()


def _share_head(record: dict[str, Any]) -> str:
    """SGEMM is the float32 product's name; the others go by their class."""
    classes = {wanted(layer) for layer in record["layers"]} - {"fp32"}
    return "% of SGEMM" if not classes else f"% of {'/'.join(sorted(classes))} GEMM"


def _share_cell(layer: dict[str, Any], rate: float, ceilings: dict[str, Any]) -> str:
    """Our rate as a share of the product's in the layer's class; nothing where it is unknown."""
    ceiling = product(ceilings, wanted(layer))
    return "-" if ceiling is None else f"{100 * rate / ceiling['tflops']:.0f}"


def _ratio_cell(layer: dict[str, Any], rival: Rival) -> str:
    """Their time over ours, marked as a time is where their output is outside its class."""
    value = speedup(layer, rival)
    if value is None:
        return "-"
    return ("~" if rival.best(layer)["status"] == "outside" else "") + units.ratio(value)


def _speedups(record: dict[str, Any], rival: Rival) -> list[float]:
    values = (speedup(layer, rival) for layer in record["layers"])
    return [value for value in values if value is not None]
