"""Measure problems: tensors, every implementation checked and timed, one record."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from shlex import join
from typing import Any

from .. import environment
from ..accuracy import STRICT, TF32, accepted, allowed
from ..builds import build_all, default_jobs
from ..problem import ConvProblem
from ..target import Target
from . import ceilings, timing
from .accuracy import no_tf32
from .baselines import Implementation, Prepared
from .baselines.im2win import Im2win
from .operands import Operands, operands_for

__all__ = ["FORMAT", "BenchError", "failures", "limits_for", "run"]

#: Version of the record's schema.
FORMAT = 1

Progress = Callable[[str], None]


class BenchError(RuntimeError):
    """A measurement that cannot take place here; the text says what is missing."""


def limits_for(target: Target, time_limit: float | None = None) -> timing.Limits:
    """What bounds a measurement: the whole paper suite within a few minutes.

    time_limit: seconds for one implementation of one layer, a third of them warm-up; never more
    than without it, and no less than five calls in each cache state. The record has the result.
    """
    least, most = (10, 50) if target.kind == "cuda" else (3, 100)
    usual = timing.Limits(seconds=0.4, least=least, most=most)
    if time_limit is None:
        return usual
    return timing.Limits(
        warmup=min(usual.warmup, time_limit / 3),
        seconds=min(usual.seconds, 2 * time_limit / 3),
        least=min(least, 5),
        most=most,
    )


def run(
    problems: Mapping[str, ConvProblem],
    target: Target,
    implementations: list[Implementation],
    limits: timing.Limits | None = None,
    progress: Progress = lambda what: None,
    accuracy: str | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Check and time every implementation on every problem; the record, ready for JSON.

    `progress` is told what comes next, once for every kernel built beforehand and every problem.
    `keep` is given the record so far after every problem, without the seconds that all took.
    accuracy: the class that is measured, None for the dtype's own. With tf32 a family that computes
    in it takes part in it alone, on both sides; what computes in fp32 only takes part in that.
    Raises BenchError where the target cannot run here, AccuracyError for a class that a problem's
    dtype does not have.
    """
    started = time.monotonic()
    # First of all, so that a class which a dtype does not have is refused before anything is built.
    entrants = {
        name: _entrants(problem, target, implementations, accuracy)
        for name, problem in problems.items()
    }
    if target.kind == "cuda":
        _require_cuda()
    limits = limits or limits_for(target)
    clock = timing.clock_for(target.kind)
    record = {
        "format": FORMAT,
        "kind": "bench",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": join(["im2win", *sys.argv[1:]]) if _is_command() else None,
        "target": {"kind": target.kind, **asdict(target)},
        "device": environment.device_slug(target),
        "environment": environment.describe() | _torch_details(target),
        "protocol": timing.describe(clock, limits),
        "layers": [],
    }
    _build_ahead(problems, target, entrants, progress)
    if target.kind == "cuda" and problems:
        classes = {accepted(problem.dtype, accuracy)[0] for problem in problems.values()}
        # Where there is no TF32, a product by that name would be another's.
        classes -= {TF32} if no_tf32(target) else set()
        record["ceilings"] = ceilings.measure(clock, limits, sorted(classes))
    for name, problem in problems.items():
        progress(name)
        measured = _measure(problem, target, entrants[name], clock, limits)
        record["layers"].append(
            {
                "name": name,
                "problem": str(problem),
                "dtype": problem.dtype,
                "accuracy": accepted(problem.dtype, accuracy)[0],
                "layout": problem.layout,
                "batch": problem.batch,
                "flops": problem.flops,
                "min_bytes": problem.min_bytes,
                "implementations": measured,
            }
        )
        keep(record)
    record["seconds"] = round(time.monotonic() - started, 1)
    return record


def failures(record: dict[str, Any]) -> list[str]:
    """``layer: implementation: reason`` of every implementation that failed."""
    return [
        f"{layer['name']}: {entry['name']}: {entry['reason']}"
        for layer in record["layers"]
        for entry in layer["implementations"]
        if entry["status"] == "failed"
    ]


def _is_command() -> bool:
    return Path(sys.argv[0]).name == "im2win" or "im2win_tvm" in Path(sys.argv[0]).parts


def _require_cuda() -> None:
    try:
        import torch
    except ImportError:
        raise BenchError(
            "target='cuda': measuring needs PyTorch for its tensors and events; "
            "pip install 'im2win_tvm[torch]'"
        ) from None
    if not torch.cuda.is_available():
        raise BenchError("target='cuda': PyTorch sees no CUDA device here; allowed: target='llvm'")


