"""`im2win export`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .metadata import summary
from .model_files import MODEL_FILES, chosen_dtype, model_in, refuse
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
    context: typer.Context,
    problem: Annotated[
        str,
        typer.Argument(
            metavar="PROBLEM|MODEL",
            help=f"{PROBLEM_HELP} Or a model in a file: {MODEL_FILES}.",
        ),
    ],
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
        str | None,
        typer.Option("--activation", help="relu, relu6 or gelu, applied last. Default: none."),
    ] = None,
    choice: Annotated[
        str | None,
        typer.Option(
            "--choice",
            help="Of a model's convolutions: all by kernels of this package, or measured: by TVM's "
            "own where these are faster here. Default: all.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the metadata as JSON instead of a summary.")
    ] = False,
) -> None:
    """Compile one convolution, or a model, into a shared library that loads without a compiler.

    `im2win_tvm.load(FILE)` runs a convolution with NumPy and apache-tvm-ffi alone. A model runs in
    TVM's virtual machine: `tvm.relax.VirtualMachine(tvm.runtime.load_module(FILE), device)`.
    """
    model = model_in([problem])
    if model is not None:
        refuse(context, "a model", _OF_PROBLEMS)
        own = chosen_dtype(context, dtype)
        _export_model(model, output, target, arch, accuracy, own, batch, choice)
        return
    if choice is not None:
        raise typer.BadParameter("--choice: allowed with a model only")
    from .. import compiler
    from ..epilogue import ACTIVATIONS

    if activation not in ACTIVATIONS:
        raise typer.BadParameter(f"activation={activation!r}: allowed: relu, relu6, gelu")
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


# Options that a model decides itself.
_OF_PROBLEMS = ("layout", "schedule", "config", "bias", "residual", "activation", "as_json")


def _export_model(
    path: Path,
    output: Path,
    target: str | None,
    arch: str | None,
    accuracy: str | None,
    dtype: str | None,
    batch: int | None,
    choice: str | None,
) -> None:
    from ..artifact import copy_atomically
    from ..relax import UseIm2win, build, read, specialise
    from ..target import resolve

    where = resolve(target, arch=arch)
    if choice not in (None, "all", "measured"):
        raise typer.BadParameter(f"choice={choice!r}: allowed: all or measured")
    rewrite = UseIm2win(where, accuracy=accuracy, choice=choice or "all")
    with working(f"compiling {path}"), tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        library = Path(folder) / "model.so"
        module = read(path, dtype)
        module = module if batch is None else specialise(module, batch)
        build(rewrite(module), where).export_library(str(library))
        written = copy_atomically(library, output)
    print(f"{written}: {written.stat().st_size} bytes")
    print(rewrite.report)
