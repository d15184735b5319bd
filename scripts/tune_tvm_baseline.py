#!/usr/bin/env python3
"""Tune TVM's own conv2d by MetaSchedule: the competitor `tvm-tuned` of `im2win bench`.

    python scripts/tune_tvm_baseline.py [--layers conv9,conv10] [--trials 64] [--seconds 540]
    python scripts/tune_tvm_baseline.py --dry-run mb1ic16ih16oc32kh3     # no GPU needed

Writes tuning_logs/<device>/metaschedule/<problem>/ after every layer: the best record and where it
came from. Layers that have records are passed over unless --again is given. Needs `pip install
'im2win_tvm[tune]'` and, for --target cuda, a GPU and nvcc or cuda-bindings. Exits with 1 if a layer
has no record in the end, time or not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# MetaSchedule's processes start afresh, and import this package too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])

from im2win_tvm import suites  # noqa: E402
from im2win_tvm.bench import metaschedule_tuning  # noqa: E402
from im2win_tvm.bench.baselines import metaschedule  # noqa: E402
from im2win_tvm.problem import ConvProblem, ProblemError  # noqa: E402
from im2win_tvm.target import Target, TargetError, resolve  # noqa: E402


def chosen(asked: argparse.Namespace, kind: str) -> dict[str, ConvProblem]:
    """Problems by name: descriptors, or the layers of a suite."""
    if asked.problems:
        return {
            text: ConvProblem.parse(text, dtype=asked.dtype, layout=asked.layout)
            for text in asked.problems
        }
    batch = asked.batch or (128 if kind == "cuda" else 1)
    every = suites.suite(asked.suite, batch, asked.dtype, asked.layout)
    if asked.layers is None:
        return every
    names = [name.strip() for name in asked.layers.split(",")]
    for name in names:
        if name not in every:
            sys.exit(f"layers={name!r}: allowed: {', '.join(every)}")
    return {name: every[name] for name in names}


def tune_all(
    problems: dict[str, ConvProblem], target: Target, asked: argparse.Namespace
) -> list[str]:
    """Tune one after the other until time is up; the names of those left without a record."""
    deadline = None if asked.seconds is None else time.monotonic() + asked.seconds
    left = []
    for name, problem in problems.items():
        path = metaschedule.folder(problem, target, asked.out)
        if metaschedule.has_records(path) and not asked.again:
            print(f"{name}: has records in {path}", flush=True)
            continue
        if deadline is not None and time.monotonic() >= deadline:
            left.append(name)
            continue
        try:
            line = metaschedule_tuning.tune(
                problem,
                target,
                asked.trials,
                asked.trials_per_round,
                deadline,
                asked.out,
                asked.seed,
            )
        except Exception as error:  # whatever TVM raises concerns this layer alone
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            left.append(name)
            continue
        print(
            f"{name}: {line['best_us']:.1f} us, {line['ran']} of {line['trials']} candidates ran, "
            f"{line['seconds']:.0f} s; {path}",
            flush=True,
        )
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help="oneDNN descriptors")
    parser.add_argument("--suite", default="paper", choices=sorted(suites.SUITES))
    parser.add_argument("--layers", metavar="NAMES", help="comma-separated; default: the suite's")
    parser.add_argument("--batch", type=int, help="of a suite; default: 128 on cuda, 1 on llvm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout", help="default: NCHW")
    parser.add_argument("--target", choices=("cuda", "llvm"), help="default: what is here")
    parser.add_argument("--trials", type=int, default=64, help="candidates measured a layer")
    parser.add_argument("--trials-per-round", type=int, default=16, metavar="N")
    parser.add_argument(
        "--seconds", type=float, help="of all layers; a round that has begun is finished"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="layers that have records, too")
    parser.add_argument("--out", type=Path, help="default: tuning_logs")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"build candidates for {metaschedule_tuning.DRY_RUN_ARCH}, time and keep none",
    )
    asked = parser.parse_args()
    for field in ("trials", "trials_per_round"):
        if getattr(asked, field) < 1:
            parser.error(f"{field}={getattr(asked, field)}: allowed: whole numbers from 1")
    try:
        target = None if asked.dry_run else resolve(asked.target)
        problems = chosen(asked, "cuda" if target is None else target.kind)
    except (ProblemError, TargetError) as error:  # each names field, value and what is allowed
        sys.exit(f"error: {error}")
    missing = metaschedule_tuning.missing_packages(asked.dry_run)
    if missing:
        sys.exit(f"error: {missing}")
    if target is None:
        for name, problem in problems.items():
            tried, built = metaschedule_tuning.dry_run(problem, asked.trials)
            print(f"{name}: {built} of {tried} candidates built", flush=True)
            if tried == 0 or built < tried:
                sys.exit(1)
        return
    left = tune_all(problems, target, asked)
    if left:
        sys.exit(f"without a record: {', '.join(left)}")


if __name__ == "__main__":
    main()
