#!/usr/bin/env python3
"""What tuning records gain over heuristics, by the times that the logs have. No GPU needed.

    python scripts/recorded_gains.py --suite resnet50 --batches 1,32,128 --device 'NVIDIA H200'

A row for each accuracy class and batch: of how many problems both are on record, for how many of
these selection takes another kernel than the heuristic's, how much faster that is than the
heuristic's record next to it in time, and whose it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm import suites  # noqa: E402
from im2win_tvm.bench import report  # noqa: E402
from im2win_tvm.bench.units import geomean, ratio  # noqa: E402
from im2win_tvm.problem import ConvProblem, ProblemError  # noqa: E402
from im2win_tvm.select import select, untuned  # noqa: E402
from im2win_tvm.suites import SuiteError  # noqa: E402
from im2win_tvm.target import CudaTarget  # noqa: E402
from im2win_tvm.tuning import lookup  # noqa: E402
from im2win_tvm.tuning.records import key_of  # noqa: E402

# By class: the dtype, and how `accuracy` names it.
CLASSES = {
    "fp16": ("float16", None),
    "bf16": ("bfloat16", None),
    "tf32": ("float32", "tf32"),
    "fp32": ("float32", None),
}
HEAD = ["batch", "class", "on record", "another kernel", "gain", "most", "of"]


def gain(
    problem: ConvProblem, target: CudaTarget, accuracy: str | None
) -> tuple[float, str | None] | None:
    """How much faster the selected kernel is, and its schedule, or None if it is the heuristic's.

    None if one of the two is not on record.
    """
    taken, usual = select(problem, target, accuracy=accuracy), untuned(problem, target, accuracy)
    name, config = taken.schedule.name, json.dumps(asdict(usual.config), sort_keys=True)
    if taken.origin.time_us is None or taken.origin.device != target.device:
        return None
    if (name, taken.config) == (usual.schedule.name, usual.config):
        return 1.0, None
    # Times of one kernel differ from day to day by more than kernels do.
    chosen, theirs = [], []
    for path, (number, record) in lookup.lines(lookup.SHIPPED, target.device):
        if isinstance(record, str) or record.key != key_of(problem) or not record.passed:
            continue
        match = lookup.Match(record, None, path, number)
        if (lookup.shown_path(path), number) == (taken.origin.file, taken.origin.line):
            chosen.append(match)
        same = json.dumps(record.config, sort_keys=True) == config
        if same and (record.schedule, record.protocol) == (usual.schedule.name, "full"):
            theirs.append(match)
    if not theirs:
        return None
    beside = min(theirs, key=lambda match: abs(match.seconds - chosen[0].seconds))
    return beside.record.time_us / taken.origin.time_us, name


def row(problems: list[ConvProblem], target: CudaTarget, accuracy: str | None) -> list[str]:
    """The columns of `HEAD` after the first two."""
    found = [each for p in problems if (each := gain(p, target, accuracy)) is not None]
    gains, others = [each for each, _ in found], [name for _, name in found if name is not None]
    counts = Counter(others)
    return [
        f"{len(found)} of {len(problems)}",
        str(len(others)),
        ratio(geomean(gains)) if gains else "-",
        ratio(max(gains)) if gains else "-",
        ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--suite", default="resnet50", choices=sorted(suites.SUITES))
    parser.add_argument("--batches", default="1,32,128", help="comma-separated; %(default)s")
    parser.add_argument("--layout", default="NHWC")
    parser.add_argument("--device", default="NVIDIA H200", help="%(default)s")
    parser.add_argument("--arch", default="sm_90a", help="%(default)s")
    asked = parser.parse_args()
    target = CudaTarget(asked.arch, asked.device)
    rows = [HEAD]
    try:
        for batch in map(int, asked.batches.split(",")):
            for name, (dtype, accuracy) in CLASSES.items():
                problems = suites.suite(asked.suite, batch, dtype, asked.layout)
                rows.append([str(batch), name, *row([*problems.values()], target, accuracy)])
    except (ProblemError, SuiteError, ValueError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(report.aligned(rows)))


if __name__ == "__main__":
    main()
