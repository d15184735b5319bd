"""`im2win inspect`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .metadata import fields, shown_accuracy, summary
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

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..select import Choice
    from ..target import Target


def inspect(
    subject: Annotated[
        str, typer.Argument(metavar="PROBLEM|FILE", help=f"{PROBLEM_HELP} Or an exported kernel.")
    ],
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    accuracy: AccuracyOption = None,
    layout: LayoutOption = None,
    batch: BatchSizeOption = None,
    schedule: ScheduleOption = None,
    config: ConfigOption = None,
    tir: Annotated[bool, typer.Option("--tir", help="Print the scheduled TVMScript.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="Print the CUDA source.")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="Print the PTX.")] = False,
    asm: Annotated[bool, typer.Option("--asm", help="Print the CPU's assembly.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a problem is compiled to and why, or what an exported kernel is.

    An exported kernel is only read: nothing in it runs. For CUDA the kernels are compiled, so that
    their registers and spills can be shown.
    """
    if subject.endswith(".so") or Path(subject).is_file():
        from ..artifact import read_metadata

        metadata = read_metadata(subject)
        print(json.dumps(metadata, indent=1) if as_json else "\n".join(summary(metadata)))
        return
    from ..select import select
    from ..target import resolve

    resolved = resolve(target, arch=arch)
    flags = (("--cuda", cuda, "cuda"), ("--ptx", ptx, "cuda"), ("--asm", asm, "llvm"))
    for flag, wanted, kind in flags:
        if wanted and resolved.kind != kind:
            raise typer.BadParameter(f"{flag}: allowed for --target {kind}, not for {resolved}")
    _, problem = parse_problem(subject, dtype, layout, batch)
    choice = select(problem, resolved, schedule, parse_config(config, schedule), accuracy)
    with working(f"compiling {problem}"):
        shown = _facts(problem, resolved, choice)
        shown |= _generated(problem, resolved, choice, tir, cuda, ptx, asm)
    if as_json:
        print(json.dumps(shown, indent=1))
    else:
        print("\n".join(_lines(shown)))


def _facts(problem: ConvProblem, target: Target, choice: Choice) -> dict[str, Any]:
    return {
        "problem": str(problem),
        "dtype": problem.dtype,
        "layout": problem.layout,
        "target": str(target),
        "gflop": problem.flops / 1e9,
        "bytes": {
            "input, weights and output": problem.min_bytes,
            "im2win tensor": problem.im2win_elements * problem.itemsize,
            "im2col matrix": problem.im2col_elements * problem.itemsize,
        },
        "accuracy": choice.schedule.accuracy(problem),
        "strict": choice.schedule.is_strict(problem),
        "schedule": choice.schedule.name,
        "config": asdict(choice.config),
        "origin": asdict(choice.origin),
        "rejected": choice.rejected,
        "records_not_used": _missed(choice),
    }


def _missed(choice: Choice) -> dict[str, dict[str, Any]]:
    """The reasons why tuning records do not count, each with how many and the first of them."""
    reasons: dict[str, dict[str, Any]] = {}
    for miss in choice.missed:
        entry = reasons.setdefault(miss.reason, {"count": 0, "first": miss.where})
        entry["count"] += 1
    return reasons


def _generated(
    problem: ConvProblem,
    target: Target,
    choice: Choice,
    tir: bool,
    cuda: bool,
    ptx: bool,
    asm: bool,
) -> dict[str, Any]:
    """The code that was asked for, and for CUDA what its kernels take."""
    import tvm

    from .. import lower, toolchain

    module = lower.lower(choice.schedule.build(problem, choice.config, target))
    shown: dict[str, Any] = {}
    if tir:
        shown["tir"] = module.script()
    if asm:
        shown["asm"] = tvm.compile(module, target=target.tvm()).mod.inspect_source("asm")
    if target.kind != "cuda":
        return shown
    source = lower.cuda_source(module, target)
    if cuda:
        shown["cuda"] = source
    if ptx:
        shown["ptx"] = toolchain.compile_ptx(source, target.arch)
    try:
        with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
            unit = Path(folder) / "kernel.cu"
            unit.write_text(source)
            built = toolchain.build_cuda_library(unit.with_suffix(".so"), unit, target.arch, [])
        shown["resources"] = [entry._asdict() for entry in toolchain.parse_resources(built)]
    except toolchain.ToolchainError as error:
        shown["resources"] = str(error)
    return shown


def _lines(shown: dict[str, Any]) -> list[str]:
    from ..bench import units
    from ..select import Origin

    lines = [
        f"{'problem':<16} {shown['problem']} {shown['dtype']} {shown['layout']}",
        f"{'target':<16} {shown['target']}",
        f"{'arithmetic':<16} {shown['gflop']:.3f} GFLOP",
    ]
    lines += [f"{name:<16} {units.size(count)}" for name, count in shown["bytes"].items()]
    lines += [
        f"{'accuracy':<16} {shown_accuracy(shown)}",
        f"{'schedule':<16} {shown['schedule']}",
        f"{'config':<16} {fields(shown['config'])}",
        f"{'from':<16} {Origin(**shown['origin'])}",
    ]
    lines += [
        f"{'record not used':<16} {reason} ({entry['count']}; {entry['first']})"
        for reason, entry in shown["records_not_used"].items()
    ]
    lines += [f"{'not ' + name:<16} {reason}" for name, reason in shown["rejected"].items()]
    resources = shown.get("resources", [])
    if isinstance(resources, str):
        lines.append(f"{'resources':<16} unknown: {resources}")
    else:
        for entry in resources:
            spills = entry["spill_store_bytes"] + entry["spill_load_bytes"]
            lines.append(
                f"{entry['kernel']}: {entry['registers']} registers, "
                f"{units.size(entry['shared_bytes'])} shared, {entry['stack_bytes']} B stack, "
                f"{spills} B spilled"
            )
    for name in ("tir", "cuda", "ptx", "asm"):
        if name in shown:
            lines += ["", f"--- {name}", shown[name].rstrip()]
    return lines
