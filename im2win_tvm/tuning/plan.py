"""What a session is to tune: problems with their schedules, how much each counts, what is tried."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accuracy import accepted
from ..environment import device_name
from ..heuristic import heuristic
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..select import supporting
from ..target import Target
from . import ranking
from .lookup import others, recorded
from .measuring import TuningError
from .neighbours import borrowed
from .records import Record, key_of
from .search import FEW, Listed, Proposer, RandomThenClimb, spread

__all__ = ["Deadline", "Plan", "again", "elsewhere", "plans", "proposer", "repeat"]

#: Configurations by problem, as `key_of` has it, and schedule.
Known = dict[tuple[ConvProblem, str], list[Any]]


@dataclass(frozen=True)
class Plan:
    """A problem and the names of the schedules to tune; count: how often a model has it."""

    problem: ConvProblem
    schedules: tuple[str, ...]
    count: int = 1


def plans(
    problems: Mapping[ConvProblem, int],
    target: Target,
    schedule: str | None = None,
    accuracy: str | None = None,
) -> list[Plan]:
    """The schedules that take each problem in its class; those of fp32 for tf32 if no other does.

    problems: with their counts. Raises AccuracyError, and ScheduleError if none takes one.
    """
    made = []
    for problem, count in problems.items():
        found = supporting(problem, target, schedule, accuracy)
        kinds = {name: entry.accuracy(problem) for name, entry in found.items()}
        preferred = next(iter(kinds.values()))
        names = tuple(name for name, kind in kinds.items() if kind == preferred)
        made.append(Plan(problem, names, count))
    return made


def proposer(
    problem: ConvProblem,
    name: str,
    target: Target,
    trials: int,
    seed: int,
    learn: Iterable[Path] | None = None,
    known: Known | None = None,
) -> Proposer:
    """The search of one schedule: the heuristic's choice, what its model says, chance, climbing.

    known: what is tried right after the heuristic's (see `elsewhere`).
    learn: the folders of the records from which XGBoost learns what to take instead of climbing,
    beside the trials of the search itself (see `ranking.require`); None: it does not.
    """
    schedule = SCHEDULES[name]
    configs = list(schedule.configs(problem, target))
    default, explore = heuristic(schedule, problem, target), -(-trials // 2)
    theirs = (known or {}).get((key_of(problem), name), [])
    first = [default, *theirs]
    cost = {config: schedule.estimate(problem, config, target) for config in configs}
    if None not in cost.values():
        first += spread(sorted(configs, key=cost.__getitem__), max(0, explore // 2 - len(theirs)))
    # Half of the trials look around, half of these where a model points; the other half climb.
    if learn is None:
        return RandomThenClimb(first, configs, explore, seed)
    samples = ranking.samples(schedule, type(default), learn, target, problem)
    cost |= {config: schedule.estimate(problem, config, target) for config in first}
    return ranking.Learned(first, cost, explore, seed, problem, samples)


def elsewhere(problems: Iterable[ConvProblem], target: Target, places: list[Path]) -> Known:
    """The fastest few configurations on other GPUs of the architecture: first those of the problem
    itself, then those of its nearest neighbours.

    What the device of the target has recorded itself does not count: a session that goes on would
    begin with other configurations than the one that it continues.
    """
    device, wanted = device_name(target), [*map(key_of, problems)]
    theirs: dict[str, dict[ConvProblem, Record]] = {}  # the fastest, by schedule and problem
    for record in others(places, target):
        known = theirs.setdefault(record.schedule, {})
        if record.key not in known or _order(record) < _order(known[record.key]):
            known[record.key] = record
    found = {
        key: [match.config for match in matches[:FEW]]
        for key, matches in recorded(places, target, set(wanted), but=device).items()
    }
    for problem in wanted:
        for name, fastest in theirs.items():
            schedule, configs = SCHEDULES[name], found.setdefault((problem, name), [])
            if schedule.supports(problem, target) is None:
                near = borrowed(problem, schedule, target, fastest, FEW)
                configs += [config for config in near if config not in configs]
                del configs[FEW:]
    return {key: configs for key, configs in found.items() if configs}


def _order(record: Record) -> tuple:
    return record.protocol != "full", record.time_us


def again(
    problems: Iterable[ConvProblem],
    target: Target,
    places: list[Path],
    schedule: str | None = None,
    accuracy: str | None = None,
) -> tuple[list[Plan], Known]:
    """What is recorded of these problems (of all, if there are none), this schedule and class.

    Plans, and the configurations, the fastest first. Raises TuningError
    where there is no record.
    """
    wanted = {*map(key_of, problems)}
    found = {
        (problem, name): [match.config for match in matches]
        for (problem, name), matches in recorded(places, target, wanted).items()
        if schedule in (None, name)
        and SCHEDULES[name].accuracy(problem) == accepted(problem.dtype, accuracy)[0]
    }
    if not found:
        raise TuningError(
            "--again: no record of these problems on this device, or of another GPU of its "
            f"architecture, in {', '.join(map(str, places))}"
        )
    names: dict[ConvProblem, list[str]] = {}
    for problem, name in found:
        names.setdefault(problem, []).append(name)
    return [Plan(problem, tuple(each)) for problem, each in names.items()], found


def repeat(problem: ConvProblem, name: str, target: Target, trials: int, known: Known) -> Proposer:
    """The heuristic's choice and the first of what `again` found."""
    default = heuristic(SCHEDULES[name], problem, target)
    return Listed(list(dict.fromkeys([default, *known[problem, name]]))[:trials])


class Deadline:
    """The time of a whole session, shared out among what is left of it by weight.

    seconds: None is no limit. weights: of the plans, in their order. What one does not use is for
    those after it; and by what plans took beyond their shares, as their last measurements do, the
    shares after them are smaller, so that the last plans have theirs.
    """

    def __init__(self, seconds: float | None, weights: Iterable[float]) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._weights = list(weights)
        self._due: float | None = None  # when the plan under way should be over
        self._beyond: list[float] = []

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether nothing more should begin."""
        return self.left == 0.0

    def share(self) -> float | None:
        """Seconds for the next plan."""
        weight, total, plans = self._weights[0], sum(self._weights), len(self._weights)
        del self._weights[0]
        if self.left is None:
            return None
        if self._due is not None:
            self._beyond.append(max(0.0, time.monotonic() - self._due))
        beyond = sum(self._beyond) / max(1, len(self._beyond))
        share = max(0.0, self.left - plans * beyond) * weight / total
        self._due = time.monotonic() + share
        return share
