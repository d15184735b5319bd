"""A record as CSV: one row for every implementation of every layer."""

from __future__ import annotations

import csv
import io
from typing import Any

from . import units
from .rivals import accuracy, median_us

__all__ = ["COLUMNS", "text"]

_STATES = ("cold", "hot", "warm")
#: Times in microseconds, rates from the first state measured, sizes in bytes.
COLUMNS = (
    "layer", "problem", "dtype", "layout", "batch", "implementation", "family", "accuracy",
    "status", "reason",
    *(f"{state}_{what}" for state in _STATES for what in ("us", "iqr_us", "n")),
    "tflops", "gb_s", "workspace_bytes", "relative_error", "max_error",
)  # fmt: skip


def text(record: dict[str, Any]) -> str:
    """The whole file, with a heading; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for layer in record["layers"]:
        for entry in layer["implementations"]:
            writer.writerow(_row(layer, entry))
    return out.getvalue()


def _row(layer: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    row = {field: layer[field] for field in ("problem", "dtype", "layout", "batch")}
    row |= {"layer": layer["name"], "implementation": entry["name"]}
    row["accuracy"] = accuracy(layer, entry)
    fields = ("family", "status", "reason", "workspace_bytes", "relative_error", "max_error")
    row |= {field: entry.get(field) for field in fields}
    times = entry.get("times")
    for state, value in (times or {}).items():
        row |= {
            f"{state}_us": value["median_us"],
            f"{state}_iqr_us": value["iqr_us"],
            f"{state}_n": value["n"],
        }
    if times:
        us = median_us(entry)
        row["tflops"] = f"{units.throughput(layer['flops'], us, 'TFLOPS'):.6g}"
        row["gb_s"] = f"{units.bandwidth(layer['min_bytes'], us):.6g}"
    return {field: value for field, value in row.items() if value is not None}
