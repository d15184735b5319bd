"""The search for configurations, on costs that are made up."""

import itertools
import math
from dataclasses import astuple, dataclass

from im2win_tvm.tuning.search import Listed, RandomThenClimb, Trial, neighbours, search, spread


@dataclass(frozen=True)
class Point:
    a: int
    b: int
    c: int
    d: bool


GRID = [Point(*values) for values in itertools.product(range(12), (1, 2, 4, 8), range(9), (0, 1))]


def cost(point):
    """One valley, in which two fields depend on each other; single steps lead down everywhere."""
    slope = abs(point.a - point.c - 2) + 3 * abs(point.c - 7) + 2 * abs(point.b - 4)
    return 10.0 + slope + (0 if point.d else 5)


BEST = Point(9, 4, 7, 1)


def _measure(configs):
    for config in configs:
        yield Trial(config, cost(config))


def _found(seed, explore, most=120, batch=4):
    proposer = RandomThenClimb([GRID[0]], GRID, explore, seed)
    return min(search(proposer, _measure, most, batch), key=lambda trial: trial.time_us).config


def test_the_search_finds_the_lowest_point():
    assert min(GRID, key=cost) == BEST
    assert [_found(seed, 40) for seed in range(8)] == [BEST] * 8
    # Chance alone, with as many trials, does not.
    assert [_found(seed, 120) for seed in range(8)].count(BEST) <= 3


def test_proposals_are_new_reproducible_and_begin_with_the_known_ones():
    known = [GRID[5], GRID[700], GRID[5], GRID[99]]
    runs = [search(RandomThenClimb(known, GRID, 20, 3), _measure, 60, 7) for _ in range(2)]
    assert runs[0] == runs[1]
    configs = [trial.config for trial in runs[0]]
    assert configs[:3] == [GRID[5], GRID[700], GRID[99]]
    assert len(set(configs)) == 60
    other = search(RandomThenClimb(known, GRID, 20, 4), _measure, 60, 7)
    assert [trial.config for trial in other][3:20] != configs[3:20]


def test_however_many_are_asked_for_the_second_half_knows_the_first():
    """A host of many processors builds, and so asks for, more than that at a time."""
    asked = []

    class Noting(RandomThenClimb):
        def propose(self, count, trials):
            proposed = super().propose(count, trials)
            asked.append((len(trials), len(proposed)))
            return proposed

    trials = search(Noting([GRID[0]], GRID, 20), _measure, 40, 64)
    assert asked == [(0, 20), (20, 20)]
    best = sorted(trials[:20], key=lambda trial: trial.time_us)[:3]
    assert all(
        any(trial.config in neighbours(near.config, GRID) for near in best)
        for trial in trials[20:22]
    )
    asked.clear()
    search(Noting([GRID[0]], GRID, 20), _measure, 40, 15)
    assert asked == [(0, 15), (15, 5), (20, 15), (35, 5)]


def test_what_a_model_ranks_first_is_spread():
    ranked = sorted(GRID, key=cost)
    taken = spread(ranked, 5)
    assert taken[0] == BEST
    assert taken == sorted(taken, key=cost)
    for one, other in itertools.combinations(taken, 2):
        assert sum(x != y for x, y in zip(astuple(one), astuple(other), strict=True)) >= 2
    # Nothing better was left out for no reason: each is near one that was taken.
    worst = ranked.index(taken[-1])
    for point in set(ranked[:worst]) - set(taken):
        assert any(point in _near(one) for one in taken)
    assert spread(GRID[:2], 5) == GRID[:1]


def _near(point):
    """All that differ from a point in one field."""
    return [p for p in GRID if sum(map(int.__ne__, astuple(p), astuple(point))) == 1]


def test_the_search_ends_with_the_configurations():
    proposer = RandomThenClimb([GRID[0]], GRID[:9], 3)
    assert {trial.config for trial in search(proposer, _measure, 100, 4)} == set(GRID[:9])


def test_failed_trials_are_not_climbed_from():
    """With nothing right, only chance is left, and the search goes on."""
    proposer = RandomThenClimb([GRID[0]], GRID, 2)
    done = search(proposer, lambda configs: [Trial(c, math.inf) for c in configs], 30, 5)
    assert len({trial.config for trial in done}) == 30


def test_the_search_stops_when_told():
    """Before the next batch; what was built of this one is measured."""
    measured = []

    def measure(configs):
        for trial in _measure(configs):
            measured.append(trial)
            yield trial

    done = search(Listed(GRID), measure, 100, 4, lambda: len(measured) >= 6)
    assert done == measured
    assert len(done) == 8
    assert [trial.config for trial in search(Listed(GRID), _measure, 6, 4)] == GRID[:6]


def test_neighbours_are_one_step_away_among_what_is_valid():
    configs = [Point(a, b, 0, False) for a in (0, 2, 3, 7) for b in (1, 4)]
    configs.remove(Point(3, 4, 0, False))
    near = neighbours(Point(2, 4, 0, False), configs)
    assert set(near) == {Point(0, 4, 0, False), Point(7, 4, 0, False), Point(2, 1, 0, False)}
    assert neighbours(Point(0, 1, 0, False), [*configs, Point(0, 1, None, False)]) != []
