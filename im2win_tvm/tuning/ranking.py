"""Configurations ranked by a regression of measured times, for the second half of a search.

What is learned is by how much a time differs from what the schedule's own model says, where it has
one: that model knows the hardware, and the trees only what it misses. They learn from the trials of
the search itself and from records of other problems of the same schedule.

XGBoost: Chen and Guestrin, KDD 2016; as a cost model of kernels, Chen et al., NeurIPS 2018.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from ..problem import ConvProblem
from ..schedules import Schedule
from ..target import Target
from .lookup import lines
from .measuring import TuningError
from .records import Record, key_of
from .search import RandomThenClimb, Trial

__all__ = ["Learned", "Sample", "fit", "require", "row", "samples"]

# Small: a search has tens of trials. One thread and a seed, so that the same trials give the same
# trees.
_ROUNDS = 60
_TREES = {"max_depth": 4, "eta": 0.15, "min_child_weight": 1.0, "subsample": 0.9, "nthread": 1,
          "seed": 0, "objective": "reg:squarederror"}  # fmt: skip
# Every so many-th configuration is drawn by chance, so that no corner stays unseen.
_CHANCE = 8
# What a trial without a time counts as, in times of the slowest.
_LOST = 2.0

#: Numbers that describe a configuration of a problem, and the logarithm of what is to be learned.
Sample = tuple[list[float], float]


def require() -> None:
    """Raise TuningError where XGBoost is not installed."""
    if importlib.util.find_spec("xgboost") is None:
        raise TuningError("learning needs XGBoost; pip install 'im2win_tvm[tune]'")


def row(problem: ConvProblem, config: Any) -> list[float]:
    """What the regression sees: the fields of a configuration, then the sizes of the problem."""
    sizes = (
        problem.batch,
        problem.in_channels // problem.groups,
        problem.out_channels // problem.groups,
        problem.groups,
        math.prod(problem.kernel_size),
        math.prod(problem.output_size),
        math.prod(problem.stride),
    )
    return [*map(_number, astuple(config)), *map(math.log2, sizes)]


def samples(
    schedule: Schedule, kind: type, places: Iterable[Path], target: Target, but: ConvProblem
) -> list[Sample]:
    """What there is to learn from the records of other problems than `but`.

    kind: the schedule's Config. Records of any version and device count, as far as the schedule of
    today takes them: how fast a problem is there is taken off, what remains is which fields are
    good for it.
    """
    found: dict[ConvProblem, list[Sample]] = {}
    for place in places:
        for _, (_, record) in lines(place, None):
            if not isinstance(record, Record) or record.schedule != schedule.name:
                continue
            if record.passed and record.key != key_of(but) and record.target["kind"] == target.kind:
                sample = _sample(schedule, kind, record, target)
                found.setdefault(record.key, []).extend([sample] if sample else [])
    return [(x, y - mean) for group in found.values() for mean in [_mean(group)] for x, y in group]


def _sample(schedule: Schedule, kind: type, record: Record, target: Target) -> Sample | None:
    fields = {n: tuple(v) if isinstance(v, list) else v for n, v in record.config.items()}
    try:
        config = kind(**fields)
        if schedule.supports(record.key, target) or schedule.check(config, record.key, target):
            return None
        cost = schedule.estimate(record.key, config, target)
        return row(record.key, config), math.log(record.time_us / (cost or 1.0))
    except Exception:  # a log is anybody's, and one that does not fit teaches nothing
        return None


def _mean(group: Sequence[Sample]) -> float:
    return sum(y for _, y in group) / max(1, len(group))


def _number(value: Any) -> float:
    if isinstance(value, str):
        return float(int.from_bytes(value.encode()[:4].ljust(4, b"\0"), "big"))
    if isinstance(value, tuple | list):
        return float(math.prod(value))
    return -1.0 if value is None else float(value)


def fit(samples: Sequence[Sample]) -> Callable[[Sequence[list[float]]], np.ndarray]:
    """The regression of these samples, as a function of rows."""
    import xgboost

    rows, wanted = np.array([row for row, _ in samples]), np.array([y for _, y in samples])
    trees = xgboost.train(_TREES, xgboost.DMatrix(rows, wanted), _ROUNDS)
    return lambda asked: trees.predict(xgboost.DMatrix(np.array(asked)))


class Learned(RandomThenClimb):
    """As RandomThenClimb, but with the regression's choice in the place of neighbours.

    cost: of every configuration by the schedule's model; None: there is no model. known: samples of
    other problems.
    """

    def __init__(
        self,
        first: Sequence[Any],
        cost: Mapping[Any, float | None],
        explore: int,
        seed: int,
        problem: ConvProblem,
        known: Sequence[Sample] = (),
    ) -> None:
        super().__init__(first, cost, explore, seed)
        self._problem, self._known = problem, list(known)
        self._base = {config: math.log(cost.get(config) or 1.0) for config in self._configs}
        self._ranked: list[Any] = []
        self._seen = -1

    def _next(self, trials: Sequence[Trial]) -> Any:
        timed = [trial for trial in trials if math.isfinite(trial.time_us)]
        learning = len(self._proposed) >= self._explore and len(timed) > 1
        if not learning or len(self._proposed) % _CHANCE == 0:
            return next(filter(self._new, self._random), None)
        if len(trials) != self._seen:
            self._ranked, self._seen = self._rank(trials, timed), len(trials)
        return next(filter(self._new, self._ranked), None)

    def _rank(self, trials: Sequence[Trial], timed: Sequence[Trial]) -> list[Any]:
        """The configurations that were not proposed, the most promising first."""
        most = _LOST * max(trial.time_us for trial in timed)
        mine = [
            (
                row(self._problem, trial.config),
                math.log(min(trial.time_us, most)) - self._base[trial.config],
            )
            for trial in trials
        ]
        mean = _mean(mine)
        predict = fit([*self._known, *((x, y - mean) for x, y in mine)])
        waiting = list(filter(self._new, self._configs))
        if not waiting:
            return []
        learned = predict([row(self._problem, config) for config in waiting])
        total = {c: self._base[c] + float(y) for c, y in zip(waiting, learned, strict=True)}
        return sorted(waiting, key=total.__getitem__)
