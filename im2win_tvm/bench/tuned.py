"""What tuning gains: the choice by tuning records beside that without any, and other tuners.

All in one run, by turns: the choice that `im2win_tvm.compile` makes ("tuned"), what it would be
without records ("heuristic"), the im2win expressions as MetaSchedule alone schedules them, and
TVM's conv2d tuned by MetaSchedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..accuracy import accepted
from ..builds import Request
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..select import Choice, select, untuned
from ..target import Target
from . import timing
from .baselines import COMPETITORS
from .baselines.im2win import Im2win
from .rivals import median_us
from .run import run
from .units import geomean, microseconds, ratio

__all__ = ["HEURISTIC", "TUNED", "Chosen", "measure", "table", "total"]

TUNED, HEURISTIC = "tuned", "heuristic"
# The others by what heads their column.
_OTHERS = {"MetaSchedule, im2win": "metaschedule", "MetaSchedule, conv2d": "tvm-tuned"}


class Chosen(Im2win):
    """The kernel of a choice made anew for each problem.

    choose: the choice for a problem. name: what the record calls it.
    """

    def __init__(self, name: str, choose: Callable[[ConvProblem], Choice]) -> None:
        self.name = name
        self._choose = choose
        self._choices: dict[ConvProblem, Choice] = {}
        self._built = {}

    def choice(self, problem: ConvProblem) -> Choice:
        if problem not in self._choices:
            self._choices[problem] = self._choose(problem)
        return self._choices[problem]

    def accuracy(self, problem: ConvProblem) -> str:
        return self.choice(problem).schedule.accuracy(problem)

    def is_strict(self, problem: ConvProblem) -> bool:
        return self.choice(problem).schedule.is_strict(problem)

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        return None

    def request(self, problem: ConvProblem, target: Target) -> Request:
        choice = self.choice(problem)
        accuracy = self.accuracy(problem)
        return Request(problem, target, choice.schedule.name, choice.config, accuracy=accuracy)


def measure(
    problems: Mapping[str, ConvProblem],
    target: Target,
    accuracy: str | None = None,
    others: bool = True,
    limits: timing.Limits | None = None,
    progress: Callable[[str], None] = lambda what: None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """The record of a run, as `bench.run.run` has it; `keep` is given it after every layer.

    others: whether MetaSchedule's are measured, too. Each layer says in `origin` where the tuned
    configuration comes from, and in `same` whether it is the heuristic's.
    """

    def by_hand(problem: ConvProblem) -> Choice:
        """The tuned choice; of several schedules with records, none that MetaSchedule made."""
        choice = select(problem, target, accuracy=accuracy)
        if not choice.schedule.searched:
            return choice
        wanted = accepted(problem.dtype, accuracy)[0]
        found = [
            select(problem, target, name, accuracy=accuracy)
            for name, schedule in SCHEDULES.items()
            if not schedule.searched
            and schedule.supports(problem, target) is None
            and schedule.accuracy(problem) == wanted
        ]
        recorded = [other for other in found if other.origin.time_us is not None]
        if not recorded:
            return untuned(problem, target, accuracy)
        return min(recorded, key=lambda other: other.origin.time_us)

    ours = [
        Chosen(TUNED, by_hand),
        Chosen(HEURISTIC, lambda problem: untuned(problem, target, accuracy)),
    ]
    rivals = [entry for family in _OTHERS.values() for entry in COMPETITORS[family]]
    rivals = [entry for entry in rivals if getattr(entry, "kind", target.kind) == target.kind]

    def told(record: dict[str, Any]) -> None:
        layer = record["layers"][-1]
        choices = [entry.choice(problems[layer["name"]]) for entry in ours]
        layer["origin"], layer["same"] = str(choices[0].origin), _same(*choices)
        keep(record)

    return run(problems, target, ours + rivals * others, limits, progress, accuracy, told)


def _same(one: Choice, other: Choice) -> bool:
    return (one.schedule.name, one.config) == (other.schedule.name, other.config)


def table(record: dict[str, Any]) -> list[list[str]]:
    """A row a layer, after a head: cold microseconds, and how much faster the tuned choice is."""
    shown = {
        head: family
        for head, family in _OTHERS.items()
        if any(
            entry["family"] == family
            for layer in record["layers"]
            for entry in layer["implementations"]
        )
    }
    head = ["layer", "heuristic, us", "tuned, us", "gain"]
    rows = [head + [text for name in shown for text in (f"{name}, us", "tuned is")]]
    for layer in record["layers"]:
        tuned, plain = _time(layer, name=TUNED), _time(layer, name=HEURISTIC)
        gain = "the same" if layer["same"] else _ratio(plain, tuned)
        row = [layer["name"], _us(plain), _us(tuned), gain]
        for family in shown.values():
            theirs = _time(layer, family=family)
            row += [_us(theirs), _ratio(theirs, tuned)]
        rows.append(row)
    return rows


def total(record: dict[str, Any]) -> str:
    """How often, and by how much, the tuned choice is another one, and faster."""
    others = [layer for layer in record["layers"] if not layer["same"]]
    times = [(_time(layer, name=HEURISTIC), _time(layer, name=TUNED)) for layer in others]
    gains = [plain / tuned for plain, tuned in times if math.isfinite(plain + tuned)]
    text = f"tuned is another configuration on {len(others)} of {len(record['layers'])} layers"
    if not gains:
        return text
    mean, least, most = map(ratio, (geomean(gains), min(gains), max(gains)))
    return f"{text}, {mean} as fast there ({least} to {most})"


def _time(layer: dict[str, Any], **wanted: str) -> float:
    """Cold microseconds of an implementation; infinite where it has no time."""
    times = [
        median_us(entry)
        for entry in layer["implementations"]
        if "times" in entry and all(entry[key] == value for key, value in wanted.items())
    ]
    return min(times, default=math.inf)


def _us(time: float) -> str:
    return microseconds(time) if math.isfinite(time) else "-"


def _ratio(theirs: float, ours: float) -> str:
    return ratio(theirs / ours) if math.isfinite(theirs) and math.isfinite(ours) else "-"
