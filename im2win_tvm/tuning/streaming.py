"""Kernels on their way from the processes that build them to a fleet that measures them."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

from ..bench.timing import Limits
from ..kernel import Kernel
from ..problem import ConvProblem
from .fleet import Fleet
from .measuring import Measurement

__all__ = ["stream"]


class _Built(Protocol):
    """Something with a kernel, or with why there is none."""

    built: Kernel | Exception


Candidate = TypeVar("Candidate", bound=_Built)


def stream(
    fleet: Fleet,
    problem: ConvProblem,
    candidates: Iterable[Candidate],
    limits: Limits,
    unbuilt: Callable[[Exception], Measurement],
) -> Iterator[tuple[Candidate, Measurement]]:
    """Candidates in order, each measured alone, while the next are built.

    unbuilt: what to say of one without a kernel.
    """
    taken: deque[Candidate] = deque()  # from what builds, and not yet handed on

    def without_kernel() -> Iterator[tuple[Candidate, Measurement]]:
        while taken and not isinstance(taken[0].built, Kernel):
            candidate = taken.popleft()
            yield candidate, unbuilt(candidate.built)

    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:

        def libraries() -> Iterator[Path]:
            for index, candidate in enumerate(candidates):
                taken.append(candidate)
                if isinstance(candidate.built, Kernel):
                    yield candidate.built.export(Path(folder) / f"{index}.so")

        for measurement in fleet.each(problem, libraries(), limits):
            yield from without_kernel()
            yield taken.popleft(), measurement
        yield from without_kernel()
