#!/usr/bin/env python3
"""Tune by MetaSchedule: the im2win expressions, and TVM's own conv2d beside them.

    python scripts/tune_metaschedule.py --layers conv9,conv12 --trials 32 --processes 4
    python scripts/tune_metaschedule.py mb1ic16ih16oc32kh3 --target llvm --expressions im2win
    python scripts/tune_metaschedule.py --dry-run mb1ic16ih16oc32kh3     # no GPU needed

For each layer in turn: a search over the im2win expressions, whose fastest are checked and measured
like any configuration and recorded in tuning_logs/<device>/<cpu or cuda>_metaschedule.jsonl, where
`im2win_tvm.compile` finds them; then one over conv2d, for the competitor `tvm-tuned`, whose best
goes to tuning_logs/<device>/metaschedule/<problem>/ with where it came from. What has records is
passed over unless --again is given. Everything is written as it is found. Side by side with the
hand-written schedules afterwards:

    python scripts/tuned_table.py --suite paper --batch 128

Needs `pip install 'im2win_tvm[tune]'`, and for --target cuda a GPU and nvcc or cuda-bindings. Exits
with 1 if something has no record in the end, time or not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# MetaSchedule's processes start afresh, and import this package too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])

from im2win_tvm import suites  # noqa: E402
from im2win_tvm.bench import metaschedule_machinery, metaschedule_tuning  # noqa: E402
from im2win_tvm.bench.baselines.metaschedule import folder, has_records  # noqa: E402
from im2win_tvm.bench.baselines.tvm_default import choose_cuda_compiler  # noqa: E402
from im2win_tvm.bench.run import limits_for  # noqa: E402
from im2win_tvm.problem import ConvProblem, ProblemError  # noqa: E402
from im2win_tvm.target import Target, TargetError, resolve  # noqa: E402
from im2win_tvm.tuning import lookup, metaschedule  # noqa: E402
from im2win_tvm.tuning.measuring import Measurer  # noqa: E402
from im2win_tvm.tuning.records import key_of  # noqa: E402
from im2win_tvm.tuning.session import Session  # noqa: E402

EXPRESSIONS = ("im2win", "conv2d")


def chosen(asked: argparse.Namespace, kind: str) -> dict[str, ConvProblem]:
    """Problems by name: descriptors, or layers of a suite."""
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


def recorded(problem: ConvProblem, expression: str, target: Target, asked) -> bool:
    """Whether there is a record of a search over this expression."""
    if expression == "conv2d":
        return has_records(folder(problem, target, asked.out))
    name = metaschedule.schedule_of(asked.space, target)
    return (key_of(problem), name) in lookup.recorded([asked.out], target)


def dry_run(problems: dict[str, ConvProblem], trials: int) -> None:
    """Build candidates of conv2d; exit with 1 where one cannot be built."""
    for name, problem in problems.items():
        tried, built = metaschedule_tuning.dry_run(problem, trials)
        print(f"{name}: {built} of {tried} candidates built", flush=True)
        if tried == 0 or built < tried:
            sys.exit(1)


def searched(
    problem: ConvProblem, expression: str, target: Target, session: Session, asked, machinery: dict
) -> float:
    """Search one expression; the time of the best in microseconds, as its record has it."""
    machinery = dict(machinery)
    if asked.population is not None:
        from tvm.s_tir import meta_schedule as ms

        machinery["strategy"] = ms.search_strategy.EvolutionarySearch(
            population_size=asked.population,
            init_measured_ratio=0.2,
            init_min_unmeasured=min(50, asked.trials_per_round),
            max_fail_count=100,
            genetic_num_iters=3,
        )
    if expression == "im2win":
        result = metaschedule.tune(
            session,
            problem,
            target,
            asked.trials,
            asked.trials_per_round,
            asked.seconds,
            asked.seed,
            asked.space,
            **machinery,
        )
        best = result.best()
        if best is None:
            reasons = [*result.errors, *(message for _, message in result.wrong)]
            raise metaschedule.TuningError(f"{problem}: nothing right: {'; '.join(reasons)}")
        return best.time_us
    line = metaschedule_tuning.tune(
        problem,
        target,
        asked.trials,
        asked.trials_per_round,
        None if asked.seconds is None else time.monotonic() + asked.seconds,
        asked.out,
        asked.seed,
        **machinery,
    )
    return line["best_us"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("problems", nargs="*", metavar="PROBLEM", help="oneDNN descriptors")
    parser.add_argument("--suite", default="paper", choices=sorted(suites.SUITES))
    parser.add_argument("--layers", metavar="NAMES", help="comma-separated; default: the suite's")
    parser.add_argument("--batch", "--mb", type=int, help="of a suite; default: 128, on llvm 1")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout", help="default: NCHW")
    parser.add_argument("--target", choices=("cuda", "llvm"), help="default: what is here")
    parser.add_argument(
        "--expressions", default=",".join(EXPRESSIONS), help="comma-separated; %(default)s"
    )
    parser.add_argument(
        "--space",
        default="rules",
        choices=metaschedule.SPACES,
        help="of im2win: TVM's rules, or the tiles of a hand-written schedule; %(default)s",
    )
    parser.add_argument("--trials", type=int, default=64, help="of each search; %(default)s")
    parser.add_argument("--trials-per-round", type=int, default=16, metavar="N")
    parser.add_argument(
        "--seconds", type=float, help="of each search; a round that has begun is finished"
    )
    parser.add_argument(
        "--total-seconds", type=float, help="no further search begins after so long"
    )
    parser.add_argument(
        "--population",
        type=int,
        help="of TVM's evolutionary search, as it begins itself; default: TVM's, 512; on cuda 64, "
        "bred from samples that fit a GPU",
    )
    parser.add_argument(
        "--time-limit", type=float, help="seconds of each measurement; default: as im2win bench"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="searches at a time, which take turns on the GPU; %(default)s",
    )
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="who locks it (flock) uses the GPU alone"
    )
    parser.add_argument("--jobs", type=int, help="processors for all of them; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="what has records, too")
    parser.add_argument("--out", type=Path, default=ROOT / "tuning_logs")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"build conv2d's for {metaschedule_tuning.DRY_RUN_ARCH}, time and keep none",
    )
    asked = parser.parse_args()
    expressions = asked.expressions.split(",")
    for name in expressions:
        if name not in EXPRESSIONS:
            parser.error(f"--expressions: {name!r}: allowed: {', '.join(EXPRESSIONS)}")
    for field in ("trials", "trials_per_round", "processes"):
        if getattr(asked, field) < 1:
            parser.error(f"{field}={getattr(asked, field)}: allowed: whole numbers from 1")
    try:
        target = None if asked.dry_run else resolve(asked.target)
        problems = chosen(asked, "cuda" if target is None else target.kind)
    except (ProblemError, TargetError) as error:  # each names field, value and what is allowed
        sys.exit(f"error: {error}")
    if target is not None and target.kind != "cuda" and asked.processes > 1:
        parser.error(f"processes={asked.processes}: allowed on {target.kind}: 1, for its times")
    missing = metaschedule_tuning.missing_packages(asked.dry_run)
    if missing:
        sys.exit(f"error: {missing}")
    if target is None:
        dry_run(problems, asked.trials)
        return
    jobs = [
        (name, problem, expression)
        for name, problem in problems.items()
        for expression in expressions
        if asked.again or not recorded(problem, expression, target, asked)
    ]
    for name in problems:
        known = [e for e in expressions if not any(job[::2] == (name, e) for job in jobs)]
        if known:
            print(f"{name}: has records of {', '.join(known)} in {asked.out}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        failed = _all(jobs, target, asked, asked.lock or Path(folder) / "gpu")
    if failed:
        sys.exit(f"without a record: {', '.join(failed)}")


def _all(jobs: list[tuple], target: Target, asked, lock: Path) -> list[str]:
    """Do the searches, in one process or several; what has no record."""
    end = None if asked.total_seconds is None else time.monotonic() + asked.total_seconds
    if asked.processes == 1:
        waiting: queue.SimpleQueue = queue.SimpleQueue()
        ended: queue.SimpleQueue = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        _some(waiting, ended, target, asked, asked.lock, end)
        return [ended.get() for _ in range(ended.qsize())]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        waiting, ended = manager.Queue(), manager.Queue()
        for job in jobs:
            waiting.put(job)
        given = (waiting, ended, target, asked, lock, end)
        processes = [context.Process(target=_some, args=given) for _ in range(asked.processes)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [ended.get() for _ in range(ended.qsize())]
        # A process that did not end well has not told what it had.
        failed += [
            f"what a process had that ended with {p.exitcode}" for p in processes if p.exitcode
        ]
        return failed + [f"{waiting.get()[0]} and others" for _ in range(min(1, waiting.qsize()))]


def _some(waiting, ended, target: Target, asked, lock: Path | None, end: float | None) -> None:
    """Searches, one after the other, until none is left; the labels of those without a record."""
    share = max(1, len(os.sched_getaffinity(0)) // asked.processes)
    if asked.jobs is not None:
        share = max(1, asked.jobs // asked.processes)
    machinery = {}
    if target.kind == "cuda":
        choose_cuda_compiler()
        machinery = {
            "builder": metaschedule_machinery.builder(share),
            "runner": metaschedule_machinery.runner(lock),
            "num_tuning_cores": share,
        }
    limits = limits_for(target, asked.time_limit)
    # Given, because conv2d's searches do not need what a session measures with.
    measurer = Measurer(target.kind, lock=lock)
    with Session(target, asked.out, share, limits, measurer=measurer) as session:
        while True:
            try:
                name, problem, expression = waiting.get_nowait()
            except queue.Empty:
                return
            label, start = f"{name} {expression}", time.monotonic()
            if end is not None and start >= end:
                ended.put(label)
                continue
            try:
                best_us = searched(problem, expression, target, session, asked, machinery)
            except Exception as error:  # whatever TVM raises concerns this search alone
                print(f"{label}: {type(error).__name__}: {error}", flush=True)
                ended.put(label)
                continue
            seconds = time.monotonic() - start
            print(f"{label}: {best_us:.1f} us; searched for {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
