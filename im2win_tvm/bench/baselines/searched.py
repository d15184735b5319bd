"""The im2win expressions as MetaSchedule alone schedules them, where a tuning record says how."""

from __future__ import annotations

from ...problem import ConvProblem
from ...schedules import ScheduleError
from ...select import select
from ...target import Target
from .im2win import Im2win


class Searched(Im2win):
    """A schedule that only tuning records configure: a gap where there is none.

    name: of the schedule. kind: of the targets that it is for.
    """

    family = "metaschedule"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kind = self._schedule.kind

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        reason = super().available(problem, target)
        if reason is None:
            try:
                select(problem, target, self.schedule)
            except ScheduleError as error:
                return str(error)
        return reason
