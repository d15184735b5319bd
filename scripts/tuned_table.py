#!/usr/bin/env python3
"""Tuned, heuristic, and what MetaSchedule finds, side by side.

    python scripts/tuned_table.py --suite paper --batch 128 --dtype float32 --json FILE
    python scripts/tuned_table.py --from FILE...          # the tables of records

Measures on this device, by turns, the kernels that `im2win_tvm.compile` makes with tuning records
and without, and unless --ours is given those that tuning_logs has by MetaSchedule. Each output is
checked. Exits with 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm import suites  # noqa: E402
from im2win_tvm.accuracy import AccuracyError  # noqa: E402
from im2win_tvm.bench import report, tuned  # noqa: E402
from im2win_tvm.bench.run import BenchError, failures, limits_for  # noqa: E402
from im2win_tvm.problem import ProblemError  # noqa: E402
from im2win_tvm.target import TargetError, resolve  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--suite", default="paper", choices=sorted(suites.SUITES))
    parser.add_argument("--layers", metavar="NAMES", help="comma-separated; default: all")
    parser.add_argument("--batch", "--mb", type=int, help="default: the suite's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--accuracy")
    parser.add_argument("--layout", help="default: NCHW")
    parser.add_argument("--target", choices=("cuda", "llvm"), help="default: what is here")
    parser.add_argument("--ours", action="store_true", help="without MetaSchedule's")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="as im2win bench")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--from", type=Path, nargs="+", metavar="FILE", dest="files", default=[])
    asked = parser.parse_args()
    records = [json.loads(path.read_text()) for path in asked.files]
    if not records:
        try:
            records = [_measured(asked)]
        except (AccuracyError, BenchError, ProblemError, TargetError) as error:
            sys.exit(f"error: {error}")
    for record in records:
        layer = record["layers"][0]
        print(f"{layer['accuracy']}, {layer['layout']}, batch {layer['batch']}, {record['device']}")
        print("\n".join(report.aligned(tuned.table(record))))
        print(tuned.total(record))
    wrong = [line for record in records for line in failures(record)]
    if wrong:
        sys.exit("\n".join(["", "wrong:", *wrong]))


def _measured(asked: argparse.Namespace) -> dict:
    target = resolve(asked.target)
    problems = suites.suite(asked.suite, asked.batch, asked.dtype, asked.layout)
    if asked.layers is not None:
        names = [name.strip() for name in asked.layers.split(",")]
        for name in names:
            if name not in problems:
                sys.exit(f"layers={name!r}: allowed: {', '.join(problems)}")
        problems = {name: problems[name] for name in names}
    limits = limits_for(target, asked.time_limit)

    def write(record: dict) -> None:
        if asked.json is not None:
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            asked.json.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")

    record = tuned.measure(
        problems, target, asked.accuracy, not asked.ours, limits, progress=_say, keep=write
    )
    write(record)
    return record


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
