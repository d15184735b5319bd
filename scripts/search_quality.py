#!/usr/bin/env python3
"""How good searches are, replayed on logs that have every configuration of a problem.

    python scripts/search_quality.py LOGS [--trials 64] [--seeds 10] [--least 200]

LOGS: a folder as `im2win tune` writes it, in which some problems were measured in full (--trials
above the number of their configurations). Nothing is measured here: a search that asks for a
configuration is given its recorded time. Told of each search: in how many of the seeds it found
95 % of the best there is, and after how many trials in the median.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from im2win_tvm.schedules import SCHEDULES  # noqa: E402
from im2win_tvm.target import CpuTarget, CudaTarget, resolve  # noqa: E402
from im2win_tvm.tuning.lookup import configuration, lines  # noqa: E402
from im2win_tvm.tuning.ranking import Learned  # noqa: E402
from im2win_tvm.tuning.records import Record, RecordError  # noqa: E402
from im2win_tvm.tuning.search import RandomThenClimb, Trial, search, spread  # noqa: E402

_GOOD = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("logs", type=Path)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--least", type=int, default=200, help="configurations of a problem")
    parser.add_argument("--batch", type=int, default=1, help="configurations built at a time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    rows = []
    for (problem, name, target), times in _measured(asked.logs).items():
        if len(times) < asked.least:
            continue
        best = min(times.values())
        default = SCHEDULES[name].default(problem, target)
        heuristic = f"{best / times[default]:.0%}" if default in times else "not measured"
        print(f"{problem} {name}: {len(times)} configurations, heuristic {heuristic} of the best")
        for kind, make in _SEARCHES.items():
            found = [
                _replay(make(problem, name, target, times, asked.trials, seed), times, asked)
                for seed in range(asked.seeds)
            ]
            good = [at for at, _ in found if at is not None]
            median = statistics.median([at or math.inf for at, _ in found])
            part = statistics.mean(share for _, share in found)
            print(f"  {kind:12} {len(good):3} of {asked.seeds} within 5 %, median trial "
                  f"{median:g}, found {part:.1%} of the best", flush=True)  # fmt: skip
            rows.append(
                {
                    "problem": str(problem),
                    "schedule": name,
                    "configurations": len(times),
                    "search": kind,
                    "trials": asked.trials,
                    "seeds": asked.seeds,
                    "good": len(good),
                    "median_trial": median if math.isfinite(median) else None,
                    "share": part,
                }
            )
    if asked.json is not None:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        sys.exit(f"{asked.logs}: no problem with {asked.least} configurations or more")


def _measured(place: Path) -> dict[tuple, dict]:
    """By problem, schedule and target, times by configuration; lost ones infinite.

    One by the full protocol goes before that of the search, whose best may be luck.
    """
    found: dict[tuple, dict] = {}
    for _, (_, record) in lines(place, None):
        if isinstance(record, Record):
            target, schedule = _target(record), SCHEDULES.get(record.schedule)
            if schedule is None or schedule.supports(record.key, target):
                continue
            try:
                config = configuration(record, schedule, record.key, target)
            except RecordError:
                continue
            full = record.protocol == "full"
            times = found.setdefault((record.key, record.schedule, target), {})
            times[config] = max(times.get(config, (False, 0.0)), (full, record.time_us))
    return {key: {c: us for c, (_, us) in times.items()} for key, times in found.items()}


def _target(record: Record) -> CpuTarget | CudaTarget:
    if record.target["kind"] == "cuda":
        arch = record.target["arch"]
        return CudaTarget(arch + "a" * (arch == "sm_90"), record.device)
    threads = record.device.split()[-2]
    return resolve("llvm", threads=int(threads) if threads.isdigit() else None)


def _replay(proposer, times: dict, asked: argparse.Namespace) -> tuple[int | None, float]:
    """After how many trials a search found a good configuration, and how good its best was."""
    best = min(times.values())
    done = search(
        proposer,
        lambda configs: [Trial(config, times.get(config, math.inf)) for config in configs],
        asked.trials,
        asked.batch,
    )
    at = next((i for i, t in enumerate(done, 1) if best / t.time_us >= _GOOD), None)
    return at, best / min(trial.time_us for trial in done)


def _first(problem, name, target, times, trials) -> tuple[list, list, int]:
    schedule, configs, explore = SCHEDULES[name], list(times), -(-trials // 2)
    first = [schedule.default(problem, target)]
    cost = {config: schedule.estimate(problem, config, target) for config in configs}
    if None not in cost.values():
        first += spread(sorted(configs, key=cost.__getitem__), explore // 2)
    return [config for config in first if config in times], configs, explore


def _climbing(problem, name, target, times, trials, seed):
    return RandomThenClimb(*_first(problem, name, target, times, trials), seed)


def _learned(problem, name, target, times, trials, seed):
    first, configs, explore = _first(problem, name, target, times, trials)
    cost = {config: SCHEDULES[name].estimate(problem, config, target) for config in configs}
    return Learned(first, cost, explore, seed, problem)


def _chance(problem, name, target, times, trials, seed):
    return RandomThenClimb([], list(times), trials, seed)


def _model(problem, name, target, times, trials, seed):
    schedule = SCHEDULES[name]
    ranked = sorted(times, key=lambda config: schedule.estimate(problem, config, target) or 0.0)
    return RandomThenClimb(ranked, ranked, trials, seed)


_SEARCHES = {"chance": _chance, "model": _model, "climbing": _climbing, "learned": _learned}


if __name__ == "__main__":
    main()
