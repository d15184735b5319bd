"""A search: something that proposes configurations, given what was measured, and a loop around it.

The interface is one method, so that a model can take the place of chance:

    propose(count, trials) -> up to `count` configurations that were not proposed before
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

__all__ = [
    "FEW",
    "Listed",
    "Proposer",
    "RandomThenClimb",
    "Trial",
    "neighbours",
    "search",
    "spread",
]

#: Configurations whose neighbours are tried: more of them against local optima, fewer for depth.
FEW = 3


@dataclass(frozen=True)
class Trial:
    """A configuration, and its time in microseconds: infinite if there is no right output."""

    config: Any
    time_us: float


class Proposer(Protocol):
    """Where configurations come from."""

    def propose(self, count: int, trials: Sequence[Trial]) -> list[Any]:
        """Up to `count` new configurations, given all trials so far; none of them: the end."""


class Listed:
    """The configurations of a list, in its order."""

    def __init__(self, configs: Iterable[Any]) -> None:
        self._waiting = list(dict.fromkeys(configs))

    def propose(self, count: int, trials: Sequence[Trial]) -> list[Any]:
        proposed, self._waiting = self._waiting[:count], self._waiting[count:]
        return proposed


class RandomThenClimb:
    """Known configurations, random ones, then neighbours of the fastest few.

    first: proposed before all others (the heuristic's, and what a model ranks first). configs: all
    valid ones. explore: how many are proposed before climbing begins; no proposal goes beyond them,
    so that whoever measures many at a time climbs from what they showed. The same seed and times
    give the same proposals.
    """

    def __init__(
        self, first: Sequence[Any], configs: Iterable[Any], explore: int, seed: int = 0
    ) -> None:
        first = list(dict.fromkeys(first))
        self._configs = list(dict.fromkeys([*first, *configs]))
        self._chance = random.Random(seed)
        rest = self._configs[len(first) :]
        self._chance.shuffle(rest)
        self._random = iter([*first, *rest])
        self._explore = explore
        self._proposed: set[Any] = set()
        self._near: dict[Any, list[Any]] = {}

    def propose(self, count: int, trials: Sequence[Trial]) -> list[Any]:
        proposed: list[Any] = []
        while len(proposed) < count:
            if proposed and len(self._proposed) == self._explore:
                break
            config = self._next(trials)
            if config is None:
                break
            self._proposed.add(config)
            proposed.append(config)
        return proposed

    def _next(self, trials: Sequence[Trial]) -> Any:
        if len(self._proposed) >= self._explore:
            timed = [trial for trial in trials if math.isfinite(trial.time_us)]
            for trial in sorted(timed, key=lambda trial: trial.time_us)[:FEW]:
                near = self._around(trial.config)
                if near:
                    return self._chance.choice(near)
        # All around the fastest is known: chance again.
        return next(filter(self._new, self._random), None)

    def _around(self, config: Any) -> list[Any]:
        """The neighbours of a configuration that were not proposed yet."""
        if config not in self._near:
            self._near[config] = neighbours(config, self._configs)
        return list(filter(self._new, self._near[config]))

    def _new(self, config: Any) -> bool:
        return config not in self._proposed


def spread(ranked: Iterable[Any], count: int) -> list[Any]:
    """The first `count` that differ from all taken before in two fields or more."""
    taken: list[Any] = []
    for config in ranked:
        if len(taken) == count:
            break
        names = [entry.name for entry in fields(config)]
        here = _values(config, names)
        if all(sum(map(operator.ne, here, _values(other, names))) > 1 for other in taken):
            taken.append(config)
    return taken


def neighbours(config: Any, configs: Iterable[Any]) -> list[Any]:
    """Configurations that differ from `config` in one field, by one step up or down.

    A step is to the next value of that field among those of `configs` that agree in all others.
    """
    names = [entry.name for entry in fields(config)]
    here = _values(config, names)
    along: dict[int, list[Any]] = {}
    for other in configs:
        different = [i for i, value in enumerate(_values(other, names)) if value != here[i]]
        if len(different) == 1:
            along.setdefault(different[0], []).append(other)
    near = []
    for axis, others in along.items():
        key = _order(names[axis])
        below = [other for other in others if key(other) < key(config)]
        above = [other for other in others if key(other) > key(config)]
        near += [max(below, key=key)] if below else []
        near += [min(above, key=key)] if above else []
    return near


def _values(config: Any, names: list[str]) -> list[Any]:
    return [getattr(config, name) for name in names]


def _order(name: str) -> Callable[[Any], tuple]:
    """Orders configurations by one field, whose values may be of several types."""

    def key(config: Any) -> tuple:
        value = getattr(config, name)
        return (value is not None, type(value).__name__, value if value is not None else 0)

    return key


def search(
    proposer: Proposer,
    measure: Callable[[list[Any]], Iterable[Trial]],
    most: int,
    batch: int = 1,
    enough: Callable[[], bool] = lambda: False,
    begun: Sequence[Trial] = (),
) -> list[Trial]:
    """Measure what `proposer` proposes: `most` configurations, `batch` at a time.

    begun: trials that there were before, which count.

    Ends before, between two batches, once `enough` says so: what takes time is to build a batch,
    and that is spent by the time its first trial is there.
    """
    trials = list(begun)
    while len(trials) < most and not enough():
        proposed = proposer.propose(min(batch, most - len(trials)), trials)
        if not proposed:
            break
        trials += measure(proposed)
    return trials
