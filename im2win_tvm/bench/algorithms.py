"""What a report says of cuDNN by name: every algorithm, and the engine of each best plan."""

from __future__ import annotations

from typing import Any

from ..accuracy import TF32
from .cells import aligned, time_cell, workspace_cell
from .rivals import accuracy

__all__ = ["lines", "name_of"]


def name_of(entry: dict[str, Any]) -> str:
    """The algorithm, its format and its class, as in ``FFT nhwc tf32``."""
    return entry["name"].partition(":")[2] or entry["name"]


def lines(record: dict[str, Any]) -> list[str]:
    """Tables with their headings, each with an empty line after it; none where nothing ran."""
    found = []
    for tf32 in (False, True):
        rows = _algorithms(record, tf32)
        if rows:
            heading = "cuDNN by algorithm, us (workspace"
            found += [f"{heading}){', TF32 allowed' if tf32 else ''}:", *aligned(rows), ""]
    rows = _engines(record)
    if rows:
        found += ["cuDNN's engines, the fastest plan of each format:", *aligned(rows), ""]
    return found


def _timed(layer: dict[str, Any], family: str) -> list[dict[str, Any]]:
    return [e for e in layer["implementations"] if e["family"] == family and e.get("times")]


def _algorithms(record: dict[str, Any], tf32: bool) -> list[list[str]]:
    """Heading and one row a layer: every algorithm of this class that ran anywhere."""
    layers = [
        {e["name"]: e for e in _timed(layer, "cudnn") if (accuracy(layer, e) == TF32) == tf32}
        for layer in record["layers"]
    ]
    names = {name: name_of(entry) for entries in layers for name, entry in entries.items()}
    if not names:
        return []
    rows = [["layer", *names.values()]]
    for layer, entries in zip(record["layers"], layers, strict=True):
        rows.append([layer["name"], *(_cell(entries.get(name)) for name in names)])
    return rows


def _cell(entry: dict[str, Any] | None) -> str:
    return time_cell(entry) + ("" if entry is None else f" ({workspace_cell(entry)})")


def _engines(record: dict[str, Any]) -> list[list[str]]:
    """Heading and one row an entry of the graph API."""
    rows = [["layer", "entry", "us", "workspace", "plans timed", "engine"]]
    for layer in record["layers"]:
        for entry in _timed(layer, "cudnn-frontend"):
            detail = entry["detail"]
            rows.append(
                [
                    layer["name"],
                    entry["name"].partition(" ")[2],
                    time_cell(entry),
                    workspace_cell(entry),
                    str(detail["plans"]["timed"]),
                    detail["engine"],
                ]
            )
    return rows if len(rows) > 1 else []
