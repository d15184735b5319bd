"""The project's schedules. Weights are prepared outside the timing, the transform is inside."""

from __future__ import annotations

from typing import Any

from ...builds import Request, build_all
from ...kernel import Kernel
from ...problem import ConvProblem
from ...schedules import SCHEDULES, Schedule
from ...target import Target
from ..operands import Operands
from .base import Prepared


class Im2win:
    """One schedule, with the heuristic's configuration unless one is given.

    schedule: by name, or one that is not in SCHEDULES. name: the schedule's unless given.
    """

    family = "im2win"
    relative_limit = None

    def __init__(
        self, schedule: str | Schedule, config: Any = None, name: str | None = None
    ) -> None:
        self.schedule = schedule
        self.config = config
        self._schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.name = self._schedule.name if name is None else name
        self._built: dict[ConvProblem, Kernel | Exception] = {}

    def accuracy(self, problem: ConvProblem) -> str:
        return self._schedule.accuracy(problem)

    def is_strict(self, problem: ConvProblem) -> bool:
        return self._schedule.is_strict(problem)

    def request(self, problem: ConvProblem, target: Target) -> Request:
        """The kernel for a problem; a schedule of tf32 is asked for by its name."""
        config = self.config_for(problem, target)
        accuracy = self.accuracy(problem)
        return Request(problem, target, self.schedule, config, accuracy=accuracy)

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        return self._schedule.supports(problem, target)

    def config_for(self, problem: ConvProblem, target: Target) -> Any:
        """The configuration for a problem; None is the heuristic's."""
        return self.config

    def provide(self, problem: ConvProblem, built: Kernel | Exception) -> None:
        """A kernel built beforehand, or the error it met, for `prepare` to use once."""
        self._built[problem] = built

    def prepare(self, operands: Operands, target: Target) -> Prepared:
        problem = operands.problem
        kernel = self._built.pop(problem, None) or next(build_all([self.request(problem, target)]))
        if isinstance(kernel, Exception):
            raise kernel
        weights = kernel.prepare(operands.w)
        output = operands.poisoned()

        def call() -> Any:
            return kernel(operands.x, weights, out=output)

        detail = {"schedule": kernel.metadata["schedule"]}
        return Prepared(call, kernel.workspace_bytes, detail)
