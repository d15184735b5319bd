"""What `im2win tune` shows while it runs, on stderr: a table on a terminal, lines of a log else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..bench.units import microseconds, ratio
from ..problem import ConvProblem
from ..tuning.plan import Deadline, Plan
from ..tuning.records import Record
from ..tuning.result import Result, Watcher

__all__ = ["Board", "watching"]

# Searches that the table shows; a terminal has about 24 lines.
_ROWS = 14

#: The shortest time in microseconds by the roofline, of a problem and schedule; None: not known.
Floor = Callable[[ConvProblem, str], float | None]


@dataclass
class _Row:
    """A search, and the times of it so far: the best, and the heuristic's."""

    result: Result
    trials: int
    best_us: float = inf
    heuristic_us: float = inf
    ended: bool = False

    def speed(self) -> str:
        """The best against the heuristic's configuration, which is the baseline of a search."""
        known = self.best_us < inf and self.heuristic_us < inf
        return ratio(self.heuristic_us / self.best_us) if known else "-"

    def failures(self) -> str:
        """How many trials have no time, by cause."""
        return ", ".join(f"{count} {why}" for why, count in self.result.failures().items()) or "-"


class Board(Watcher):
    """Keeps count of a session, for whoever shows it.

    searches: how many there will be. trials: most of each.
    """

    def __init__(self, searches: int, trials: int, floor: Floor, deadline: Deadline) -> None:
        self.rows: list[_Row] = []
        self.doing = ""
        self._searches, self._trials = searches, trials
        self._floor, self._deadline = floor, deadline
        self._begun = self._last = time.monotonic()
        self._spent, self._measured = 0.0, 0

    def search(self, result: Result, trials: int) -> None:
        self.rows.append(_Row(result, trials))
        self._last = time.monotonic()

    def building(self, result: Result, count: int) -> None:
        self.doing = f"building {count} of {result.problem} {result.schedule}"

    def trial(self, result: Result, record: Record, replayed: bool) -> None:
        row = self._row(result)
        now = time.monotonic()
        if not replayed:
            self._spent, self._measured = self._spent + now - self._last, self._measured + 1
        self._last = now
        self.doing = f"measuring {result.problem} {result.schedule}"
        row.best_us = min(row.best_us, record.time_us)
        if record.config == result.heuristic:
            row.heuristic_us = record.time_us

    def ended(self, result: Result) -> None:
        self._row(result).ended = True

    def finals(self, results: list[Result], count: int) -> None:
        self.doing = f"measuring the fastest {count} of {results[0].problem} again"

    def remaining(self) -> float | None:
        """Seconds until the last search ends, at the pace so far; None: nothing was measured."""
        limit = self._deadline.left
        if not self._measured:
            return limit
        trials = sum(row.trials - row.result.tried for row in self.rows if not row.ended)
        trials += self._trials * (self._searches - len(self.rows))
        seconds = trials * self._spent / self._measured
        return seconds if limit is None else min(seconds, limit)

    def roofline(self, row: _Row) -> str:
        """The part of the rate that the device's measured ceilings allow."""
        floor = self._floor(row.result.problem, row.result.schedule)
        return "-" if floor is None or row.best_us == inf else f"{floor / row.best_us:.0%}"

    def _row(self, result: Result) -> _Row:
        return next(row for row in reversed(self.rows) if row.result is result)

    def clock(self) -> str:
        """Elapsed and remaining time."""
        left = self.remaining()
        elapsed = _clock(time.monotonic() - self._begun)
        text = f"{len(self.rows)} of {self._searches} searches, {elapsed}"
        return text + ("" if left is None else f", about {_clock(left)} left")


class _Table(Board):
    """On a terminal: the latest searches, and what is being done."""

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for name in ("problem", "schedule"):
            table.add_column(name, overflow="fold")
        for name in ("trials", "best us", "vs heuristic", "of roofline", "failed"):
            table.add_column(name, justify="right")
        for row in self.rows[-_ROWS:]:
            table.add_row(
                Text(str(row.result.problem)),
                row.result.schedule,
                f"{row.result.tried}/{row.trials}",
                microseconds(row.best_us) if row.best_us < inf else "-",
                row.speed(),
                self.roofline(row),
                row.failures(),
            )
        return Group(table, Text(f"{self.doing}; {self.clock()}"))


class _Log(Board):
    """Elsewhere: a line for each search, better time, failure and final round."""

    def search(self, result: Result, trials: int) -> None:
        super().search(result, trials)
        self._say(f"{result.problem} {result.schedule}: at most {trials} trials")

    def trial(self, result: Result, record: Record, replayed: bool) -> None:
        row = self._row(result)
        before = row.best_us
        super().trial(result, record, replayed)
        where = f"{result.problem} {result.schedule} {result.tried}/{row.trials}"
        if row.best_us < before:
            text = f"best {microseconds(row.best_us)} us, {row.speed()} the heuristic"
            part = self.roofline(row)
            text += "" if part == "-" else f", {part} of the roofline"
            self._say(f"{where}: {text}; {self.clock()}")
        elif not record.passed:
            self._say(f"{where}: failed so far: {row.failures()}")

    def finals(self, results: list[Result], count: int) -> None:
        super().finals(results, count)
        self._say(self.doing)

    def _say(self, text: str) -> None:
        now = datetime.now().isoformat(" ", "seconds")
        Console(stderr=True, soft_wrap=True).print(f"{now} {text}", markup=False, highlight=False)


@contextmanager
def watching(plans: list[Plan], trials: int, floor: Floor, deadline: Deadline) -> Iterator[Board]:
    """What a session of these plans reports to, shown while the body runs."""
    searches = sum(len(plan.schedules) for plan in plans)
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log(searches, trials, floor, deadline)
        return
    table = _Table(searches, trials, floor, deadline)
    # Results go to stdout. On the same terminal they have to stand above the table; a file has to
    # stay what it is.
    streams = {"redirect_stdout": sys.stdout.isatty(), "redirect_stderr": False}
    with Live(table, console=console, transient=True, refresh_per_second=2, **streams):
        yield table


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
