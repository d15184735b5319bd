"""The convolution as its definition says it, one output a thread: the floor of the comparison.

No im2win, no shared memory, no tiles: a thread walks the window of its output in global memory.
Neighbouring threads compute outputs that are neighbours in memory. Built by the same toolchain as
the project's schedules, but none of them: `select` never takes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from tvm import s_tir, te, tirx
from tvm.ir import IRModule

from ...epilogue import Epilogue
from ...expr import Place, arguments, tiled_function
from ...problem import ConvProblem
from ...schedules.base import CONV, PREPARE, Schedule
from ...schedules.cuda_elementwise import elementwise
from ...target import CudaTarget
from .im2win import Im2win

__all__ = ["DIRECT", "Config", "Direct", "direct_convolution"]

MAX_THREADS = 1024


@dataclass(frozen=True)
class Config:
    """threads: of a block, each with one output."""

    threads: int = 256


class DirectConvolution(Schedule):
    name = "direct"
    kind = "cuda"

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        threads = config.threads
        if isinstance(threads, bool) or not isinstance(threads, int):
            return f"threads={threads!r}: allowed are whole numbers from 1 to {MAX_THREADS}"
        if not 1 <= threads <= MAX_THREADS:
            return f"threads={threads}: allowed are 1 to {MAX_THREADS}"
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget) -> Iterable[Config]:
        return (Config(threads) for threads in (64, 128, 256, 512))

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        return Config()

    def schedule(self, problem, config, target, epilogue):
        return IRModule(
            {PREPARE: _keep_weights(problem), CONV: _convolve(problem, config, epilogue)}
        )


def direct_convolution(x: te.Tensor, w: te.Tensor, problem: ConvProblem, outputs: int) -> te.Tensor:
    """`outputs` float32 sums in the order of the output's memory; w is in OIHW.

    `outputs` may be rounded up: the elements beyond repeat the last one.
    """
    hf, wf = problem.kernel_size
    channels = problem.in_channels // problem.groups
    per_group = problem.out_channels // problem.groups
    axes = [
        te.reduce_axis((0, extent), name)
        for extent, name in ((channels, "c"), (hf, "u"), (wf, "v"))
    ]
    c, u, v = axes

    def element(p):
        n, o, m, q = _decode(p, problem, outputs)
        inside, position = [], []
        for axis, (index, tap) in enumerate(((m, u), (q, v))):
            before, after = problem.padding[axis]
            at = index * problem.stride[axis] + tap * problem.dilation[axis] - before
            position.append(at)
            inside += [at >= 0] if before else []
            inside += [at < problem.input_size[axis]] if after else []
        channel = o // per_group * channels + c if problem.groups > 1 else c
        last = problem.channels_last
        value = x[(n, *position, channel) if last else (n, channel, *position)]
        if inside:
            value = tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, x.dtype))
        return te.sum(value.astype("float32") * w[o, c, u, v].astype("float32"), axis=axes)

    return te.compute((outputs,), element, name="conv")


def _decode(p, problem: ConvProblem, outputs: int):
    """Image, channel, row and column of the p-th output in memory."""
    total = prod(problem.output_shape)
    p = tirx.min(p, total - 1) if outputs > total else p
    (height, width), channels = problem.output_size, problem.out_channels
    if problem.channels_last:
        pixel = p // channels
        return pixel // (height * width), p % channels, pixel // width % height, pixel % width
    plane = p // (height * width)
    return plane // channels, plane % channels, p // width % height, p % width


def _keep_weights(problem: ConvProblem):
    """The weights as they are: every kernel has a step that prepares them."""
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    kept = te.compute(problem.weight_shape, lambda *index: w[index], name="packed")
    return elementwise([w, kept], "packed")


def _convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    args = arguments(problem, epilogue)
    w = te.placeholder(problem.weight_shape, problem.dtype, name="packed")
    total = prod(problem.output_shape)
    # Whole blocks, so that every loop divides evenly; only the store is checked.
    outputs = -(-total // config.threads) * config.threads
    conv = direct_convolution(args.x, w, problem, outputs)

    def place(p):
        inside = [p < total] if outputs > total else []
        return Place(*_decode(p, problem, outputs), inside)

    sch = s_tir.Schedule(tiled_function([args.x, w], conv, place, problem, args, epilogue))
    (loop,) = sch.get_loops(sch.get_sblock("y"))
    blocks, threads = sch.split(loop, [None, config.threads])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    sums = sch.get_sblock("conv")
    sch.compute_at(sums, threads)
    sch.set_scope(sums, 0, "local")
    sch.decompose_reduction(sums, sch.get_loops(sums)[-3])
    return sch.mod["main"]


DIRECT = DirectConvolution()


class Direct(Im2win):
    """The direct convolution; it has to meet the accuracy class like the project's schedules."""

    family = "direct"

    def __init__(self) -> None:
        super().__init__(DIRECT)
