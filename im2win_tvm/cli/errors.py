"""What the package refuses is one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    """The command group that turns the package's errors into messages."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _refusals() as error:
            print(f"im2win: error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None


def _refusals() -> tuple[type[Exception], ...]:
    """Imported only once something is raised, so that `--help` does not wait for TVM."""
    from ..accuracy import AccuracyError
    from ..arrays import ArgumentError
    from ..artifact import ArtifactError
    from ..batch import BatchError
    from ..bench.operands import ReferenceError
    from ..bench.run import BenchError
    from ..problem import ProblemError
    from ..schedules import ScheduleError
    from ..suites import SuiteError
    from ..target import TargetError
    from ..toolchain import ToolchainError
    from ..tuning.measuring import TuningError

    # Where it was not imported, nothing of it was raised.
    models = sys.modules.get(f"{__package__.rpartition('.')[0]}.relax.models")

    return (
        *([models.ModelError] if models else []),
        AccuracyError,
        ArgumentError,
        ArtifactError,
        BatchError,
        BenchError,
        OSError,
        ProblemError,
        ReferenceError,
        ScheduleError,
        SuiteError,
        TargetError,
        ToolchainError,
        TuningError,
    )
