"""compile(problem) -> Kernel: choose a schedule, build its module, link one shared library."""

import dataclasses
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tvm_ffi

from . import __version__, artifact, toolchain
from .epilogue import NONE, Epilogue
from .kernel import Kernel
from .lower import calls, cuda_source, function_parameters, lower, write_objects
from .problem import ConvProblem
from .schedules.base import PREPARE, Schedule
from .select import Choice, select
from .target import CpuTarget, Target, resolve

_NATIVE = Path(__file__).parent / "native"


def compile(
    problem: ConvProblem,
    target: str | Target | None = None,
    *,
    arch: str | None = None,
    accuracy: str | None = None,
    schedule: str | Schedule | None = None,
    config: Any = None,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
) -> Kernel:
    """Build a kernel for one problem.

    target, arch: see `im2win_tvm.target.resolve`; CUDA kernels are built without a GPU when
    `arch` is given. accuracy: the class that outputs have at least (see `im2win_tvm.accuracy`).
    None is the dtype's own. For float32 alone: "strict" has its own class hold for every input,
    where "fast", the default, leaves some out (`docs/accuracy.md`); "tf32" lets tensor cores round
    the operands of its products to 10 bits. schedule, config: by name (or a Schedule) and as a
    Config or dict; if None `select` takes those of the fastest tuning record, or the heuristic's.
    bias, residual, activation: what the kernel adds and applies before it stores (see Epilogue).

    Raises AccuracyError, TargetError, ScheduleError or ToolchainError, each saying what is allowed
    or missing.
    """
    target = resolve(target, arch=arch)
    choice = select(problem, target, schedule, config, accuracy)
    return build(problem, target, choice, Epilogue(bias, residual, activation))


def build(
    problem: ConvProblem, target: Target, choice: Choice, epilogue: Epilogue = NONE
) -> Kernel:
    """The kernel of an explicit choice."""
    module = lower(choice.schedule.build(problem, choice.config, target, epilogue))
    folder = tempfile.TemporaryDirectory(prefix="im2win-")
    library = Path(folder.name) / "kernel.so"
    metadata = describe(problem, target, choice, epilogue, module)
    sealed = Path(folder.name) / "metadata.c"
    sealed.write_text(artifact.metadata_source(metadata))
    sources = [sealed, _NATIVE / "metadata.c"]
    if isinstance(target, CpuTarget):
        write_objects(
            module,
            target,
            lambda objects: toolchain.link_cpu_library(
                library, objects, [*sources, _NATIVE / "host.c"]
            ),
        )
    else:
        unit = Path(folder.name) / "kernel.cu"
        unit.write_text(cuda_source(module, target))
        toolchain.build_cuda_library(library, unit, target.arch, sources)
    artifact.seal(library)
    return Kernel(library, artifact.read_metadata(library), owner=folder)


def describe(
    problem: ConvProblem, target: Target, choice: Choice, epilogue: Epilogue, module
) -> dict:
    """The metadata that travels inside the library."""
    parameters = function_parameters(module)
    named = {p.name: p for params in parameters.values() for p in params}
    schedule = choice.schedule
    return {
        "format": artifact.FORMAT,
        "problem": dataclasses.asdict(problem),
        "descriptor": str(problem),
        "epilogue": dataclasses.asdict(epilogue),
        "accuracy": schedule.accuracy(problem),
        "strict": schedule.is_strict(problem),
        "schedule": {
            "name": schedule.name,
            "config": dataclasses.asdict(choice.config),
            "origin": dataclasses.asdict(choice.origin),
        },
        "target": dataclasses.asdict(target) | {"kind": target.kind, "machine": platform.machine()},
        "prepare": PREPARE,
        "prepare_hash": f"{tvm_ffi.structural_hash(module[PREPARE]):016x}",
        "calls": calls(module),
        "arguments": {
            name: {"shape": list(p.shape), "dtype": p.dtype, "alignment": p.alignment}
            for name, p in named.items()
        },
        "workspaces": [name for name, p in named.items() if p.workspace],
        "scratch_bytes_per_thread": schedule.scratch_bytes(problem, choice.config, target),
        "versions": {"im2win_tvm": __version__}
        | {name: _version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
        | ({} if isinstance(target, CpuTarget) else {"nvcc": toolchain.nvcc_version()}),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
