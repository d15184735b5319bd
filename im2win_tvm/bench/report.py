"""What is printed of a record: one line a layer, ratios, geometric means, gaps and losses."""

from __future__ import annotations

from typing import Any

from . import units

__all__ = ["best", "families", "markdown", "table", "text"]

_COMPETITORS = ("tvm", "torch")
_LABELS = {"im2win": "im2win", "tvm": "TVM", "torch": "PyTorch"}


def best(layer: dict[str, Any], family: str) -> dict[str, Any] | None:
    """The fastest implementation of a family that computed the layer; None if none did."""
    timed = [e for e in layer["implementations"] if e["family"] == family and e.get("times")]
    return min(timed, key=_us, default=None)


def families(record: dict[str, Any]) -> list[str]:
    """The families in a record, the project's own first."""
    present = [e["family"] for layer in record["layers"] for e in layer["implementations"]]
    return list(dict.fromkeys(present))


def text(record: dict[str, Any]) -> str:
    """The whole report: what was measured how, the table, geometric means, gaps."""
    rows = table(record)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [*_heading(record), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, "", *_summary(record), *_notes(record)])


def table(record: dict[str, Any]) -> list[list[str]]:
    """Heading and one row a layer.

    Times are medians in microseconds, with a cold cache where both states were measured; GB/s
    counts input, weights and output once; ratios are the competitor's time over ours.
    """
    names = list(
        dict.fromkeys(e["name"] for layer in record["layers"] for e in layer["implementations"])
    )
    present = families(record)
    rivals = [family for family in _COMPETITORS if family in present]
    hot = _states(record) == ("cold", "hot")
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", *(f"{name} us" for name in names), "best im2win", unit, "GB/s"]
    head += [f"vs {family}" for family in rivals]
    head += [f"{family} hot us" for family in present if hot]
    head += [f"{family} workspace" for family in present]
    rows = [head]
    for layer in record["layers"]:
        entries = {e["name"]: e for e in layer["implementations"]}
        ours = best(layer, "im2win")
        row = [layer["name"], *(_time_cell(entries.get(name)) for name in names)]
        if ours is None:
            row += ["-", "-", "-"]
        else:
            row += [
                ours["name"],
                f"{units.throughput(layer['flops'], _us(ours), unit):.1f}",
                f"{units.bandwidth(layer['min_bytes'], _us(ours)):.1f}",
            ]
        for family in rivals:
            value = speedup(layer, family)
            row.append("-" if value is None else units.ratio(value))
        for family in present if hot else []:
            entry = best(layer, family)
            row.append("-" if entry is None else units.microseconds(_us(entry, "hot")))
        for family in present:
            row.append(_workspace_cell(best(layer, family)))
        rows.append(row)
    return rows


def speedup(layer: dict[str, Any], family: str) -> float | None:
    """Time of the family's best over the time of our best: above 1 we are faster."""
    ours, theirs = best(layer, "im2win"), best(layer, family)
    return None if ours is None or theirs is None else _us(theirs) / _us(ours)


def markdown(record: dict[str, Any]) -> str:
    """The README's table: the best of each family, ratios and workspaces."""
    present = families(record)
    rivals = [family for family in _COMPETITORS if family in present and _any(record, family)]
    unit = units.throughput_unit(record["target"]["kind"])
    head = ["layer", "im2win us", unit, *(f"{_LABELS[f]} us" for f in rivals)]
    head += [f"vs {_LABELS[f]}" for f in rivals]
    head += ["im2win workspace"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for layer in record["layers"]:
        ours = best(layer, "im2win")
        row = [layer["name"]]
        if ours is None:
            row += ["-", "-"]
        else:
            rate = units.throughput(layer["flops"], _us(ours), unit)
            row += [units.microseconds(_us(ours)), f"{rate:.1f}"]
        row += [_time_cell(best(layer, family)) for family in rivals]
        row += [_ratio_cell(layer, family) for family in rivals]
        row.append(_workspace_cell(ours))
        rows.append(row)
    means = (units.geomean(_speedups(record, family)) for family in rivals)
    bold = [f"**{units.ratio(mean)}**" if mean is not None else "-" for mean in means]
    rows.append(["geomean", "", "", *[""] * len(rivals), *bold, ""])
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
    for family in _COMPETITORS:
        values = _speedups(record, family)
        if not values:
            continue
        wins = sum(value > 1 for value in values)
        lines.append(
            f"vs {family}: geomean {units.ratio(units.geomean(values))} "
            f"({units.ratio(min(values))} to {units.ratio(max(values))}), "
            f"faster on {wins} of {len(values)}"
        )
        lost = [
            f"{layer['name']} {units.ratio(value)}"
            for layer in record["layers"]
            if (value := speedup(layer, family)) is not None and value <= 1
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
    lines = []
    for (status, name, reason), layers in seen.items():
        everywhere = len(layers) == len(record["layers"]) and len(layers) > 1
        where = "all layers" if everywhere else ", ".join(layers)
        lines.append(f"{words[status]} {name} ({where}): {reason}")
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


def _us(entry: dict[str, Any], state: str | None = None) -> float:
    """Median in microseconds; without a state, cold where measured."""
    times = entry["times"]
    return times[state or next(iter(times))]["median_us"]


def _time_cell(entry: dict[str, Any] | None) -> str:
    if entry is None or entry["status"] == "absent":
        return "-"
    if entry["status"] == "failed":
        return "FAILED"
    return ("~" if entry["status"] == "outside" else "") + units.microseconds(_us(entry))


def _workspace_cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "?" if entry["workspace_bytes"] is None else units.size(entry["workspace_bytes"])


def _ratio_cell(layer: dict[str, Any], family: str) -> str:
    value = speedup(layer, family)
    return "-" if value is None else units.ratio(value)


def _speedups(record: dict[str, Any], family: str) -> list[float]:
    values = (speedup(layer, family) for layer in record["layers"])
    return [value for value in values if value is not None]


def _any(record: dict[str, Any], family: str) -> bool:
    return any(best(layer, family) is not None for layer in record["layers"])
