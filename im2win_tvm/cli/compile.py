"""`im2win compile`."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    PROBLEM_HELP,
    AccuracyOption,
    ArchOption,
    BatchSizeOption,
    DtypeOption,
    JobsOption,
    LayoutOption,
    SuitesOption,
    TargetOption,
    distinct_problems,
)
from .progress import progress

if TYPE_CHECKING:
    from ..kernel import Kernel
    from ..problem import ConvProblem
    from ..target import Target


def compile(
    problems: Annotated[
        list[str] | None, typer.Argument(metavar="[PROBLEM]...", help=PROBLEM_HELP)
    ] = None,
    suite: SuitesOption = None,
    batch: BatchSizeOption = None,
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    jobs: JobsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Write FOLDER/<problem>.so. Default: write nothing."
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what came of each as JSON.")
    ] = None,
) -> None:
    """Compile many problems, by their tuning records or else the heuristic; nothing is measured.

    No GPU is needed: --target cuda --arch sm_90 takes the records of any GPU of that architecture.
    What cannot be compiled is told, the rest goes on. Exits with 1 if there was such a problem.
    """
    from ..builds import Builder, Request, default_jobs
    from ..target import resolve

    resolved = resolve(target, arch=arch)
    chosen = distinct_problems(problems or [], suite or [], batch, dtype, layout)
    if not chosen:
        raise typer.BadParameter("nothing to compile: name a PROBLEM or --suite")
    for folder in (out, json_path and json_path.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs or default_jobs(resolved)
    begun = time.monotonic()
    rows = []
    requests = [Request(problem, resolved, accuracy=accuracy) for problem in chosen]
    with progress(len(chosen)) as step, Builder(jobs) as builder:
        built = builder.build(requests)
        for problem, names in chosen.items():
            step(names[0])
            rows.append(_row(problem, names, next(built), resolved, out))
            print(_line(rows[-1]), flush=True)
    counts = Counter(row["origin"] for row in rows)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("record", "heuristic", "failed"))
    print(f"{len(rows)} problems: {told}; {time.monotonic() - begun:.0f} s, {jobs} processes")
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1) + "\n")
    if counts["failed"]:
        raise typer.Exit(1)


def _row(
    problem: ConvProblem,
    names: list[str],
    built: Kernel | Exception,
    target: Target,
    out: Path | None,
) -> dict[str, Any]:
    """What came of a problem: its schedule and where the configuration is from, or the error."""
    row: dict[str, Any] = {
        "names": names,
        "problem": str(problem),
        "dtype": problem.dtype,
        "layout": problem.layout,
        "target": str(target),
    }
    if isinstance(built, Exception):
        return row | {"origin": "failed", "error": str(built) or type(built).__name__}
    schedule = built.metadata["schedule"]
    origin = schedule["origin"]
    row |= {"schedule": schedule["name"], "config": schedule["config"], "origin": origin["kind"]}
    if origin["kind"] == "record":
        row |= {"record": f"{origin['file']}:{origin['line']}", "device": origin["device"]}
    if out is not None:
        name = "-".join((str(problem), problem.dtype, problem.layout))
        row["file"] = str(built.export(out / f"{re.sub(r'[^0-9A-Za-z_-]', '_', name)}.so"))
    return row


def _line(row: dict[str, Any]) -> str:
    name = row["names"][0]
    if "error" in row:
        return f"{name:32} FAILED {row['error'].splitlines()[0]}"
    origin = f"record {row['record']}" if "record" in row else row["origin"]
    return f"{name:32} {row['schedule']:20} {origin}"
