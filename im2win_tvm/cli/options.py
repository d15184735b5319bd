"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..problem import ConvProblem

TargetOption = Annotated[
    str | None,
    typer.Option("--target", help="llvm (CPU) or cuda. Default: cuda where a GPU is, else llvm."),
]
ArchOption = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help="CUDA architecture (sm_90) or LLVM processor (x86-64-v3). Default: what is here.",
    ),
]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")]
AccuracyOption = Annotated[
    str | None,
    typer.Option(
        "--accuracy",
        help="Accuracy class. For float32 only: strict has the default, fp32, hold for every input "
        "(fast, the default rule, leaves some out: docs/accuracy.md); tf32 lets tensor cores round "
        "the operands of its products to 10 bits. Default: the dtype's own (fp32, fp16, bf16).",
    ),
]
LayoutOption = Annotated[
    str | None,
    typer.Option("--layout", help="NCHW or NHWC (1-D: NCW, NWC). Default: channels first."),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--mb", help="Batch size, instead of the one the problem or suite names."),
]
#: The same with its long name, which `im2win verify` has for something else.
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch", "--mb", help="Batch size, instead of the one the problem or suite names."
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=1, help="Processes that compile. Default: one a processor on cuda, else 1."
    ),
]
ScheduleOption = Annotated[
    str | None, typer.Option("--schedule", help="A schedule by name. Default: the selected one.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="Fields of the schedule's configuration as a JSON object; the heuristic's "
        "for the others.",
    ),
]
#: As `im2win_tvm.suites` has them, which a command that only shows its help does not import.
SUITE_NAMES = "paper, resnet50, vgg16, stems or depthwise"
SuitesOption = Annotated[
    list[str] | None,
    typer.Option("--suite", help=f"Every layer of {SUITE_NAMES}, or of all; repeatable."),
]
PROBLEM_HELP = (
    "A oneDNN problem descriptor (mb1ic64ih56oc64kh3ph1) or a layer of a suite (paper:conv9)."
)


def parse_problem(
    text: str, dtype: str, layout: str | None, batch: int | None
) -> tuple[str, ConvProblem]:
    """Name and problem of an argument: a descriptor, or ``suite:layer``.

    Raises ProblemError or SuiteError.
    """
    from ..problem import ConvProblem, descriptor_name
    from ..suites import layer

    suite_name, colon, layer_name = text.partition(":")
    if colon and suite_name.isalnum() and '"' not in text:
        return text, layer(suite_name, layer_name, batch, dtype, layout)
    problem = ConvProblem.parse(text, dtype=dtype, layout=layout)
    if batch is not None:
        problem = problem.replace(batch=batch)
    return descriptor_name(text) or str(problem), problem


def distinct_problems(
    texts: list[str], suites: list[str], batch: int | None, dtype: str, layout: str | None
) -> dict[ConvProblem, list[str]]:
    """The problems of arguments and of suites, once each, with their names.

    Raises ProblemError or SuiteError.
    """
    from ..suites import SUITES, suite

    named = [parse_problem(text, dtype, layout, batch) for text in texts]
    for name in SUITES if "all" in suites else suites:
        for layer, problem in suite(name, batch, dtype, layout).items():
            named.append((f"{name}:{layer}", problem))
    chosen: dict[ConvProblem, list[str]] = {}
    for name, problem in named:
        chosen.setdefault(problem, []).append(name)
    return chosen


def parse_config(text: str | None, schedule: str | None) -> dict[str, Any] | None:
    """The fields of ``--config``. Raises ScheduleError for anything but a JSON object."""
    if text is None:
        return None
    from ..schedules import ScheduleError

    if schedule is None:
        raise ScheduleError(f"config={text!r}: allowed together with --schedule only")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ScheduleError(f"config={text!r}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ScheduleError(f"config={text!r}: allowed: a JSON object of fields")
    return fields


def known_schedule(name: str | None, kind: str) -> str | None:
    """`name` if it is a schedule for this kind of target. Raises ScheduleError."""
    from ..schedules import SCHEDULES, ScheduleError

    allowed = [entry for entry, schedule in SCHEDULES.items() if schedule.kind == kind]
    if name is not None and name not in allowed:
        raise ScheduleError(f"schedule={name!r}: allowed for {kind}: {', '.join(allowed)}")
    return name
