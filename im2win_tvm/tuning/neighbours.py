"""Records of other problems: what is fast there may be fast here, where nothing was measured.

A neighbour has the same filter, stride, dilation, groups and layout, and elements of the same size:
kernels for float16 and bfloat16 take the same configurations. Its batch, channels and image differ.
How far it is away is told in octaves: 1 for each doubling or halving of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..problem import ConvProblem
from ..schedules import Schedule
from ..target import Target
from .lookup import configuration
from .records import Record, RecordError

__all__ = ["borrowed", "distance", "nearest"]


def distance(one: ConvProblem, other: ConvProblem) -> float | None:
    """Octaves between two problems; None where they are no neighbours.

    Batch, input channels and output channels count with their ratio, the images with that of their
    areas. Padding does not count.
    """
    if _fixed(one) != _fixed(other):
        return None
    return sum(abs(math.log2(a / b)) for a, b in zip(_varying(one), _varying(other), strict=True))


def nearest(problem: ConvProblem, others: Iterable[ConvProblem]) -> list[tuple[float, ConvProblem]]:
    """The neighbours among `others` with their distances, the nearest first; not itself.

    Of those equally near, the ones of the problem's own dtype go first.
    """
    found = [(distance(problem, other), other) for other in others if other != problem]
    known = [(octaves, other) for octaves, other in found if octaves is not None]

    def order(entry: tuple[float, ConvProblem]) -> tuple:
        return entry[0], entry[1].dtype != problem.dtype, str(entry[1])

    return sorted(known, key=order)


def borrowed(
    problem: ConvProblem,
    schedule: Schedule,
    target: Target,
    fastest: Mapping[ConvProblem, Record],
    count: int,
) -> list[Any]:
    """The configurations of the nearest neighbours that the schedule takes for `problem`, too.

    fastest: the record of each problem that counts.
    """
    found: list[Any] = []
    for _, other in nearest(problem, fastest):
        if len(found) == count:
            break
        try:
            config = configuration(fastest[other], schedule, problem, target)
        except RecordError:
            continue
        if config not in found:
            found.append(config)
    return found


def _fixed(problem: ConvProblem) -> tuple[Any, ...]:
    return (
        problem.kernel_size, problem.stride, problem.dilation, problem.itemsize, problem.layout,
        problem.groups if problem.groups < problem.in_channels else "depthwise",
    )  # fmt: skip


def _varying(problem: ConvProblem) -> tuple[int, ...]:
    area = math.prod(problem.output_size)
    return problem.batch, problem.in_channels, problem.out_channels, area
