"""The shortest time of a problem by the roofline: the device's ceilings, measured here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

from .. import processes
from ..bench import ceilings, roofline, timing
from ..bench.run import limits_for
from ..problem import ConvProblem
from ..target import Target

__all__ = ["floor_us", "measured"]

# Seconds for the measurement, PyTorch's start included, and until a killed process ends.
_PATIENCE, _ENDING = 180.0, 10.0


def floor_us(problem: ConvProblem, accuracy: str, measured: dict[str, Any]) -> float:
    """Microseconds that `problem` takes at the attainable rate of its class.

    measured: ceilings, as `measured` has them. Bytes are those of input, weights and output once.
    """
    rate = roofline.attainable(problem.flops / problem.min_bytes, measured, accuracy)
    return problem.flops / (rate * 1e12) * 1e6


def measured(target: Target, classes: Iterable[str]) -> dict[str, Any] | None:
    """The ceilings of the GPU that is here, of these accuracy classes; None where there are none.

    In a process of its own: one that has used the GPU keeps some of its memory.
    """
    if target.kind != "cuda":
        return None
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, target, sorted(classes)), daemon=True)
    process.start()
    theirs.close()
    try:
        # No search depends on it: what fails or hangs leaves the ceilings unknown.
        return ours.recv() if ours.poll(_PATIENCE) else None
    except (EOFError, OSError):
        return None
    finally:
        process.kill()
        process.join(_ENDING)


def _measure(connection: Connection, target: Target, classes: list[str]) -> None:
    """In the other process."""
    processes.begin()
    try:
        clock = timing.clock_for(target.kind)
        connection.send(ceilings.measure(clock, limits_for(target), classes))
    except Exception:  # without PyTorch for this GPU, or without room on it
        connection.send(None)
