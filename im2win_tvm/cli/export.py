"""`im2win export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .metadata import summary
from .options import (
    PROBLEM_HELP,
    AccuracyOption,
    ArchOption,
    BatchSizeOption,
    ConfigOption,
    DtypeOption,
    LayoutOption,
    ScheduleOption,
    TargetOption,
    parse_config,
    parse_problem,
)
from .progress import working


def export(
    problem: Annotated[str, typer.Argument(help=PROBLEM_HELP)],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="The shared library to write.")
    ],
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    batch: BatchSizeOption = None,
    schedule: ScheduleOption = None,
    config: ConfigOption = None,
    bias: Annotated[bool, typer.Option("--bias", help="The kernel adds a bias.")] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="The kernel adds a tensor like the output.")
    ] = False,
    activation: Annotated[
        str | None, typer.Option("--activation", help="relu, applied last. Default: none.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metadata as JSON instead of a summary.")
    ] = False,
) -> None:
    """Compile one convolution into a shared library that loads without a compiler.

    `im2win_tvm.load(FILE)` runs it with NumPy and apache-tvm-ffi alone.
    """
    from .. import compiler
    from ..epilogue import ACTIVATIONS

    if activation not in ACTIVATIONS:
        raise typer.BadParameter(f"activation={activation!r}: allowed: relu")
    _, parsed = parse_problem(problem, dtype, layout, batch)
    with working(f"compiling {parsed}"):
        kernel = compiler.compile(
            parsed,
            target,
            arch=arch,
            accuracy=accuracy,
            schedule=schedule,
            config=parse_config(config, schedule),
            bias=bias,
            residual=residual,
            activation=activation,
        )
        written = kernel.export(output)
    if as_json:
        print(json.dumps(kernel.metadata, indent=1))
        return
    print(f"{written}: {written.stat().st_size} bytes")
    print("\n".join(summary(kernel.metadata)))
