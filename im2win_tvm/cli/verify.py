"""`im2win verify`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from .options import (
    PROBLEM_HELP,
    SUITE_NAMES,
    AccuracyOption,
    ArchOption,
    BatchSizeOption,
    ConfigOption,
    DtypeOption,
    LayoutOption,
    TargetOption,
    known_schedule,
    parse_config,
    parse_problem,
)
from .progress import progress

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..target import Target

# Operations of a problem up to which emulation is tried: it runs some 10**8 a second.
EMULATED_FLOPS = 4e9


def verify(
    problems: Annotated[
        list[str] | None, typer.Argument(metavar="[PROBLEM]...", help=PROBLEM_HELP)
    ] = None,
    batch: Annotated[
        list[Path] | None,
        typer.Option(
            "--batch",
            metavar="FILE",
            help="A list of problems: a benchdnn batch file or JSON lines. May be repeated.",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option("--suite", help=f"Every layer of {SUITE_NAMES}.")
    ] = None,
    mb: BatchSizeOption = None,
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="A schedule by name. Default: the selected one."),
    ] = None,
    all_schedules: Annotated[
        bool,
        typer.Option("--all-schedules", help="Every schedule that takes the problem in its class."),
    ] = False,
    config: ConfigOption = None,
    fill: Annotated[
        str,
        typer.Option(
            "--fill",
            help="integer (sums are exact, compared for equality), normal (compared within "
            "rounding) or both.",
        ),
    ] = "integer",
    seed: Annotated[int, typer.Option("--seed", help="Of the random tensors.")] = 0,
    emulate: Annotated[
        bool,
        typer.Option("--emulate", help="Run CUDA schedules on the CPU, without their pipelining."),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", help="Processes that compile. Default: one a processor on cuda, else 1."
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.")
    ] = None,
) -> None:
    """Check kernels against the float64 reference, element by element.

    Prints the command that repeats a case before it runs, then PASS, FAIL or SKIP with the
    reason. Exits with 1 if a case fails or none was run.
    """
    from ..accuracy import OWN, accepted
    from ..builds import default_jobs
    from ..target import TargetError, resolve
    from ..tensors import KINDS

    if accuracy is not None and dtype in OWN:
        accepted(dtype, accuracy)
    if fill not in (*KINDS, "both"):
        raise typer.BadParameter(f"fill={fill!r}: allowed: {', '.join(KINDS)} or both")
    if schedule is not None and all_schedules:
        raise typer.BadParameter("--all-schedules: not together with --schedule")
    if jobs is not None and jobs < 1:
        raise typer.BadParameter(f"jobs={jobs}: allowed: whole numbers from 1")
    if not (problems or batch or suite):
        raise typer.BadParameter("nothing to verify: name a PROBLEM, --batch FILE or --suite")
    resolved = resolve(target, arch=arch)
    if emulate and resolved.kind != "cuda":
        raise TargetError(f"--emulate: allowed with --target cuda, not for {resolved}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    wanted = _Wanted(
        resolved,
        known_schedule(schedule, resolved.kind),
        all_schedules,
        parse_config(config, schedule),
        KINDS if fill == "both" else (fill,),
        seed,
        emulate,
        accuracy,
    )
    listed = list(_problems(problems or [], batch or [], suite, mb, dtype, layout))
    plan = [planned for problem, reason in listed for planned in wanted.plan(problem, reason)]
    results = []
    # In a terminal the results themselves are the progress.
    watched = nullcontext(lambda what: None) if sys.stdout.isatty() else progress(len(plan))
    with watched as step:
        for result in _run(plan, wanted, arch, jobs or default_jobs(resolved)):
            results.append(result)
            step(result["problem"])
    counts = {word: sum(r["result"] == word for r in results) for word in ("PASS", "FAIL", "SKIP")}
    if json_path is not None:
        json_path.write_text(json.dumps({"counts": counts, "cases": results}, indent=1) + "\n")
    skipped = f", {counts['SKIP']} skipped" if counts["SKIP"] else ""
    print(f"{counts['PASS']} passed, {counts['FAIL']} failed{skipped}")
    if counts["FAIL"] or not counts["PASS"]:
        raise typer.Exit(1)


def _problems(
    texts: list[str],
    lists: list[Path],
    suite_name: str | None,
    mb: int | None,
    dtype: str,
    layout: str | None,
) -> Iterator[tuple[ConvProblem, str | None]]:
    """The problems, each with the reason not to run it or None."""
    from ..batch import read_problems
    from ..suites import suite

    for text in texts:
        yield parse_problem(text, dtype, layout, mb)[1], None
    if suite_name is not None:
        for problem in suite(suite_name, mb, dtype, layout).values():
            yield problem, None
    for path in lists:
        for case in read_problems(path, dtype=dtype, layout=layout, batch=mb):
            yield case.problem, case.unsupported


class _Planned(NamedTuple):
    """One kernel to verify; `skip` is the reason not to."""

    problem: ConvProblem
    schedule: str | None
    skip: str | None


@dataclass(frozen=True)
class _Wanted:
    """What to run of each problem: a schedule by name, every one, or (neither) the selected one."""

    target: Target
    schedule: str | None
    every: bool
    config: dict[str, Any] | None
    fills: tuple[str, ...]
    seed: int
    emulate: bool
    accuracy: str | None

    def plan(self, problem: ConvProblem, reason: str | None = None) -> list[_Planned]:
        """The kernels of one problem, or the reason why there is none."""
        from ..accuracy import AccuracyError
        from ..schedules import ScheduleError
        from ..select import select, supporting

        reason = reason or self._too_large(problem)
        if reason is not None:
            return [_Planned(problem, self.schedule, reason)]
        try:
            names = list(supporting(problem, self.target, self.schedule, self.accuracy))
            if not self.every:
                choice = select(problem, self.target, self.schedule, accuracy=self.accuracy)
                names = [choice.schedule.name]
        except (AccuracyError, ScheduleError) as error:
            return [_Planned(problem, self.schedule, str(error))]
        return [_Planned(problem, name, None) for name in names]

    def _too_large(self, problem: ConvProblem) -> str | None:
        from .. import verification
        from ..bench.units import size

        if self.emulate and problem.flops > EMULATED_FLOPS:
            return (
                f"{problem.flops / 1e9:.1f} GFLOP: emulation takes up to "
                f"{EMULATED_FLOPS / 1e9:g}; see --mb"
            )
        needed, free = verification.bytes_needed(problem), verification.free_bytes()
        if free is not None and needed > free:
            return f"needs {size(needed)} of memory, {size(free)} are free; see --mb"
        return None


def _run(
    plan: list[_Planned], wanted: _Wanted, arch: str | None, jobs: int
) -> Iterator[dict[str, Any]]:
    """One result a kernel and fill, printed as it comes."""
    from .. import verification
    from ..accuracy import accepted
    from ..builds import Request, build_all
    from ..schedules import SCHEDULES
    from ..select import select

    requests = (
        Request(
            planned.problem,
            wanted.target,
            planned.schedule,
            wanted.config,
            accuracy=wanted.accuracy,
        )
        for planned in plan
        if planned.skip is None
    )
    count = sum(planned.skip is None for planned in plan)
    kernels = iter(()) if wanted.emulate else build_all(requests, max(1, min(jobs, count)))
    for planned in plan:
        problem = planned.problem
        run: verification.Run | Exception | None = None
        kind = accepted(problem.dtype, wanted.accuracy)[0]
        if planned.skip is None:  # its own class, which may be better than what was asked for
            kind = SCHEDULES[planned.schedule].accuracy(problem)
        for fill in wanted.fills:
            repro = _repro(planned, wanted, arch, fill)
            print(repro, flush=True)
            if planned.skip is not None:
                word, message = "SKIP", planned.skip
            else:
                try:
                    if run is None and wanted.emulate:
                        choice = select(
                            problem,
                            wanted.target,
                            planned.schedule,
                            wanted.config,
                            wanted.accuracy,
                        )
                        run = verification.emulated(problem, wanted.target, choice)
                    elif run is None:
                        kernel = next(kernels)
                        if isinstance(kernel, Exception):
                            raise kernel
                        run = verification.on_device(kernel)
                    result = verification.verify(problem, run, fill, wanted.seed, kind)
                    word, message = ("PASS" if result.ok else "FAIL"), result.message
                except Exception as error:
                    # A kernel that cannot be built or called is a failed case, and no reason to
                    # leave out the cases after it.
                    word, message = "FAIL", f"{type(error).__name__}: {error}"
            print(f"{word}  {message}", flush=True)
            yield {
                "problem": str(problem),
                "dtype": problem.dtype,
                "layout": problem.layout,
                "accuracy": kind,
                "schedule": planned.schedule,
                "fill": fill,
                "result": word,
                "message": message,
                "repro": repro,
            }


def _repro(planned: _Planned, wanted: _Wanted, arch: str | None, fill: str) -> str:
    """The command line that runs one case again."""
    problem = planned.problem
    words = ["im2win", "verify", "--target", wanted.target.kind]
    words += ["--arch", arch] if arch is not None else []
    words += ["--emulate"] if wanted.emulate else []
    words += ["--schedule", planned.schedule] if planned.schedule else []
    words += ["--accuracy", wanted.accuracy] if wanted.accuracy else []
    words += ["--config", json.dumps(wanted.config)] if wanted.config is not None else []
    words += ["--fill", fill] + (["--seed", str(wanted.seed)] if wanted.seed else [])
    words += ["--dtype", problem.dtype, "--layout", problem.layout]
    return f'{shlex.join(words)} "{problem}"'
