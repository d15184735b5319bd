"""What MetaSchedule finds for the plain im2win expressions, with no schedule of ours.

A configuration is a trace: the scheduling steps that TVM's search took, and its decisions in them.
There is no heuristic, so these schedules take part where a tuning record holds a trace and nowhere
else. I' stays where the search puts it: TVM's rules inline the transform into what reads it.

A trace may come from a stranger. It is data, and `check` refuses what could be more: see `traces`.
"""

import functools
import json
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import s_tir, te, tirx
from tvm.ir import IRModule

from .. import tensor_intrinsics
from ..epilogue import NONE, Epilogue
from ..expr import arguments, convolution, filter_window, output, transform
from ..problem import ConvProblem
from ..target import CudaTarget, Target
from ..traces import refusal
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
        return _refusal(config.trace, problem)

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
    """The function after the steps of a trace.

    Raises ValueError where they change its parameters, and TVM's errors.
    """
    steps, decisions = json.loads(trace)
    if any(step[0] == "Tensorize" for step in steps):
        tensor_intrinsics.register()
    before = function(problem, epilogue)
    after = _after(before, steps, decisions).mod["main"]
    for old, new in zip(before.params, after.params, strict=True):
        if not old.same_as(new):
            raise ValueError(f"it changes the parameter {old.name}")
    return after


def _after(main, steps: list, decisions: list) -> s_tir.Schedule:
    """The schedule of a function after steps."""
    sch = s_tir.Schedule(IRModule({"main": main}))
    s_tir.schedule.Trace.apply_json_to_schedule([steps, decisions], sch)
    return sch


@functools.lru_cache(maxsize=256)
def _refusal(trace: str, problem: ConvProblem) -> str | None:
    """What is wrong with a trace for this problem; None if it can be replayed."""
    try:
        reason = refusal(json.loads(trace))
        if reason is None:
            _replayed(trace, problem, NONE)
            _prove_layouts(*json.loads(trace), problem)
    except Exception as error:  # whatever TVM raises: no trace of this function
        said = (str(error).strip().splitlines() or [""])[-1]
        reason = f"trace: {type(error).__name__}: {ascii(said)[1:200]}"
    return reason


def _prove_layouts(steps: list, decisions: list, problem: ConvProblem) -> None:
    """Raise where a new layout may give two elements of a buffer one place.

    TVM takes a trace's word for it that it does not, and what it can prove is not enough. Each is
    looked at with the shape that the buffer has after the steps before it.
    """
    made: dict[str, tuple[int, int]] = {}  # the step that gave a name last, and its output
    tiles: dict[str, int] = {}  # of sampled factors, which layouts name
    chosen = dict(decisions)
    for place, (kind, inputs, attributes, outputs) in enumerate(steps):
        if kind == "TransformLayout":
            before = [each for each in decisions if each[0] < place]
            sch = _after(function(problem), steps[:place], before)
            step, which = made[inputs[0]]
            block = sch.get(sch.trace.insts[step].outputs[which])
            buffer, written = attributes[:2]
            region = (block.writes if written else block.reads)[buffer]
            layout = _with_tiles(tvm.ir.load_json(inputs[1]), tiles)
            layout.inverse([int(extent) for extent in region.source.shape])
        for which, name in enumerate(outputs):
            made[name] = place, which
            tiles.pop(name, None)
            if kind == "SamplePerfectTile":
                tiles[name] = chosen[place][which]


def _with_tiles(layout: tirx.IndexMap, tiles: dict[str, int]) -> tirx.IndexMap:
    """A layout with factors in the place of their names."""
    own = {variable.name for variable in layout.initial_indices}

    def known(variable):
        free = variable.name not in own and variable.name in tiles
        return tirx.const(tiles[variable.name], "int32") if free else variable

    indices = [tvm_ffi.structural_map(i, (tvm.ir.Var, known)) for i in layout.final_indices]
    return tirx.IndexMap(layout.initial_indices, indices, None)


CPU = MetaSchedule("cpu_metaschedule", "llvm")
CUDA = MetaSchedule("cuda_metaschedule", "cuda")
