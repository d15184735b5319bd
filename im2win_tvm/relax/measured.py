"""Whether our kernel of a convolution is faster here than TVM's own, by measuring both."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from ..problem import ConvProblem
from ..target import Target
from .build import build

__all__ = ["Comparison", "compare"]

# Milliseconds that a sample takes at least, and how many there are of each, by turns.
_SAMPLE_MS, _SAMPLES = 5, 5


@dataclass(frozen=True)
class Comparison:
    """Median microseconds of a call of each, caches warm, with what one layout needs of the other.

    Both are called through TVM's virtual machine, as in a model.
    """

    ours_us: float
    tvm_us: float

    def __str__(self) -> str:
        return f"{self.ours_us:.1f} us, TVM's own {self.tvm_us:.1f}"


def compare(problem: ConvProblem, target: Target, rewrite: tvm.transform.Pass) -> Comparison:
    """Build and run one convolution both ways, with the same random tensors.

    rewrite: makes TVM's convolution ours. On CUDA, TVM's timer of the device; on a CPU, wall time.
    Raises what TVM raises where the target cannot run here.
    """
    rng = np.random.default_rng(0)
    w = rng.standard_normal(problem.weight_shape).astype(problem.dtype)
    module = _module(problem, w)
    device = tvm.cuda() if target.kind == "cuda" else tvm.cpu()
    x = tvm.runtime.tensor(rng.standard_normal(problem.input_shape).astype(problem.dtype), device)
    ways = [rewrite(module), module]
    machines = [relax.VirtualMachine(build(way, target), device) for way in ways]
    samples: list[list[float]] = [[], []]
    for _ in range(_SAMPLES):
        for machine, found in zip(machines, samples, strict=True):
            timer = machine.time_evaluator(
                "main", device, number=1, repeat=1, min_repeat_ms=_SAMPLE_MS
            )
            found.append(timer(x).mean)
    return Comparison(*(1e6 * statistics.median(found) for found in samples))


def _module(problem: ConvProblem, w: np.ndarray) -> tvm.IRModule:
    (top, bottom), (left, right) = problem.padding
    x = relax.Var("x", relax.TensorType(problem.input_shape, problem.dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x,
                relax.const(w, problem.dtype),
                strides=problem.stride,
                padding=(top, left, bottom, right),
                dilation=problem.dilation,
                groups=problem.groups,
                data_layout=problem.layout,
                kernel_layout="OIHW",
                out_dtype=problem.dtype,
            )
            y = builder.emit_output(y)
        builder.emit_func_output(y)
    return builder.get()
