"""An artifact's metadata as lines of text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..bench import units

# Characters of a value that a line shows.
_LONGEST = 80


def shown_accuracy(shown: dict[str, Any]) -> str:
    """The accuracy class, and the rule where it does not hold for every input."""
    return shown["accuracy"] + ("" if shown.get("strict", True) else ", fast: see docs/accuracy.md")


def summary(metadata: dict[str, Any]) -> list[str]:
    """What a kernel computes, how, for which machine, and what it needs."""
    problem, target = metadata["problem"], metadata["target"]
    schedule, epilogue = metadata["schedule"], metadata["epilogue"]
    extras = [name for name in ("bias", "residual") if epilogue[name]]
    extras += [epilogue["activation"]] if epilogue["activation"] else []
    where = target["arch"] if target["kind"] == "cuda" else target["cpu"]
    workspace = sum(_bytes(metadata["arguments"][name]) for name in metadata["workspaces"])
    rows = {
        "problem": f"{metadata['descriptor']} {problem['dtype']} {problem['layout']}",
        "epilogue": " + ".join(extras) or "none",
        "accuracy": shown_accuracy(metadata),
        "schedule": schedule["name"],
        "config": fields(schedule["config"]),
        "from": _origin(schedule.get("origin")),
        "target": f"{target['kind']} {where} on {target['machine']}",
        "workspace": units.size(workspace),
        "scratch/thread": units.size(metadata["scratch_bytes_per_thread"]),
        "calls": ", ".join(
            f"{call['function']}({', '.join(call['arguments'])})" for call in metadata["calls"]
        ),
        "versions": fields(metadata["versions"]),
    }
    return [f"{name:<16} {value}" for name, value in rows.items()]


def fields(values: dict[str, Any]) -> str:
    """``name=value`` pairs on one line; of a long text, such as a trace, the beginning."""
    shown = {name: str(value) for name, value in values.items()}
    return " ".join(
        f"{name}={text if len(text) <= _LONGEST else text[:_LONGEST] + '...'}"
        for name, text in shown.items()
    )


def _origin(origin: dict[str, Any] | None) -> str:
    """Where a configuration came from; kernels of earlier versions do not say."""
    if origin is None:
        return "not told"
    where = f" {origin['file']}:{origin['line']}" if origin["kind"] == "record" else ""
    return origin["kind"] + where


def _bytes(argument: dict[str, Any]) -> int:
    return math.prod(argument["shape"]) * np.dtype(argument["dtype"]).itemsize
