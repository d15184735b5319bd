"""What is printed of a record: one line a layer, ratios, geometric means, gaps and losses."""

from __future__ import annotations

from typing import Any

from . import units
from .rivals import Rival, fastest, median_us, rivals

__all__ = ["aligned", "best", "families", "markdown", "speedup", "table", "text"]


def best(layer: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The fastest implementation of a family that computed the layer; None if none did."""
    return fastest(layer, (family,))


def families(record: dict[str, Any]) -> list[str]:
    """The families in a record, the project's own first."""
    present = [e["family"] for layer in record["layers"] for e in layer["implementations"]]
    return list(dict.fromkeys(present))


def text(record: dict[str, Any]) -> str:
    """The whole report: what was measured how, the table, geometric means, gaps."""
    lines = [*_heading(record), "", *aligned(table(record)), ""]
    detailed = _by_algorithm(record)
    if detailed:
        lines += ["cuDNN by algorithm, us:", *aligned(detailed), ""]
    return "\n".join([*lines, *_summary(record), *_notes(record)])


def table(record: dict[str, Any]) -> list[list[str]]:
    """Heading and one row a layer.

    Times are medians in microseconds, with a cold cache where both states were measured; GB/s
    counts input, weights and output once; ratios are the competitor's time over ours. cuDNN's
    algorithms are one column, its fastest, and its name; `text` lists all of them.
    """
    names = list(
        dict.fromkeys(
            e["name"]
            for layer in record["layers"]
            for e in layer["implementations"]
            if e["family"] != "cudnn"
        )
    )
    present = families(record)
    against = rivals(record)
    by_name = "cudnn" in present
    ceilings = record.get("ceilings")
    hot = _states(record) == ("cold", "hot")
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", *(f"{name} us" for name in names)]
    head += ["cudnn us", "cudnn algorithm"] if by_name else []
    head += ["best im2win", unit, "GB/s", *(["% of SGEMM"] if ceilings else [])]
    head += [f"vs {rival.key}" for rival in against]
    head += [f"{family} hot us" for family in present if hot]
    head += [f"{family} workspace" for family in present]
    rows = [head]
    for layer in record["layers"]:
        entries = {e["name"]: e for e in layer["implementations"]}
        ours = best(layer, "im2win")
        row = [layer["name"], *(_time_cell(entries.get(name)) for name in names)]
        if by_name:
            chosen = best(layer, "cudnn")
            row += [_time_cell(chosen), "-" if chosen is None else _algorithm(chosen)]
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
            row.append(_workspace_cell(best(layer, family)))
        rows.append(row)
    return rows


def speedup(layer: dict[str, Any], rival: Rival) -> float | None:
    """Time of the rival's best over the time of our best: above 1 we are faster."""
    ours, theirs = best(layer, "im2win"), rival.best(layer)
    return None if ours is None or theirs is None else median_us(theirs) / median_us(ours)


def markdown(record: dict[str, Any]) -> str:
    """The README's table: the best of each family, ratios and workspaces."""
    against = [rival for rival in rivals(record) if any(map(rival.best, record["layers"]))]
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", "im2win us", unit, *(f"{rival.label} us" for rival in against)]
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
        row += [_time_cell(rival.best(layer)) for rival in against]
        row += [_ratio_cell(layer, rival) for rival in against]
        row.append(_workspace_cell(ours))
        rows.append(row)
    means = (units.geomean(_speedups(record, rival)) for rival in against)
    bold = [f"**{units.ratio(mean)}**" if mean is not None else "-" for mean in means]
    rows.append(["geomean", "", "", *[""] * len(against), *bold, ""])
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


def _heading(record: dict[str, Any]) -> list[str]:
    protocol, layers = record["protocol"], record["layers"]
    limits = protocol["limits"]
    kinds = sorted({f"{e['dtype']} {e['layout']} batch {e['batch']}" for e in layers})
    return [
        device_line(record),
        f"{record['target']['kind']}, {'; '.join(kinds)}; "
        f"{record['date']}, commit {(record['environment']['git_commit'] or 'unknown')[:12]}",
        f"{protocol['clock']}; {protocol['cache']}; "
        f"warm-up {limits['warmup'] * 1e3:g} ms each, {protocol['order']}, medians",
    ]


def _summary(record: dict[str, Any]) -> list[str]:
    lines = []
    for name, ceiling in (record.get("ceilings") or {}).items():
        rate = (
            f"{ceiling['tflops']:.1f} TFLOPS" if name == "sgemm" else f"{ceiling['gb_s']:.0f} GB/s"
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
    return lines


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
        lines.append(f"{words[status]} {', '.join(names)} ({where}): {reason}")
    if any(
        e.get("times") and e["workspace_bytes"] is None
        for layer in record["layers"]
        for e in layer["implementations"]
    ):
        lines.append("workspace '?': not told by the implementation")
    return lines


def _states(record: dict[str, Any]) -> tuple[str, ...]:
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            if entry.get("times"):
                return tuple(entry["times"])
    return ()


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _by_algorithm(record: dict[str, Any]) -> list[list[str]]:
    """Heading and one row a layer: every algorithm of cuDNN that ran anywhere; empty of none."""
    layers = [
        {e["name"]: e for e in layer["implementations"] if e["family"] == "cudnn"}
        for layer in record["layers"]
    ]
    names = list(dict.fromkeys(n for layer in layers for n, e in layer.items() if e.get("times")))
    if not names:
        return []
    rows = [["layer", *(name.partition(":")[2] for name in names)]]
    for layer, entries in zip(record["layers"], layers, strict=True):
        rows.append([layer["name"], *(_time_cell(entries.get(name)) for name in names)])
    return rows


def _algorithm(entry: dict[str, Any]) -> str:
    return entry["name"].partition(":")[2] or entry["name"]


def _share_cell(layer: dict[str, Any], rate: float, ceilings: dict[str, Any]) -> str:
    """Our rate as a share of the float32 product's; nothing for a layer in another dtype."""
    if layer["dtype"] != "float32":
        return "-"
    return f"{100 * rate / ceilings['sgemm']['tflops']:.0f}"


def _time_cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["status"] == "absent":
        return "-"
    if entry["status"] == "failed":
        return "FAILED"
    return ("~" if entry["status"] == "outside" else "") + units.microseconds(median_us(entry))


def _workspace_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "?" if entry["workspace_bytes"] is None else units.size(entry["workspace_bytes"])


def _ratio_cell(layer: dict[str, Any], rival: Rival) -> str:
    value = speedup(layer, rival)
    return "-" if value is None else units.ratio(value)


def _speedups(record: dict[str, Any], rival: Rival) -> list[float]:
    values = (speedup(layer, rival) for layer in record["layers"])
    return [value for value in values if value is not None]
