"""What MetaSchedule finds for the plain im2win expressions, with no schedule of ours.

A configuration is a trace: the scheduling steps that TVM's search took, and its decisions in them.
There is no heuristic, so these schedules take part where a tuning record holds a trace and nowhere
else. I' stays where the search puts it: TVM's rules inline the transform into what reads it.

A trace may come from a stranger, and `check` takes none but those of TVM's own rules: see `traces`.
"""

import functools
import json
from dataclasses import dataclass

from tvm import s_tir, te
from tvm.ir import IRModule

from .. import tensor_intrinsics
from ..epilogue import NONE, Epilogue
from ..expr import arguments, convolution, filter_window, output, transform
from ..problem import ConvProblem
from ..target import CudaTarget, Target
from ..traces import gpu, plain, refusal, rules
from .base import ALIGNMENT, CONV, PREPARE, Schedule
from .cuda_elementwise import THREADS

# Bytes that vectors of the search's loads and stores may take: pointers are multiples of that.
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Config:
    """trace: TVM's JSON of a trace, as text; empty where nothing is known."""

    trace: str


class MetaSchedule(Schedule):
    searched = True

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def supports(self, problem: ConvProblem, target: Target) -> str | None:
        reason = super().supports(problem, target)
        if reason is None and (problem.dtype, self.kind) == ("bfloat16", "llvm"):
            reason = f"dtype=bfloat16: {self.name} takes float32 and float16"
        return reason

    def check(self, config: Config, problem: ConvProblem, target: Target) -> str | None:
        if not isinstance(config.trace, str):
            return f"trace={config.trace!r}: allowed: the text of a trace"
        if not config.trace:
            return f"trace='': {self.name} has no heuristic: a tuning record has to name one"
        return _refusal(config.trace, problem, target)

    def configs(self, problem: ConvProblem, target: Target):
        return ()  # for MetaSchedule to find

    def default(self, problem: ConvProblem, target: Target) -> Config:
        return Config("")

    def schedule(self, problem, config, target, epilogue):
        convolve = _replayed(config.trace, problem, epilogue)
        if isinstance(target, CudaTarget):
            names = ("x", "y", "bias", "residual")
            convolve = convolve.with_attr(ALIGNMENT, dict.fromkeys(names, VECTOR_BYTES))
        return IRModule({PREPARE: prepare(problem, target), CONV: convolve})


def function(problem: ConvProblem, epilogue: Epilogue = NONE):
    """x, filter in window order ``[Co, K]`` (and bias, residual) -> y: what is searched."""
    args = arguments(problem, epilogue)
    packed = te.placeholder((problem.out_channels, problem.k), problem.dtype, name="packed")
    conv = convolution(transform(args.x, problem), packed, problem)
    y = output(conv, problem, epilogue, args.bias, args.residual)
    return te.create_prim_func([args.x, packed, *args.extras(), y])


def prepare(problem: ConvProblem, target: Target):
    """The filter in window order. Runs once."""
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    ordered = filter_window(w, problem)
    packed = te.compute(ordered.shape, lambda o, k: ordered[o, k], name="packed")
    sch = s_tir.Schedule(te.create_prim_func([w, packed]))
    sch.compute_inline(sch.get_sblock("filter"))
    loop = sch.fuse(*sch.get_loops(sch.get_sblock("packed")))
    if isinstance(target, CudaTarget):
        blocks, threads = sch.split(loop, [None, THREADS])
        sch.bind(blocks, "blockIdx.x")
        sch.bind(threads, "threadIdx.x")
    else:
        sch.parallel(loop)
    return sch.mod["main"]


def _replayed(trace: str, problem: ConvProblem, epilogue: Epilogue):
    """The function after the steps of a trace."""
    if '"Tensorize"' in trace:
        tensor_intrinsics.register()
    sch = s_tir.Schedule(IRModule({"main": function(problem, epilogue)}))
    s_tir.schedule.Trace.apply_json_to_schedule(plain(json.loads(trace)), sch)
    return sch.mod["main"]


@functools.lru_cache(maxsize=256)
def _refusal(trace: str, problem: ConvProblem, target: Target) -> str | None:
    """What is wrong with a trace for this problem; None if it can be replayed."""
    try:
        given = plain(json.loads(trace))
    except (RecursionError, TypeError, ValueError) as error:
        return f"trace: {type(error).__name__}: {ascii(str(error))[1:-1][:200]}"
    where = gpu() if isinstance(target, CudaTarget) else target.tvm()
    return refusal(given, function(problem), where, lambda: rules(problem, target))


CPU = MetaSchedule("cpu_metaschedule", "llvm")
CUDA = MetaSchedule("cuda_metaschedule", "cuda")