def _torch_details(target: Target) -> dict[str, Any]:
    if target.kind != "cuda":
        return {}
    import torch

    return {"torch": {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}}


def _entrants(
    problem: ConvProblem,
    target: Target,
    implementations: list[Implementation],
    accuracy: str | None,
) -> list[Implementation]:
    """Those of the implementations that take part on a problem, in their order.

    No gap is left by the others: there is nothing that they could compute, or they do it better.
    """
    preferred, *others = accepted(problem.dtype, accuracy)
    kinds = {entry.name: entry.accuracy(problem) for entry in implementations}
    better = {
        entry.family
        for entry in implementations
        if others and kinds[entry.name] == preferred and entry.available(problem, target) is None
    }

    def takes_part(entry: Implementation) -> bool:
        if accuracy == STRICT and entry.family == Im2win.family and not entry.is_strict(problem):
            return False
        if kinds[entry.name] in others:
            return entry.family not in better
        if kinds[entry.name] == preferred:
            return True
        # A competitor's other class is shown, in no ratio; ours is for whoever asks for it.
        return entry.family != Im2win.family and kinds[entry.name] in allowed(problem.dtype)

    return [entry for entry in implementations if takes_part(entry)]


def _build_ahead(
    problems: Mapping[str, ConvProblem],
    target: Target,
    entrants: Mapping[str, list[Implementation]],
    progress: Progress,
) -> None:
    """Build the project's kernels in several processes, where the target makes that pay."""
    jobs = default_jobs(target)
    if jobs == 1:
        return
    wanted = [
        (entry, problem)
        for name, problem in problems.items()
        for entry in entrants[name]
        if isinstance(entry, Im2win) and entry.available(problem, target) is None
    ]
    requests = [entry.request(problem, target) for entry, problem in wanted]
    built = build_all(requests, min(jobs, len(requests)) or 1)
    for (entry, problem), kernel in zip(wanted, built, strict=True):
        progress(f"build {entry.name}")
        entry.provide(problem, kernel)


def _measure(
    problem: ConvProblem,
    target: Target,
    implementations: list[Implementation],
    clock: timing.Clock,
    limits: timing.Limits,
) -> list[dict[str, Any]]:
    """One entry an implementation, in their order."""
    entries: dict[str, dict[str, Any]] = {}
    ready: dict[str, Prepared] = {}
    operands = operands_for(problem, target.kind)
    for implementation in implementations:
        entry = {
            "name": implementation.name,
            "family": implementation.family,
            "accuracy": implementation.accuracy(problem),
            "status": "absent",
            "reason": implementation.available(problem, target),
        }
        entries[implementation.name] = entry
        if entry["reason"] is not None:
            continue
        prepared = _checked(implementation, operands, target, entry)
        if prepared is not None:
            ready[implementation.name] = prepared
    times = timing.measure({name: p.call for name, p in ready.items()}, clock, limits)
    for name, states in times.items():
        entries[name]["times"] = {state: asdict(value) for state, value in states.items()}
    return list(entries.values())


def _checked(
    implementation: Implementation, operands: Operands, target: Target, entry: dict[str, Any]
) -> Prepared | None:
    """Prepare, run once and check; what came of it goes into `entry`. None: not to be timed."""
    limit = implementation.relative_limit
    try:
        prepared = implementation.prepare(operands, target)
        outcome = operands.check(prepared.view(prepared.call()), entry["accuracy"])
    except Exception as error:
        # A competitor that cannot take the problem is a gap; of our own code it is a failure.
        entry["status"] = "failed" if limit is None else "absent"
        entry["reason"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return None
    entry |= {
        "workspace_bytes": prepared.workspace_bytes,
        "detail": prepared.detail,
        "max_error": _finite(outcome.max_error),
        "relative_error": _finite(outcome.relative_error),
    }
    if outcome.in_class:
        entry["status"] = "ok"
    elif limit is not None and outcome.relative_error <= limit[operands.problem.dtype]:
        entry["status"], entry["reason"] = "outside", outcome.message
    else:
        entry["status"], entry["reason"] = "failed", outcome.message
        return None
    return prepared


def _finite(value: float) -> float | None:
    """JSON has no infinity; an error that is not finite is null."""
    return value if math.isfinite(value) else None
