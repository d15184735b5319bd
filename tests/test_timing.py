"""The protocol of a measurement: turns, bounds, warm-up, medians."""

import pytest

from im2win_tvm.bench import timing


class ScriptedClock:
    """A clock that says what it was told, and notes who was called."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.turns = []

    def describe(self):
        return {"clock": "scripted"}

    def wait(self):
        """Calls are done when they return."""

    def turn(self, call):
        name = call()
        self.turns.append(name)
        return {"warm": [self.seconds[name]]}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([4e-6], timing.Times(4.0, 0.0, 1)),
        ([1e-6, 2e-6, 3e-6, 4e-6, 100e-6], timing.Times(3.0, 2.0, 5)),
    ],
)
def test_median_and_interquartile_range(seconds, expected):
    times = timing.Times.of(seconds)
    assert times.median_us == pytest.approx(expected.median_us)
    assert times.iqr_us == pytest.approx(expected.iqr_us)
    assert times.n == expected.n


def test_competitors_take_turns():
    clock = ScriptedClock({"a": 1e-6, "b": 2e-6})
    limits = timing.Limits(warmup=0, seconds=0, least=3, most=100)
    times = timing.measure({"a": lambda: "a", "b": lambda: "b"}, clock, limits)
    assert clock.turns == ["a", "b"] * 3
    assert [times[name]["warm"].median_us for name in "ab"] == pytest.approx([1.0, 2.0])


def test_calls_are_bounded():
    clock = ScriptedClock({"a": 1e-6})
    limits = timing.Limits(warmup=0, seconds=60, least=3, most=7)
    assert timing.measure({"a": lambda: "a"}, clock, limits)["a"]["warm"].n == 7


def test_warm_up_lasts():
    calls = []
    timing.warm_up(lambda: calls.append(1), timing.CpuClock(), 0.01)
    assert len(calls) > 100
    timing.warm_up(lambda: calls.clear(), timing.CpuClock(), 0)
    assert calls == []


def test_cpu_turn_calls_once_before_it_times():
    calls = []
    times = timing.CpuClock().turn(lambda: calls.append(1))
    assert len(times["warm"]) == timing.CpuClock.timed
    assert len(calls) == timing.CpuClock.timed + 1
