"""Which schedule and configuration a problem gets, and why the others do not."""

from dataclasses import dataclass
from typing import Any

from .problem import ConvProblem
from .schedules import SCHEDULES, Schedule, ScheduleError
from .target import Target


@dataclass(frozen=True)
class Choice:
    """A schedule with its configuration; `rejected` holds the other schedules' reasons by name."""

    schedule: Schedule
    config: Any
    rejected: dict[str, str]


def select(
    problem: ConvProblem,
    target: Target,
    schedule: str | Schedule | None = None,
    config: Any = None,
) -> Choice:
    """The schedule asked for, or the first that takes the problem; its heuristic if no `config`.

    schedule: the name of one in SCHEDULES, or any Schedule. config: the schedule's own Config, or
    a dict of its fields, of which missing ones take the heuristic's value. Raises ScheduleError
    with the reasons if nothing fits.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ScheduleError(f"schedule={schedule!r}: allowed are {', '.join(SCHEDULES)}")
    rejected = {}
    candidates = SCHEDULES
    if schedule is not None:
        named = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        candidates = {named.name: named}
    for name, candidate in candidates.items():
        reason = candidate.supports(problem, target)
        if reason is not None:
            rejected[name] = reason
            continue
        return Choice(candidate, _configuration(candidate, problem, target, config), rejected)
    reasons = "; ".join(rejected.values())
    raise ScheduleError(f"{problem}: no schedule for {target}: {reasons}")


def _configuration(schedule: Schedule, problem: ConvProblem, target: Target, config: Any) -> Any:
    if config is None:
        return schedule.default(problem, target)
    if isinstance(config, dict):
        fields = vars(schedule.default(problem, target))
        unknown = sorted(set(config) - set(fields))
        if unknown:
            raise ScheduleError(
                f"config: {schedule.name} has no field {', '.join(unknown)}; "
                f"allowed are {', '.join(fields)}"
            )
        config = type(schedule.default(problem, target))(**(fields | config))
    reason = schedule.check(config, problem, target)
    if reason is not None:
        raise ScheduleError(reason)
    return config
