"""`im2win tune --verify-logs`: every record replayed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..bench.run import limits_for
from ..bench.units import geomean, ratio
from ..builds import default_jobs
from ..problem import ConvProblem
from ..target import Target
from ..tuning import session
from ..tuning.verifying import STATES, verify
from .progress import progress

__all__ = ["verify_logs"]

# Verdicts that are each worth a line, and make the command fail.
_BAD = ("refused", "failed", "wrong")


def verify_logs(
    places: Iterable[Path],
    target: Target,
    problems: Iterable[ConvProblem],
    schedule: str | None,
    jobs: int | None,
    timed: bool,
    json_path: Path | None,
) -> bool:
    """Replay the records of these places and say what came of it; whether all is well."""
    limits = limits_for(target) if timed else session.SEARCH
    jobs = jobs or default_jobs(target)
    verdicts = []
    with progress(None) as step:
        for verdict in verify(places, target, limits, jobs, problems, schedule, timed):
            step(verdict.where)
            verdicts.append(verdict)
            if verdict.state in _BAD:
                print(f"{verdict.where}: {verdict.state}: {verdict.text}", flush=True)
            elif verdict.faster is not None:
                print(f"{verdict.where}: {ratio(verdict.faster)} as fast as recorded", flush=True)
    counts = Counter(verdict.state for verdict in verdicts)
    print(f"{len(verdicts)} lines: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s]))
    mean = geomean([verdict.faster for verdict in verdicts if verdict.faster is not None])
    if mean is not None:
        print(f"{ratio(mean)} as fast as recorded, geometric mean")
    if json_path is not None:
        json_path.write_text(json.dumps([each._asdict() for each in verdicts], indent=1) + "\n")
    return not any(counts[state] for state in _BAD)
