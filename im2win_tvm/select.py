"""Which schedule and configuration a problem gets, and why the others do not."""

from dataclasses import dataclass, field
from typing import Any

from .environment import device_name
from .problem import ConvProblem
from .schedules import SCHEDULES, Schedule, ScheduleError
from .target import Target
from .tuning.lookup import Found, Match, Miss, find, shown_path


@dataclass(frozen=True)
class Origin:
    """Where a configuration comes from.

    kind: "heuristic", "given" by the caller, or "record". Of a record: the file and its line, the
    device that it was measured on, the time in microseconds, and whether the target named that
    device or took any of its architecture.
    """

    kind: str
    file: str | None = None
    line: int | None = None
    device: str | None = None
    time_us: float | None = None
    any_device: bool = False

    @classmethod
    def of(cls, match: Match, target: Target) -> "Origin":
        """That of a tuning record."""
        record = match.record
        return cls(
            "record",
            shown_path(match.path),
            match.line,
            record.device,
            record.time_us,
            device_name(target) is None,
        )

    def __str__(self):
        if self.kind != "record":
            return self.kind
        text = f"record {self.file}:{self.line}, {self.time_us:.2f} us on {self.device!r}"
        return text + (", of any such device: the target names none" if self.any_device else "")


HEURISTIC, GIVEN = Origin("heuristic"), Origin("given")


@dataclass(frozen=True)
class Choice:
    """A schedule with its configuration, and where that comes from.

    rejected: the reasons of other schedules by name. missed: tuning records of the problem that
    do not count.
    """

    schedule: Schedule
    config: Any
    rejected: dict[str, str]
    origin: Origin = GIVEN
    missed: tuple[Miss, ...] = field(default=())


def select(
    problem: ConvProblem,
    target: Target,
    schedule: str | Schedule | None = None,
    config: Any = None,
) -> Choice:
    """A schedule that takes the problem, and its configuration.

    schedule: the name of one in SCHEDULES, or any Schedule; None is that with the fastest tuning
    record, or the first that takes the problem. config: the schedule's own Config, or a dict of
    its fields, of which missing ones take the heuristic's value; None is the tuning record's, or
    the heuristic's where there is no record. Raises ScheduleError with the reasons if nothing
    fits.
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ScheduleError(f"schedule={schedule!r}: allowed are {', '.join(SCHEDULES)}")
    candidates = SCHEDULES
    if schedule is not None:
        named = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        candidates = {named.name: named}
    reasons = {name: entry.supports(problem, target) for name, entry in candidates.items()}
    supported = {name: candidates[name] for name, reason in reasons.items() if reason is None}
    if not supported:
        listed = "; ".join(filter(None, reasons.values()))
        raise ScheduleError(f"{problem}: no schedule for {target}: {listed}")
    first = next(iter(supported))
    if config is not None:
        config = _configuration(supported[first], problem, target, config)
        return Choice(supported[first], config, _before(reasons, first))
    found = find(problem, target, supported)
    if found.best is None:
        config = supported[first].default(problem, target)
        rejected = _before(reasons, first)
        return Choice(supported[first], config, rejected, HEURISTIC, found.missed)
    name = found.best.record.schedule
    return Choice(
        supported[name],
        found.best.config,
        _before(reasons, name) | _slower(found, supported),
        Origin.of(found.best, target),
        found.missed,
    )


def _before(reasons: dict[str, str | None], chosen: str) -> dict[str, str]:
    """Why the schedules that are asked before the chosen one do not take the problem."""
    names = list(reasons)
    asked = names[: names.index(chosen)]
    return {name: reason for name in asked if (reason := reasons[name]) is not None}


def _slower(found: Found, supported: dict[str, Schedule]) -> dict[str, str]:
    """Why schedules that take the problem are not chosen where one has a tuning record."""
    best = found.best.record.schedule
    rejected = {}
    for name in supported:
        if name in found.matches:
            record = found.matches[name].record
            rejected[name] = f"{record.time_us:.2f} us by its own record ({record.protocol})"
        else:
            rejected[name] = f"no tuning record; {best} has one"
    del rejected[best]
    return rejected


def _configuration(schedule: Schedule, problem: ConvProblem, target: Target, config: Any) -> Any:
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
