"""Cells of tables, and their alignment: how an entry of a record is written."""

from __future__ import annotations

from typing import Any

from . import units
from .rivals import median_us

__all__ = ["aligned", "time_cell", "workspace_cell"]


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def time_cell(entry: dict[str, Any] | None) -> str:
    """Microseconds, marked where the output is outside its accuracy class."""
    if entry is None or entry["status"] == "absent":
        return "-"
    if entry["status"] == "failed":
        return "FAILED"
    return ("~" if entry["status"] == "outside" else "") + units.microseconds(median_us(entry))


def workspace_cell(entry: dict[str, Any] | None) -> str:
    """Bytes in a unit that fits, ``?`` where the implementation does not tell."""
    if entry is None:
        return "-"
    return "?" if entry["workspace_bytes"] is None else units.size(entry["workspace_bytes"])
