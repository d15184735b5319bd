"""What `im2win tune` says in the end: lines for a person, a summary for a program."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path
from typing import Any

from ..bench.units import microseconds, ratio
from ..problem import ConvProblem
from ..tuning import lookup
from ..tuning.plan import Plan
from ..tuning.records import Record
from ..tuning.result import NOT_BUILT, Result
from .metadata import fields

__all__ = ["lines", "summary", "total", "where"]


def lines(result: Result) -> list[str]:
    """What came of one problem and schedule."""
    problem = result.problem
    heuristic, best = result.best(result.heuristic), result.best()
    text = f"{problem} {problem.dtype} {problem.layout}  {result.schedule}: {result.tried} tried"
    if result.replayed:
        text += f" ({result.replayed} of them before)"
    if best is None:
        text += ", none right" if result.wrong or result.errors else ", nothing measured"
    else:
        text += f", best {microseconds(best.time_us)} us"
        if heuristic is not None:
            gain = ratio(heuristic.time_us / best.time_us)
            text += f", heuristic {microseconds(heuristic.time_us)} us ({gain})"
    found = [text]
    if best is not None:
        found.append(f"  {fields(best.config)}")
    found += [f"  WRONG {fields(config)}: {message}" for config, message in result.wrong]
    for reason, count in result.errors.items():
        found.append(f"  {count} {reason if reason.startswith(NOT_BUILT) else f'lost: {reason}'}")
    return found


def total(plans: list[Plan], results: list[Result]) -> list[str]:
    """The time of all convolutions of a model, each as often as it has it; nothing of others."""
    if all(plan.count == 1 for plan in plans):
        return []
    best = _sum(plans, results, lambda result: result.best())
    heuristic = _sum(plans, results, lambda result: result.best(result.heuristic))
    if best == inf:
        return ["all convolutions: some have no time"]
    text = f"all {sum(plan.count for plan in plans)} convolutions: {microseconds(best)} us"
    if heuristic < inf:
        text += f", by the heuristic {microseconds(heuristic)} us ({ratio(heuristic / best)})"
    return [text]


def _sum(plans: list[Plan], results: list[Result], chosen: Any) -> float:
    """Over the plans, the fastest of their schedules; infinite where one has no time."""
    times: dict[ConvProblem, float] = {}
    for result in results:
        record = chosen(result)
        if record is not None:
            times[result.problem] = min(times.get(result.problem, inf), record.time_us)
    return sum(plan.count * times.get(plan.problem, inf) for plan in plans)


def summary(result: Result) -> dict[str, Any]:
    """The same of one problem and schedule as JSON has it."""
    problem = result.problem

    def shown(record: Record | None) -> dict[str, Any] | None:
        if record is None:
            return None
        return {"config": record.config, "time_us": record.time_us, "protocol": record.protocol}

    return {
        "problem": str(problem),
        "dtype": problem.dtype,
        "layout": problem.layout,
        "schedule": result.schedule,
        "tried": result.tried,
        "replayed": result.replayed,
        "heuristic": shown(result.best(result.heuristic)),
        "best": shown(result.best()),
        "wrong": [{"config": config, "message": text} for config, text in result.wrong],
        "errors": result.errors,
    }


def where(place: Path, logs: list[Path]) -> list[str]:
    """Where records went, and what to do for them to be used."""
    found = [f"records: {log}" for log in dict.fromkeys(logs)]
    if logs and place.resolve() not in [known.resolve() for known in lookup.places()]:
        found.append(f"to use them: export {lookup.VARIABLE}={os.fspath(place.resolve())}")
    return found
