"""The protocol: warm-up, competitors by turns, median and interquartile range.

Competitors take turns instead of running one after the other, so that a clock that drops or a
neighbour that wakes up hits all of them. What a turn is depends on the device:

* CPU: a pause, an untimed call, then a few timed ones, caches warm. The pause is there because
  OpenMP threads of the competitor before go on spinning for some milliseconds; the untimed call
  brings the own data and threads back. Wall time.
* CUDA: the L2 cache is flushed and one call timed ("cold"), then another without a flush ("hot").
  Time between two events around the call, on the device. A short idle kernel in front lets the
  host enqueue the whole call first, so that its launch overhead is not measured as device time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any, Protocol

__all__ = ["CpuClock", "CudaClock", "Limits", "Times", "clock_for", "measure"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Limits:
    """How long one implementation of one problem is measured, in seconds and calls.

    At least `least` calls are timed in each cache state, then as many as fit into `seconds`, up
    to `most`.
    """

    warmup: float = 0.2
    seconds: float = 0.5
    least: int = 3
    most: int = 100


@dataclass(frozen=True)
class Times:
    """Median and interquartile range of `n` timed calls, in microseconds."""

    median_us: float
    iqr_us: float
    n: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """The summary of samples in seconds."""
        if len(seconds) < 2:
            return cls(median(seconds) * 1e6, 0.0, len(seconds))
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        return cls(median(seconds) * 1e6, (high - low) * 1e6, len(seconds))


class Clock(Protocol):
    """How calls are timed on one kind of device."""

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""

    def wait(self) -> None:
        """Until everything called has happened."""

    def turn(self, call: Call) -> dict[str, list[float]]:
        """One turn of one competitor: seconds of each timed call by cache state."""


class CpuClock:
    """Wall time of calls with warm caches."""

    pause = 0.01
    timed = 5
    # A turn ends after this long, and a call that takes longer needs no untimed one before it:
    # next to it, refilling caches does not show.
    long = 0.05

    def __init__(self) -> None:
        self._last: dict[Call, float] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "clock": "wall time of the call (perf_counter)",
            "cache": "warm: repeated calls on the same tensors",
            "turn": f"pause of {self.pause * 1e3:g} ms, one untimed call, up to {self.timed} timed",
        }

    def wait(self) -> None:
        """Calls return when they are done."""

    def turn(self, call: Call) -> dict[str, list[float]]:
        time.sleep(self.pause)
        if self._last.get(call, 0.0) < self.long:
            call()
        samples: list[float] = []
        while len(samples) < self.timed and sum(samples) < self.long:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        self._last[call] = samples[-1]
        return {"warm": samples}


class CudaClock:
    """Device time between events, with a flushed L2 cache and with a warm one."""

    # Larger than any L2 in use (H100: 50 MiB), and evicted by its own writes.
    flush_bytes = 256 << 20
    # A quarter of a millisecond at 2 GHz: longer than the host takes to enqueue a call.
    idle_cycles = 500_000

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device="cuda")

    def describe(self) -> dict[str, Any]:
        return {
            "clock": "CUDA events around the call, on the device",
            "cache": f"cold: L2 flushed by writing {self.flush_bytes >> 20} MiB; hot: right after",
            "turn": "one cold call, one hot call",
        }

    def wait(self) -> None:
        self._torch.cuda.synchronize()

    def turn(self, call: Call) -> dict[str, list[float]]:
        events = []
        for flush in (True, False):
            if flush:
                self._flush.zero_()
            self._torch.cuda._sleep(self.idle_cycles)
            start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        self.wait()
        cold, hot = (start.elapsed_time(end) * 1e-3 for start, end in events)
        return {"cold": [cold], "hot": [hot]}


class CallsClock(CudaClock):
    """Device time of calls back to back, as of a model that serves: with what the host costs."""

    # Seconds that the calls of a turn take at least.
    group = 0.03

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[Call, int] = {}
        self._last: dict[Call, float] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "clock": "CUDA events around calls back to back, divided by their number",
            "cache": "steady: what the call before left",
            "turn": f"calls for {self.group * 1e3:g} ms at least, after an untimed one if shorter",
        }

    def turn(self, call: Call) -> dict[str, list[float]]:
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        calls = self._calls.get(call, 1)
        if self._last.get(call, 0.0) < self.group:
            call()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        self.wait()
        seconds = start.elapsed_time(end) * 1e-3
        if seconds < self.group:
            # Measured again, until a turn is long enough.
            self._calls[call] = max(calls + 1, math.ceil(1.1 * calls * self.group / seconds))
            return self.turn(call)
        self._last[call] = seconds / calls
        return {"steady": [seconds / calls]}


def clock_for(kind: str) -> Clock:
    """The clock of a target's kind."""
    return CudaClock() if kind == "cuda" else CpuClock()


def warm_up(call: Call, clock: Clock, seconds: float) -> None:
    """Call until `seconds` have passed, at least once."""
    clock.wait()
    start = time.perf_counter()
    while True:
        call()
        clock.wait()
        if time.perf_counter() - start >= seconds:
            return


def measure(calls: Mapping[str, Call], clock: Clock, limits: Limits) -> dict[str, dict[str, Times]]:
    """Times of each call by cache state; the calls take turns until each has had its limits."""
    for call in calls.values():
        warm_up(call, clock, limits.warmup)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    waiting = list(calls)
    while waiting:
        for name in list(waiting):
            start = time.perf_counter()
            for state, seconds in clock.turn(calls[name]).items():
                samples[name].setdefault(state, []).extend(seconds)
            spent[name] += time.perf_counter() - start
            timed = min(map(len, samples[name].values()))
            if timed >= limits.most or (timed >= limits.least and spent[name] >= limits.seconds):
                waiting.remove(name)
    return {
        name: {state: Times.of(seconds) for state, seconds in states.items()}
        for name, states in samples.items()
    }


def describe(clock: Clock, limits: Limits) -> dict[str, Any]:
    """The protocol as a record states it; times in seconds."""
    return {
        **clock.describe(),
        "order": "competitors take turns",
        "statistic": "median and interquartile range",
        "limits": asdict(limits),
    }
