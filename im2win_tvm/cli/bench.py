"""`im2win bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .model_files import MODEL_FILES, chosen_dtype, model_in, refuse
from .options import (
    PROBLEM_HELP,
    SUITE_NAMES,
    AccuracyOption,
    ArchOption,
    ConfigOption,
    DtypeOption,
    LayoutOption,
    TargetOption,
    known_schedule,
    parse_config,
    parse_problem,
)
from .progress import progress, working

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..target import Target


def bench(
    context: typer.Context,
    problems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROBLEM|MODEL]...",
            help=f"{PROBLEM_HELP} Or one model in a file ({MODEL_FILES}), to be measured end to "
            "end and convolution by convolution.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help=f"{SUITE_NAMES}. Default without PROBLEM: paper."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            "--mb",
            help="Batch size. Default of a suite: 1 on llvm, 128 on cuda; of a PROBLEM: its own. "
            "A MODEL takes one that has a symbolic batch.",
        ),
    ] = None,
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Only these, comma-separated. Default: every one."),
    ] = None,
    config: ConfigOption = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Comma-separated: cudnn, cudnn-frontend, cublas, direct (cuda only), tvm, "
            "tvm-tuned, metaschedule (the im2win expressions, searched), torch, or none. "
            "Default: tvm,torch.",
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            "--time-limit",
            metavar="SECONDS",
            help="Most seconds that one implementation of one layer is measured, a third of them "
            "warm-up; least five calls. Default: 0.2 of warm-up, then 0.4. Preparation, such as "
            "cuDNN's search for its fastest engine, comes on top.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the record as JSON, after every layer."),
    ] = None,
    csv_path: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write one row an implementation and layer."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Write a chart of the record.")
    ] = None,
    no_layers: Annotated[
        bool,
        typer.Option("--no-layers", help="Of a MODEL only the whole, not each convolution."),
    ] = False,
    roofline_path: Annotated[
        Path | None,
        typer.Option("--roofline", metavar="FILE", help="Write a roofline as PNG (cuda only)."),
    ] = None,
) -> None:
    """Measure convolutions against TVM's default and PyTorch, or others by --against.

    Every output is checked against a float64 reference in the same run. Exits with 1 if an
    implementation fails its check; a competitor that is not installed is a gap in the table.
    Ratios are within one accuracy class: with --accuracy tf32 all who can compute in TF32 do.
    """
    from ..bench import chart, report, roofline, rows
    from ..bench.baselines import implementations
    from ..bench.baselines.im2win import Im2win
    from ..bench.run import failures, limits_for, run
    from ..builds import default_jobs
    from ..target import resolve

    if time_limit is not None and not time_limit > 0:
        raise typer.BadParameter(f"time-limit={time_limit}: allowed: more than 0")
    resolved = resolve(target, arch=arch)
    model = model_in(problems or [])
    if model is not None:
        refuse(context, "a model", _NOT_OF_MODELS)
        measured_in = chosen_dtype(context, dtype)
        _bench_model(
            model, resolved, batch, measured_in, accuracy, against, time_limit, json_path, no_layers
        )
        return
    if no_layers:
        raise typer.BadParameter("no-layers: allowed with a model")
    chosen = _problems(problems or [], suite, batch, dtype, layout, resolved.kind)
    contenders = implementations(
        resolved,
        _families(against),
        _schedules(schedule, resolved.kind),
        parse_config(config, schedule),
    )
    if roofline_path is not None and resolved.kind != "cuda":
        raise typer.BadParameter(
            f"roofline={str(roofline_path)!r}: ceilings are measured on cuda only; the target is "
            f"{resolved.kind}"
        )
    for path in (json_path, csv_path, png, roofline_path):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def write(record: dict) -> None:
        if json_path is not None:
            part = json_path.with_name(json_path.name + ".part")
            part.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            part.replace(json_path)

    ours = sum(isinstance(entry, Im2win) for entry in contenders)
    builds = 0 if default_jobs(resolved) == 1 else ours * len(chosen)
    with progress(len(chosen) + builds) as step:
        limits = limits_for(resolved, time_limit)
        # Whatever stops the run: what was measured stays.
        record = run(chosen, resolved, contenders, limits, step, accuracy, keep=write)
    print(report.text(record))
    write(record)
    if csv_path is not None:
        csv_path.write_text(rows.text(record))
    if roofline_path is not None:
        roofline.draw(record, roofline_path)
    if png is not None:
        chart.draw(record, png)
    if failures(record):
        raise typer.Exit(1)


# Options without a meaning for a model.
_NOT_OF_MODELS = ("suite", "layout", "schedule", "config", "csv_path", "png", "roofline_path")


def _bench_model(
    path: Path,
    target: Target,
    batch: int | None,
    dtype: str | None,
    accuracy: str | None,
    against: list[str] | None,
    time_limit: float | None,
    json_path: Path | None,
    no_layers: bool,
) -> None:
    from ..bench import models
    from ..bench.run import failures, limits_for

    with working(f"measuring {path}"):
        record = models.measure(
            path,
            target,
            batch=batch,
            dtype=dtype,
            accuracy=accuracy,
            against=_families(against),
            limits=limits_for(target, time_limit),
            layers=not no_layers,
        )
    print(models.text(record))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    failed = [e for e in record["model"]["implementations"] if e["status"] == "failed"]
    if failed or failures(record):
        raise typer.Exit(1)


def _problems(
    texts: list[str],
    suite_name: str | None,
    batch: int | None,
    dtype: str,
    layout: str | None,
    kind: str,
) -> dict[str, ConvProblem]:
    from ..suites import suite

    chosen: dict[str, ConvProblem] = {}
    if suite_name is not None or not texts:
        size = batch if batch is not None else 128 if kind == "cuda" else 1
        chosen |= suite(suite_name or "paper", size, dtype, layout)
    for text in texts:
        name, problem = parse_problem(text, dtype, layout, batch)
        chosen[name] = problem
    return chosen


def _schedules(names: str | None, kind: str) -> list[str] | None:
    """The schedules of --schedule. Raises ScheduleError for one that is not for the target."""
    if names is None:
        return None
    return [known_schedule(name.strip(), kind) for name in names.split(",")]


def _families(against: list[str] | None) -> list[str] | None:
    from ..bench.baselines import COMPETITORS

    if not against:
        return None
    asked = [family.strip() for entry in against for family in entry.split(",")]
    for family in asked:
        if family not in (*COMPETITORS, "none"):
            raise typer.BadParameter(
                f"against={family!r}: allowed: {', '.join(COMPETITORS)} or none"
            )
    return [family for family in dict.fromkeys(asked) if family != "none"]
