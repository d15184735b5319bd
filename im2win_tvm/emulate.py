"""Run a CUDA schedule's kernels on a machine without a GPU.

What a schedule of TensorIR computes (index arithmetic, tails, staging) is checked with every thread
a turn of a serial loop. That does not exercise what the GPU adds: barriers, memory of one thread,
two loops on the same threads, and the software pipeline, whose annotations are dropped. TIRx
kernels say these themselves and are simulated with them, simplified as TVM does it; see `simulate`
for what is checked.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from . import simulate
from .epilogue import NONE, Epilogue
from .lower import calls, function_parameters, is_tirx, lower
from .problem import ConvProblem
from .schedules import Schedule
from .schedules.base import PREPARE
from .target import CudaTarget

_PIPELINE = ("software_pipeline", "double_buffer_scope", "tirx.manifest_shared")


def serial(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with thread bindings made serial loops and pipeline annotations dropped."""

    def loop(op):
        kept = {k: v for k, v in op.annotations.items() if not k.startswith(_PIPELINE)}
        if op.kind == tirx.ForKind.THREAD_BINDING:
            kind = tirx.ForKind.SERIAL
        else:
            kind = op.kind
        return tirx.For(op.loop_var, op.min, op.extent, kind, op.body, None, kept, op.step)

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.For, loop), order="post"))


def simplified(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function as TVM simplifies it on the way to CUDA: what is said of a NaN may change."""
    name = "function"
    return tirx.transform.StmtSimplify()(tvm.IRModule({name: function}))[name]


def built(
    schedule: Schedule,
    problem: ConvProblem,
    config: Any,
    target: CudaTarget,
    epilogue: Epilogue = NONE,
) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """What gives the schedule's output for arrays, again and again; see `run`."""
    module = lower(schedule.build(problem, config, target, epilogue))
    parameters = function_parameters(module)
    functions = {v.name_hint: f for v, f in module.functions_items()}
    scheduled = {name: serial(f) for name, f in functions.items() if not is_tirx(f)}
    library = tvm.compile(tvm.IRModule(scheduled), target="llvm").jit() if scheduled else {}
    simulated = {name: simplified(f) for name, f in functions.items() if is_tirx(f)}

    def output(arrays: dict[str, np.ndarray]) -> np.ndarray:
        values = {name: tvm.runtime.tensor(array) for name, array in arrays.items()}
        for call in [
            {"function": PREPARE, "arguments": [p.name for p in parameters[PREPARE]]},
            *calls(module),
        ]:
            name = call["function"]
            for p in parameters[name]:
                if p.name not in values:
                    values[p.name] = tvm.runtime.tensor(np.full(p.shape, np.nan, p.dtype))
            if name in scheduled:
                library[name](*(values[argument] for argument in call["arguments"]))
            else:
                held = {argument: values[argument].numpy() for argument in call["arguments"]}
                simulate.run(simulated[name], held)
                values |= {argument: tvm.runtime.tensor(array) for argument, array in held.items()}
        return values["y"].numpy()

    return output


def run(
    schedule: Schedule,
    problem: ConvProblem,
    config: Any,
    target: CudaTarget,
    arrays: dict[str, np.ndarray],
    epilogue: Epilogue = NONE,
) -> np.ndarray:
    """The schedule's output for `arrays` (x, w, and bias and residual where the epilogue has them).

    Every other array, the output included, starts as NaN. Raises simulate.SimulationError for a
    fault in a TIRx kernel.
    """
    return built(schedule, problem, config, target, epilogue)(arrays)
