"""Learning from measured times. Least squares take XGBoost's place: what is tested is ours."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tuning_records import CPU, PROBLEM, failed, make, write

from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.tuning import plan, ranking
from im2win_tvm.tuning.measuring import TuningError
from im2win_tvm.tuning.search import Trial, search

SCHEDULE = SCHEDULES["cpu_blocked"]
CONFIGS = list(SCHEDULE.configs(PROBLEM, CPU))
DEFAULT = SCHEDULE.default(PROBLEM, CPU)
OTHER = PROBLEM.replace(batch=2)


@pytest.fixture
def squares(monkeypatch):
    """A regression that finds what is linear."""

    def train(parameters, data, rounds):
        rows, wanted = data
        middle, mean = rows.mean(axis=0), wanted.mean()
        found = np.linalg.lstsq(rows - middle, wanted - mean, rcond=None)[0]
        return SimpleNamespace(predict=lambda asked: (asked[0] - middle) @ found + mean)

    module = SimpleNamespace(DMatrix=lambda rows, wanted=None: (rows, wanted), train=train)
    monkeypatch.setitem(sys.modules, "xgboost", module)


def _time(config):
    """What the schedule's model says, but for a part that it does not know."""
    cost = SCHEDULE.estimate(PROBLEM, config, CPU)
    return cost * math.exp(0.1 * config.tile_columns - 0.5 * config.tile_rows)


BEST = min(CONFIGS, key=_time)


def _search(learned, most):
    def measure(configs):
        return [Trial(config, _time(config)) for config in configs]

    return [trial.config for trial in search(learned, measure, most)]


def _learned(known=(), explore=12):
    cost = {config: SCHEDULE.estimate(PROBLEM, config, CPU) for config in CONFIGS}
    return ranking.Learned([DEFAULT], cost, explore, 1, PROBLEM, known)


def test_it_finds_what_the_model_misses(squares):
    """Right after the trials that it learns from."""
    tried = _search(_learned(), 20)
    assert tried[0] == DEFAULT
    assert len(set(tried)) == 20
    assert BEST in tried[12:14]
    assert _search(_learned(), 20) == tried
    # It is not where the model alone points, nor where chance went.
    ranked = sorted(CONFIGS, key=lambda config: SCHEDULE.estimate(PROBLEM, config, CPU))
    assert BEST not in [*ranked[:20], *tried[:12]]


def test_trials_without_a_time_are_taken_for_slow_ones(squares):
    def measure(configs):
        return [Trial(c, math.inf if c.tile_rows > 3 else _time(c)) for c in configs]

    assert BEST.tile_rows > 3
    done = search(_learned(explore=40), measure, 56)
    lost = [math.isinf(trial.time_us) for trial in done]
    assert sum(lost[40:]) / 16 < sum(lost[:40]) / 40
    assert BEST not in [trial.config for trial in done[40:44]]


def test_all_is_proposed_once_in_the_end(squares):
    assert sorted(map(repr, _search(_learned(), 10**6))) == sorted(map(repr, CONFIGS))


def test_samples_of_other_problems(tmp_path):
    changed = {"unroll": 2}
    write(
        tmp_path,
        make(20.0, problem=OTHER),
        make(5.0, problem=OTHER, changed=changed, versions={"code": "old"}),
        make(5.0),  # the problem itself: its trials count, and not its records
        failed(problem=OTHER, changed={"unroll": 3}),
        make(5.0, problem=OTHER, changed={"lanes": 3}),
        make(5.0, problem=OTHER, changed={"new": 3}),
        b"{}\n",
    )
    kind = type(DEFAULT)
    found = ranking.samples(SCHEDULE, kind, [tmp_path], CPU, PROBLEM)
    assert len(found) == 2
    (first, slow), (second, fast) = found
    assert slow + fast == pytest.approx(0.0)
    assert slow > fast
    assert sum(x != y for x, y in zip(first, second, strict=True)) == 1
    assert ranking.samples(SCHEDULE, kind, [tmp_path], CPU, OTHER)[0][1] == 0.0


def test_what_is_known_of_others_helps_from_the_first_trial(squares, tmp_path):
    other = [(ranking.row(OTHER, c), math.log(_time(c) / SCHEDULE.estimate(PROBLEM, c, CPU)))
             for c in CONFIGS[::7]]  # fmt: skip
    mean = sum(y for _, y in other) / len(other)
    known = [(row, y - mean) for row, y in other]
    assert BEST in _search(_learned(known, explore=3), 6)


def test_learning_needs_xgboost(monkeypatch):
    monkeypatch.setattr(ranking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TuningError, match=r"pip install 'im2win_tvm\[tune\]'"):
        ranking.require()


def test_a_search_learns_where_it_is_told_to(squares, tmp_path):
    write(tmp_path, make(20.0, problem=OTHER))
    made = plan.proposer(PROBLEM, SCHEDULE.name, CPU, 8, 0, learn=[tmp_path])
    assert isinstance(made, ranking.Learned)
    assert _search(made, 8)[0] == DEFAULT
    plain = plan.proposer(PROBLEM, SCHEDULE.name, CPU, 8, 0)
    assert not isinstance(plain, ranking.Learned)
