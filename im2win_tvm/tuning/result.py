"""What came of tuning one schedule on one problem, and who is told while it comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..problem import ConvProblem
from .records import Record

__all__ = ["NOT_BUILT", "Result", "Watcher", "cause"]

#: How the error of a record begins whose kernel could not be built.
NOT_BUILT = "not built: "
# How a measurement's error begins, and what it is called where failures are counted.
_CAUSES = {NOT_BUILT: "not built", "hangs": "hang", "ended its process": "crash"}


def cause(record: Record) -> str | None:
    """In a word or two, why a record has no time; None if it has one."""
    if record.passed:
        return None
    if record.error is None:
        return "wrong"
    found = (name for start, name in _CAUSES.items() if record.error.startswith(start))
    return next(found, "error")


@dataclass
class Result:
    """What came of one schedule on one problem.

    heuristic: fields of the configuration it would have without tuning. records: everything
    measured, in order. tried: configurations taken up; replayed: those of them that an earlier
    session had measured. wrong: what was wrong with which output. errors: how often candidates
    could not be built or run, by reason.
    """

    problem: ConvProblem
    schedule: str
    heuristic: dict[str, Any]
    tried: int = 0
    replayed: int = 0
    records: list[Record] = field(default_factory=list)
    wrong: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record, message: str = "its output was wrong") -> None:
        """Count a record; message: what was wrong with its output, if that was wrong."""
        self.records.append(record)
        if record.error is not None:
            self.errors[record.error] = self.errors.get(record.error, 0) + 1
        elif not record.passed:
            self.wrong.append((record.config, message))

    def best(self, config: dict[str, Any] | None = None) -> Record | None:
        """The fastest right record (of `config`), by the full protocol if there is one."""
        wrong = [config for config, _ in self.wrong]
        right = [
            record
            for record in self.records
            if record.passed and record.config not in wrong and config in (None, record.config)
        ]
        return min(right, key=lambda r: (r.protocol != "full", r.time_us), default=None)

    def failures(self) -> dict[str, int]:
        """How many trials of the search have no time, by cause."""
        counts: dict[str, int] = {}
        for record in self.records:
            why = cause(record)
            if why is not None and record.protocol == "search":
                counts[why] = counts.get(why, 0) + 1
        return counts


class Watcher:
    """Is told what a session does, as it does it. This one shows nothing."""

    def search(self, result: Result, trials: int) -> None:
        """A search begins, of at most `trials` configurations."""

    def building(self, result: Result, count: int) -> None:
        """So many kernels are built before the next trial."""

    def trial(self, result: Result, record: Record, replayed: bool) -> None:
        """A trial of a search is over; replayed: its record was there before."""

    def ended(self, result: Result) -> None:
        """A search is over: all its trials, its time, or no hope for it."""

    def finals(self, results: list[Result], count: int) -> None:
        """The fastest of these searches, so many, are measured again, by turns."""
