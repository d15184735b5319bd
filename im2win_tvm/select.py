"""Which schedule and configuration a problem gets, and why the others do not."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .accuracy import STRICT, accepted
from .environment import device_name
from .heuristic import heuristic
from .problem import ConvProblem
from .schedules import SCHEDULES, Schedule, ScheduleError
from .target import Target
from .tuning.lookup import Found, Match, Miss, find, shown_path
from .tuning.records import Record


@dataclass(frozen=True)
class Origin:
    """Where a configuration comes from.

    kind: "heuristic", "given" by the caller, or "record". Of a record: the file and its line, the
    device that it was measured on, and the time in microseconds there. any_device: the target
    named no device and took any of its architecture. borrower: the device that the target named,
    where that has no record of its own.
    """

    kind: str
    file: str | None = None
    line: int | None = None
    device: str | None = None
    time_us: float | None = None
    any_device: bool = False
    borrower: str | None = None

    @classmethod
    def of(cls, match: Match, target: Target) -> "Origin":
        """That of a tuning record."""
        record, wanted = match.record, device_name(target)
        return cls(
            "record",
            shown_path(match.path),
            match.line,
            record.device,
            record.time_us,
            any_device=wanted is None,
            borrower=None if wanted == record.device else wanted,
        )

    def __str__(self):
        if self.kind != "record":
            return self.kind
        text = f"record {self.file}:{self.line}, {self.time_us:.2f} us on {self.device!r}"
        if self.any_device:
            return f"{text}, of any such device: the target names none"
        return text if self.borrower is None else f"{text}, borrowed: {self.borrower!r} has none"


# Part of a recorded time below which a predicted one is believed: of 104 problems on an H100 the
# models were at most 25 % below what was measured.
_BY_FAR = 0.7
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
    accuracy: str | None = None,
) -> Choice:
    """A schedule that takes the problem, and its configuration.

    schedule: the name of one in SCHEDULES, or any Schedule; None is that with the fastest tuning
    record, or without one the first that takes the problem, unless models of the time of that and
    of another say that the other is faster; a schedule without a record goes before one that has
    one if its model says that it takes less than 0.7 of that time. config: the schedule's own
    Config, or a dict of its fields, of which missing ones take the heuristic's value; None is the
    tuning record's, or the heuristic's where there is no record. accuracy: as in
    `im2win_tvm.compile`; for tf32 the schedules that compute in it come first. Those of fp32 have a
    turn where none of them takes the problem, and where both have tuning records the fastest
    decides.
    Raises AccuracyError, and ScheduleError with the reasons if nothing fits.
    """
    offer = _offer(problem, target, schedule, accuracy)
    supported = offer.supported
    first = next(iter(supported))
    if config is not None:
        config = _configuration(supported[first], problem, target, config)
        return Choice(supported[first], config, offer.rejected(first))
    found = _found(problem, target, supported)
    if found.best is None:
        return _unrecorded(problem, target, offer, found.missed)
    name = found.best.record.schedule
    unmeasured = {n: s for n, s in supported.items() if n not in found.matches}
    rival = _predicted_to_beat(problem, target, supported[name], unmeasured, found.best.record)
    if rival is not None:
        faster, config, reason = rival
        rejected = offer.rejected(faster) | {name: reason}
        return Choice(supported[faster], config, rejected, HEURISTIC, found.missed)
    return Choice(
        supported[name],
        found.best.config,
        offer.rejected(name) | _slower(found, supported),
        Origin.of(found.best, target),
        found.missed,
    )


def untuned(problem: ConvProblem, target: Target, accuracy: str | None = None) -> Choice:
    """What `select` would choose if there were no tuning records. Raises as that does."""
    return _unrecorded(problem, target, _offer(problem, target, None, accuracy))


def _unrecorded(
    problem: ConvProblem, target: Target, offer: "_Offer", missed: tuple[Miss, ...] = ()
) -> Choice:
    known = _with_heuristic(problem, target, offer.supported)
    name, config, slower = _predicted(problem, target, known)
    return Choice(known[name], config, offer.rejected(name) | slower, HEURISTIC, missed)


def supporting(
    problem: ConvProblem,
    target: Target,
    schedule: str | Schedule | None = None,
    accuracy: str | None = None,
) -> dict[str, Schedule]:
    """The schedules that `select` chooses among, in the order of its preference; at least one.

    Those that only tuning records can configure are left out unless one is named. Raises as
    `select` does.
    """
    supported = _offer(problem, target, schedule, accuracy).supported
    return supported if schedule is not None else _with_heuristic(problem, target, supported)


def _with_heuristic(
    problem: ConvProblem, target: Target, supported: dict[str, Schedule]
) -> dict[str, Schedule]:
    """Those that have a configuration without a tuning record. Raises ScheduleError if none has."""
    known = {name: entry for name, entry in supported.items() if not entry.searched}
    if not known:
        raise ScheduleError(
            f"{problem}: {', '.join(supported)}: no tuning record for {target}, and no heuristic; "
            "scripts/tune_metaschedule.py makes records"
        )
    return known


class _Offer(NamedTuple):
    """The schedules that take a problem in a class, and the reasons of the others by name.

    refused: by `supports`, with None for those that take the problem, in the order in which they
    are asked. inexact: those of them that compute in a class, or by a rule, not asked for.
    """

    supported: dict[str, Schedule]
    refused: dict[str, str | None]
    inexact: dict[str, str]

    def rejected(self, chosen: str) -> dict[str, str]:
        """Why those that are asked before the chosen one do not take the problem.

        A class may keep the fastest one out: that is told of those after it, too.
        """
        names = list(self.refused)
        asked = names[: names.index(chosen)]
        before = {name: reason for name in asked if (reason := self.refused[name]) is not None}
        return before | self.inexact


def _offer(
    problem: ConvProblem, target: Target, schedule: str | Schedule | None, accuracy: str | None
) -> _Offer:
    classes = accepted(problem.dtype, accuracy)
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ScheduleError(f"schedule={schedule!r}: allowed are {', '.join(SCHEDULES)}")
    candidates = SCHEDULES
    if schedule is not None:
        named = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        candidates = {named.name: named}
    refused = {name: entry.supports(problem, target) for name, entry in candidates.items()}
    offered = {
        name: candidates[name].accuracy(problem)
        for name, reason in refused.items()
        if reason is None
    }
    inexact = {
        name: f"accuracy={accuracy!r}: {name} computes {problem.dtype} in {theirs}; "
        f"pass accuracy={theirs!r}"
        for name, theirs in offered.items()
        if theirs not in classes
    }
    if accuracy == STRICT:
        inexact |= {
            name: f"accuracy={accuracy!r}: {name} is as exact as a plain convolution for the "
            "inputs that docs/accuracy.md describes, and not for every one"
            for name in offered
            if not candidates[name].is_strict(problem)
        }
    # Sorting is stable: within a class the order of SCHEDULES stays.
    names = [name for name in offered if name not in inexact]
    names.sort(key=lambda name: classes.index(offered[name]))
    if not names:
        listed = "; ".join(filter(None, (refused | inexact).values()))
        raise ScheduleError(f"{problem}: no schedule for {target}: {listed}")
    return _Offer({name: candidates[name] for name in names}, refused, inexact)


def _found(problem: ConvProblem, target: Target, supported: dict[str, Schedule]) -> Found:
    """The tuning records that count: those of the preferred class, which is that of the first.

    Records of another one alone would keep that class out for as long as nobody tuned for it. Where
    both were measured, in one place, they compare.
    """
    wanted = next(iter(supported.values())).accuracy(problem)
    preferred = {n: s for n, s in supported.items() if s.accuracy(problem) == wanted}
    found = find(problem, target, preferred)
    if found.best is None or preferred == supported:
        return found
    together = find(problem, target, supported)
    return together if preferred.keys() & together.matches else found


def _predicted(
    problem: ConvProblem, target: Target, supported: dict[str, Schedule]
) -> tuple[str, Any, dict[str, str]]:
    """The schedule of the preferred class that is the fastest by its model, and its configuration.

    The first one, if it has no model of the time. Those that were slower come with the reason.
    """
    first = next(iter(supported.values()))
    wanted = first.accuracy(problem)
    timed = {}
    for name, schedule in supported.items():
        if schedule.accuracy(problem) == wanted and (schedule is first or _is_modelled(schedule)):
            config = heuristic(schedule, problem, target)
            time = schedule.microseconds(problem, config, target)
            if time is None and schedule is first:
                return name, config, {}
            if time is not None:
                timed[name] = time, config
    best = min(timed, key=lambda name: timed[name][0])
    slower = {
        name: f"{time:.1f} us predicted, {best} {timed[best][0]:.1f}"
        for name, (time, _) in timed.items()
        if name != best
    }
    return best, timed[best][1], slower


def _predicted_to_beat(
    problem: ConvProblem,
    target: Target,
    recorded: Schedule,
    unmeasured: dict[str, Schedule],
    record: Record,
) -> tuple[str, Any, str] | None:
    """A schedule of the class without a record that should be faster than the best record by far.

    Its name and configuration, and what there is to say of the record. A schedule that is new would
    have no turn otherwise where others were measured.
    """
    best = None
    for name, schedule in unmeasured.items():
        if schedule.accuracy(problem) == recorded.accuracy(problem) and _is_modelled(schedule):
            config = heuristic(schedule, problem, target)
            time = schedule.microseconds(problem, config, target)
            if (
                time is not None
                and time < _BY_FAR * record.time_us
                and (not best or time < best[0])
            ):
                best = time, name, config
    if best is None:
        return None
    time, name, config = best
    recorded_time = f"{record.time_us:.2f} us by its own record ({record.protocol})"
    return name, config, f"{recorded_time}, {name} {time:.1f} predicted"


def _is_modelled(schedule: Schedule) -> bool:
    """Whether a schedule may have a model of its time.

    None has the transform in it, and a heuristic takes a third of a second: for nothing, then.
    """
    return not getattr(schedule, "explicit", False)


def _slower(found: Found, supported: dict[str, Schedule]) -> dict[str, str]:
    """Why schedules that take the problem are not chosen where one has a tuning record."""
    best = found.best.record.schedule
    rejected = {}
    for name in supported:
        if name in found.matches:
            record = found.matches[name].record
            rejected[name] = f"{record.time_us:.2f} us by its own record ({record.protocol})"
        elif not supported[name].searched:
            rejected[name] = f"no tuning record; {best} has one"
    del rejected[best]
    return rejected


def _configuration(schedule: Schedule, problem: ConvProblem, target: Target, config: Any) -> Any:
    if isinstance(config, dict):
        default = heuristic(schedule, problem, target)
        fields = vars(default)
        unknown = sorted(set(config) - set(fields))
        if unknown:
            raise ScheduleError(
                f"config: {schedule.name} has no field {', '.join(unknown)}; "
                f"allowed are {', '.join(fields)}"
            )
        config = type(default)(**(fields | config))
    reason = schedule.check(config, problem, target)
    if reason is not None:
        raise ScheduleError(reason)
    return config
