"""The configuration that a schedule takes without being told."""

import functools
from typing import Any

from .problem import ConvProblem
from .schedules import Schedule
from .target import Target


@functools.lru_cache(maxsize=256)
def heuristic(schedule: Schedule, problem: ConvProblem, target: Target) -> Any:
    """`schedule.default`, once for each problem: some schedules weigh thousands for it."""
    return schedule.default(problem, target)
