"""Run a kernel on generated tensors and compare every output with the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from math import prod

import numpy as np

from . import reference, tensors
from .kernel import Kernel
from .problem import ConvProblem
from .select import Choice
from .target import CudaTarget
from .tensors import CheckResult

__all__ = ["bytes_needed", "emulated", "free_bytes", "on_device", "verify"]

# Float64 outputs of the reference that are held at once.
_CHUNK_BYTES = 256 << 20

Run = Callable[[tensors.Tensors], np.ndarray]


def verify(
    problem: ConvProblem, run: Run, kind: str, seed: int = 0, accuracy: str | None = None
) -> CheckResult:
    """Whether `run` computes the convolution of tensors filled as `kind` says.

    `run` takes the tensors and returns an output that it wrote into an array of NaN. `accuracy` is
    the class that the kernel says it has, None for the dtype's own. Images are
    compared a few at a time, so that the float64 outputs of a large batch are never all there; the
    result is that of the first that are wrong, or the largest error of all.
    """
    made = tensors.fill(problem, kind, seed)
    output = run(made)
    if output.shape != problem.output_shape:
        return CheckResult(
            False, float("inf"), f"output of shape {output.shape}, not {problem.output_shape}"
        )
    step = max(1, _CHUNK_BYTES // (8 * prod(problem.output_shape) // problem.batch))
    worst = CheckResult(True, 0.0, "")
    for start in range(0, problem.batch, step):
        images = slice(start, min(start + step, problem.batch))
        part = problem.replace(batch=images.stop - images.start)
        expected = reference.conv2d(made.x[images], made.w, part)
        result = tensors.check(output[images], expected, part, kind, accuracy)
        if not result.ok:
            where = f"images {start} to {images.stop - 1}: " if step < problem.batch else ""
            return result._replace(message=where + result.message)
        if result.max_error >= worst.max_error:
            worst = result
    return worst


def on_device(kernel: Kernel) -> Run:
    """Runs a kernel where it is at home: on NumPy arrays, or on PyTorch tensors on the GPU."""
    if kernel.metadata["target"]["kind"] == "llvm":
        return lambda made: kernel(made.x, made.w, out=_poisoned(kernel.problem))

    def run(made: tensors.Tensors) -> np.ndarray:
        x, w, out = (
            tensors.to_torch(array).cuda() for array in (made.x, made.w, _poisoned(kernel.problem))
        )
        return tensors.from_torch(kernel(x, w, out=out))

    return run


def emulated(problem: ConvProblem, target: CudaTarget, choice: Choice) -> Run:
    """Runs a CUDA schedule's TensorIR on the CPU; see `im2win_tvm.emulate` for what that shows."""
    from . import emulate

    output = emulate.built(choice.schedule, problem, choice.config, target)
    return lambda made: output({"x": made.x, "w": made.w})


def bytes_needed(problem: ConvProblem) -> int:
    """Host memory that verifying a problem takes: tensors, their generation, the reference."""
    outputs = prod(problem.output_shape) * problem.itemsize
    inputs = prod(problem.input_shape) * problem.itemsize
    # Filling makes a float32 or int8 copy and, for channels last, a transposed one.
    return 3 * inputs + 2 * outputs + 4 * prod(problem.weight_shape) * 8 + 3 * _CHUNK_BYTES


def free_bytes() -> int | None:
    """Memory that processes here can still take; None where the system does not tell."""
    with suppress(OSError), open("/proc/meminfo") as file:  # Linux only
        for row in file:
            if row.startswith("MemAvailable:"):
                return int(row.split()[1]) * 1024
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if all(name in os.sysconf_names for name in names):
        return os.sysconf(names[0]) * os.sysconf(names[1])
    return None


def _poisoned(problem: ConvProblem) -> np.ndarray:
    return tensors.poisoned(problem.output_shape, problem.dtype)
