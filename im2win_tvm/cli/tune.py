"""`im2win tune`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .fleet import DeviceKeyOption, LocalGpusOption, TrackerOption, fleet
from .metadata import fields
from .options import (
    PROBLEM_HELP,
    SUITE_NAMES,
    AccuracyOption,
    ArchOption,
    DtypeOption,
    LayoutOption,
    TargetOption,
    known_schedule,
    parse_problem,
)
from .progress import progress

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..target import Target
    from ..tuning.search import Proposer
    from ..tuning.session import Result

# What a shell reports of a command that Ctrl-C ended.
_INTERRUPTED = 130


def tune(
    context: typer.Context,
    problems: Annotated[
        list[str] | None, typer.Argument(metavar="[PROBLEM]...", help=PROBLEM_HELP)
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help=f"Every layer of {SUITE_NAMES}.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", "--mb", help="Batch size. Default: the problem's or suite's own."),
    ] = None,
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule", help="Only this one. Default: all that take the problem in its class."
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            min=1,
            help="Most configurations of a problem and schedule. Default: 64; with --again 5.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", help="Begin no further trial of these after so long."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random configurations.")] = 0,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="No search: measure the fastest --trials recorded configurations of each problem "
            "again, also those of other versions. Default without PROBLEM: all that have records.",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Processes that compile. Default: one a processor on cuda, else 1.",
        ),
    ] = None,
    tracker: TrackerOption = None,
    device_key: DeviceKeyOption = None,
    local_gpus: LocalGpusOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FOLDER",
            help="Append records to FOLDER/<device>/<schedule>.jsonl. Default: the first of "
            "$IM2WIN_TUNING_LOGS, else tuning_logs.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write a summary as JSON.")
    ] = None,
) -> None:
    """Search the fastest configurations of problems on this device, and record them.

    The heuristic's configuration first, then those that a schedule's model ranks first, random
    ones, and neighbours of the fastest. Every output is checked; the fastest are measured again as
    `im2win bench` does. Ctrl-C keeps what was measured. Exits with 1 if an output was wrong, or a
    schedule had no right one.
    """
    from ..target import resolve
    from ..tuning import lookup
    from ..tuning.session import Session

    if seconds is not None and not seconds > 0:
        raise typer.BadParameter(f"seconds={seconds}: allowed: more than 0")
    resolved = resolve(target, arch=arch)
    measurer = fleet(context, resolved, tracker, device_key, local_gpus)
    resolved = resolved if measurer is None else measurer.target
    schedule = known_schedule(schedule, resolved.kind)
    place = out or next(iter(lookup.named_places()), Path("tuning_logs"))
    trials = trials or (5 if again else 64)
    chosen = _problems(problems or [], suite, batch, dtype, layout)
    if not (chosen or again):
        raise typer.BadParameter("nothing to tune: name a PROBLEM or --suite")
    plans: _Plans = {}
    if again:
        places = list(dict.fromkeys([place, *lookup.places()]))
        known = _recorded(chosen, resolved, schedule, places, accuracy)
        for problem, name in known:
            plans.setdefault(problem, []).append(name)
    else:
        plans = _supporting(chosen, resolved, schedule, accuracy)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    steps = len(plans) + trials * sum(map(len, plans.values()))
    interrupted, shown = False, 0
    with (
        progress(steps) as step,
        _interrupts() as asked,
        Session(
            resolved, place, jobs, progress=step, interrupted=asked, measurer=measurer
        ) as session,
    ):
        try:
            for problem, names in plans.items():
                proposers = {
                    name: _again_of(problem, name, resolved, trials, known)
                    if again
                    else _search_of(problem, name, resolved, trials, seed)
                    for name in names
                }
                for result in session.tune(problem, proposers, trials, seconds):
                    print("\n".join(_lines(result)), flush=True)
                    shown += 1
        except KeyboardInterrupt:
            interrupted = True
    results = session.results
    for result in results[shown:]:
        print("\n".join(_lines(result)))
    _say_where(place, [session.log(result.schedule) for result in results if result.records])
    if json_path is not None:
        summaries = [_summary(result) for result in results]
        json_path.write_text(json.dumps(summaries, indent=1, allow_nan=False) + "\n")
    if interrupted:
        print("interrupted; what was measured is recorded")
        raise typer.Exit(_INTERRUPTED)
    if any(result.wrong or result.best() is None for result in results):
        raise typer.Exit(1)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """KeyboardInterrupt on Ctrl-C as ever, and whether there was one."""
    seen = []

    def note(number: int, frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


# Problems, each with the names of the schedules to tune.
_Plans = dict["ConvProblem", list[str]]


def _problems(
    texts: list[str], suite_name: str | None, batch: int | None, dtype: str, layout: str | None
) -> list[ConvProblem]:
    from ..suites import suite

    chosen = [parse_problem(text, dtype, layout, batch)[1] for text in texts]
    if suite_name is not None:
        chosen += suite(suite_name, batch, dtype, layout).values()
    return list(dict.fromkeys(chosen))


def _supporting(
    problems: list[ConvProblem], target: Target, schedule: str | None, accuracy: str | None
) -> _Plans:
    """The schedules that take each problem in its class; those of fp32 for tf32 if no other does.

    Raises AccuracyError, and ScheduleError if none does.
    """
    from ..select import supporting

    plans = {}
    for problem in problems:
        found = supporting(problem, target, schedule, accuracy)
        kinds = {name: entry.accuracy(problem) for name, entry in found.items()}
        preferred = next(iter(kinds.values()))
        plans[problem] = [name for name, kind in kinds.items() if kind == preferred]
    return plans


def _search_of(problem: ConvProblem, name: str, target: Target, trials: int, seed: int) -> Proposer:
    from ..schedules import SCHEDULES
    from ..tuning.search import RandomThenClimb, spread

    schedule = SCHEDULES[name]
    configs = list(schedule.configs(problem, target))
    first, explore = [schedule.default(problem, target)], -(-trials // 2)
    cost = {config: schedule.estimate(problem, config, target) for config in configs}
    if None not in cost.values():
        first += spread(sorted(configs, key=cost.__getitem__), explore // 2)
    # Half of the trials look around, half of these where a model points; the other half climb.
    return RandomThenClimb(first, configs, explore, seed)


_Recorded = dict[tuple["ConvProblem", str], list[Any]]


def _recorded(
    problems: list[ConvProblem],
    target: Target,
    schedule: str | None,
    places: list[Path],
    accuracy: str | None,
) -> _Recorded:
    """What is recorded of these problems (of all, if there are none), this schedule and class."""
    from ..accuracy import accepted
    from ..schedules import SCHEDULES
    from ..tuning.lookup import recorded
    from ..tuning.measuring import TuningError
    from ..tuning.records import key_of

    wanted = [key_of(problem) for problem in problems]
    found = {
        (problem, name): configs
        for (problem, name), configs in recorded(places, target).items()
        if schedule in (None, name)
        and (not problems or problem in wanted)
        and SCHEDULES[name].accuracy(problem) == accepted(problem.dtype, accuracy)[0]
    }
    if not found:
        raise TuningError(
            f"--again: no record of these problems on this device in {', '.join(map(str, places))}"
        )
    return found


def _again_of(
    problem: ConvProblem, name: str, target: Target, trials: int, known: _Recorded
) -> Proposer:
    from ..schedules import SCHEDULES
    from ..tuning.search import Listed

    default = SCHEDULES[name].default(problem, target)
    return Listed(list(dict.fromkeys([default, *known[problem, name]]))[:trials])


def _lines(result: Result) -> list[str]:
    """What a person reads of one problem and schedule."""
    from ..bench.units import microseconds, ratio

    problem = result.problem
    heuristic, best = result.best(result.heuristic), result.best()
    text = f"{problem} {problem.dtype} {problem.layout}  {result.schedule}: {result.tried} tried"
    if best is None:
        text += ", none right" if result.wrong or result.errors else ", nothing measured"
    else:
        text += f", best {microseconds(best.time_us)} us"
        if heuristic is not None:
            gain = ratio(heuristic.time_us / best.time_us)
            text += f", heuristic {microseconds(heuristic.time_us)} us ({gain})"
    lines = [text]
    if best is not None:
        lines.append(f"  {fields(best.config)}")
    lines += [f"  WRONG {fields(config)}: {message}" for config, message in result.wrong]
    lines += [f"  {count} not measured: {reason}" for reason, count in result.errors.items()]
    return lines


def _summary(result: Result) -> dict[str, Any]:
    problem = result.problem

    def shown(config: dict[str, Any] | None) -> dict[str, Any] | None:
        record = result.best(config)
        if record is None:
            return None
        return {"config": record.config, "time_us": record.time_us, "protocol": record.protocol}

    return {
        "problem": str(problem),
        "dtype": problem.dtype,
        "layout": problem.layout,
        "schedule": result.schedule,
        "tried": result.tried,
        "heuristic": shown(result.heuristic),
        "best": shown(None),
        "wrong": [{"config": config, "message": text} for config, text in result.wrong],
        "errors": result.errors,
    }


def _say_where(place: Path, logs: list[Path]) -> None:
    from ..tuning import lookup

    for log in dict.fromkeys(logs):
        print(f"records: {log}")
    if logs and place.resolve() not in [known.resolve() for known in lookup.places()]:
        print(f"to use them: export {lookup.VARIABLE}={os.fspath(place.resolve())}")
