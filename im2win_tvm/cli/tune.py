"""`im2win tune`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shlex import join
from typing import TYPE_CHECKING, Annotated

import typer

from .fleet import DeviceKeyOption, LocalGpusOption, TrackerOption, fleet
from .model_files import MODEL_FILES, chosen_dtype, model_in, refuse
from .options import (
    PROBLEM_HELP,
    AccuracyOption,
    ArchOption,
    BatchOption,
    DtypeOption,
    JobsOption,
    LayoutOption,
    SuitesOption,
    TargetOption,
    distinct_problems,
    known_schedule,
)

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..target import Target
    from ..tuning.plan import Plan

# What a shell reports of a command that Ctrl-C ended.
_INTERRUPTED = 130


def tune(
    context: typer.Context,
    problems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROBLEM|MODEL]...",
            help=f"{PROBLEM_HELP} Or a model in a file, {MODEL_FILES}: its distinct convolutions, "
            "each as important as it is frequent.",
        ),
    ] = None,
    suite: SuitesOption = None,
    batch: BatchOption = None,
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
            help="Most configurations of a problem and schedule. Default: 64; with --again 5. A "
            "schedule whose first takes twice as long as that of another has no more, unless it is "
            "named, and one that is far behind after a quarter ends there.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds", help="Begin no further trial of a problem and schedule after so long."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            help="Begin no further trial of anything after so long, shared out among the problems. "
            "The last measurements of the fastest come on top.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the random configurations.")] = 0,
    learn: Annotated[
        bool,
        typer.Option(
            "--learn",
            help="Let XGBoost, trained on these trials and on records of other problems, choose "
            "the second half of the trials, instead of neighbours of the fastest.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an earlier session stopped: what is in the log, with the versions of "
            "today, counts as if it was measured now. Repeat the other options.",
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="No search: measure the fastest --trials recorded configurations of each problem "
            "again, also those of other versions and of other GPUs of the architecture. Default "
            "without PROBLEM: all that have records.",
        ),
    ] = False,
    verify_logs: Annotated[
        bool,
        typer.Option(
            "--verify-logs",
            help="No search: build every record again (of each PROBLEM, else all) and check its "
            "output, where its device is here. With --again compare its time, too. Writes nothing.",
        ),
    ] = False,
    jobs: JobsOption = None,
    lock: Annotated[
        Path | None,
        typer.Option(
            "--lock",
            metavar="FILE",
            help="Of several commands that name FILE one measures at a time: while it does, the "
            "others build. For searches side by side on one GPU, with --jobs a share of the "
            "processors each. Waiting counts for --seconds and --time-limit.",
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
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", metavar="FILE", help="Draw how fast the best was after each trial, as PNG."
        ),
    ] = None,
) -> None:
    """Search the fastest configurations of problems on this device, and record them.

    The heuristic's configuration first, then the fastest on record of other GPUs of the
    architecture, of the problem or those next to it, those that a schedule's model ranks first,
    random ones, and neighbours of the fastest. Every output is checked; the fastest are measured
    again as `im2win bench` does. Whatever ends it, at most the trial under way is lost; --resume
    goes on. Exits with 1 if an output was wrong, or a schedule had no right one.
    """
    from ..target import resolve
    from ..tuning import curve, lookup, ranking
    from ..tuning.measuring import TuningError
    from ..tuning.plan import Deadline, elsewhere, proposer, repeat
    from ..tuning.plan import again as recorded_plans
    from ..tuning.plan import plans as plans_of
    from ..tuning.session import Session
    from ..turns import turn
    from . import tune_text
    from .tune_problems import of_model
    from .tune_view import watching

    for name, value in (("seconds", seconds), ("time-limit", time_limit)):
        if value is not None and not value > 0:
            raise typer.BadParameter(f"{name}={value}: allowed: more than 0")
    resolved = resolve(target, arch=arch)
    measurer = fleet(context, resolved, tracker, device_key, local_gpus)
    resolved = resolved if measurer is None else measurer.target
    if lock is not None:
        if verify_logs:
            raise typer.BadParameter("--lock: allowed without --verify-logs")
        _check_lock(lock, resolved, measurer is not None)
    schedule = known_schedule(schedule, resolved.kind)
    place = out or next(iter(lookup.named_places()), Path("tuning_logs"))
    trials = trials or (5 if again else 64)
    model = model_in(problems or [])
    if model:
        refuse(context, "a model", ("batch", "suite"))
        own = chosen_dtype(context, dtype)
        chosen = of_model(model, own, layout, resolved, accuracy)
    else:
        named = distinct_problems(problems or [], suite or [], batch, dtype, layout)
        chosen = dict.fromkeys(named, 1)
    for path in (json_path, png):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if verify_logs:
        from .tune_verify import verify_logs as verified

        where = [out] if out else lookup.places()
        if not verified(where, resolved, chosen, schedule, jobs, again, json_path):
            raise typer.Exit(1)
        return
    if not (chosen or again):
        raise typer.BadParameter("nothing to tune: name a PROBLEM, a MODEL or --suite")
    places = list(dict.fromkeys([place, *lookup.places()]))
    if again:
        plans, known = recorded_plans(chosen, resolved, places, schedule, accuracy)
        proposed = partial(repeat, target=resolved, trials=trials, known=known)
    else:
        plans = plans_of(chosen, resolved, schedule, accuracy)
        if learn:
            ranking.require()
    interrupted, failed, shown, begun = False, False, 0, 0
    with (
        _interrupts() as asked,
        Session(
            resolved, place, jobs, resume=resume, interrupted=asked, measurer=measurer, lock=lock
        ) as session,
    ):
        # While processes that build start.
        if not again:
            proposed = partial(
                proposer,
                target=resolved,
                trials=trials,
                seed=seed,
                learn=places if learn else None,
                known=elsewhere(chosen, resolved, places),
            )
        with turn(lock):
            floor = _floor(resolved, plans)
        deadline = Deadline(time_limit, (plan.count for plan in plans))
        with watching(plans, trials, floor, deadline) as session.watcher:
            for plan in plans:
                if deadline.over:
                    break
                begun += 1
                together = deadline.share()
                try:
                    proposers = {name: proposed(plan.problem, name) for name in plan.schedules}
                    session.tune(plan.problem, proposers, trials, seconds, together, again)
                except TuningError as error:  # of this problem; the others have their turn
                    failed = True
                    print(f"ERROR {error}", flush=True)
                except KeyboardInterrupt:
                    interrupted = True
                    break
                finally:
                    for result in session.results[shown:]:
                        print("\n".join(tune_text.lines(result)), flush=True)
                    shown = len(session.results)
    results = session.results
    said = [] if interrupted else tune_text.total(plans, results)
    said += tune_text.where(place, [session.log(r.schedule) for r in results if r.records])
    if begun < len(plans) and not interrupted:
        said.append(f"time is up: {len(plans) - begun} of {len(plans)} problems were not begun")
    if said:
        print("\n".join(said))
    if json_path is not None:
        summaries = [tune_text.summary(result) for result in results]
        json_path.write_text(json.dumps(summaries, indent=1, allow_nan=False) + "\n")
    if png is not None:
        curve.draw(results, png, join(["im2win", *sys.argv[1:]]))
    if interrupted:
        print("interrupted; what was measured is recorded, and --resume goes on")
        raise typer.Exit(_INTERRUPTED)
    if failed or any(result.wrong or result.best() is None for result in results):
        raise typer.Exit(1)


def _check_lock(lock: Path, target: Target, servers: bool) -> None:
    """Raise BadParameter where a lock says nothing, or cannot be made."""
    if servers:
        raise typer.BadParameter("--lock: allowed without --tracker and --local-gpus")
    if target.kind != "cuda":
        raise typer.BadParameter(
            f"--lock: target={target.kind}: allowed: cuda; others' builds would take its processors"
        )
    try:
        lock.open("a").close()
    except OSError as error:
        raise typer.BadParameter(f"--lock={lock}: {error.strerror}") from None


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


def _floor(target: Target, plans: list[Plan]) -> Callable[[ConvProblem, str], float | None]:
    """The shortest time by the roofline, where the device's ceilings can be measured."""
    from ..schedules import SCHEDULES
    from ..tuning.floor import floor_us, measured

    kinds = {SCHEDULES[name].accuracy(plan.problem) for plan in plans for name in plan.schedules}
    ceilings = measured(target, kinds)

    def floor(problem: ConvProblem, schedule: str) -> float | None:
        if ceilings is None:
            return None
        return floor_us(problem, SCHEDULES[schedule].accuracy(problem), ceilings)

    return floor
