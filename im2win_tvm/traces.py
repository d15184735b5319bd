"""Whether a trace of MetaSchedule is what TVM's rules make; it may come from a stranger.

TVM takes what a trace says in good faith: it prints the names of scopes and threads into a kernel's
source, follows indices that lead out of its arrays, and leaves out tests of bounds where it is told
to. So nothing of a trace is judged but its decisions, which are whole numbers. The rules are asked
for their steps once more, and with these decisions they have to give that trace, to the letter.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

from . import tensor_intrinsics
from .problem import ConvProblem
from .target import CpuTarget, Target

__all__ = ["gpu", "plain", "refusal", "rules"]

# The architectures from which there is wmma, by dtype (CUDA C++ Programming Guide).
_WMMA = {"float16": 70, "bfloat16": 80}
# What decisions are within: loops of a kernel are no longer, and none of ours has as many.
_LARGEST, _LOOPS = 1 << 31, 64
# How many threads of a processor a schedule is for. It is that of the device that was searched on.
_PARALLEL, _THREADS = "meta_schedule.parallel", 1 << 16
# Sketches come with a sample each, which their own steps may not allow: then others are drawn.
_SEEDS = range(1, 9)
# TVM says of every sketch what it leaves out in bfloat16; that was for the search to say.
_QUIET = logging.getLogger(__name__)
_QUIET.setLevel(logging.ERROR)


def rules(problem: ConvProblem, target: Target) -> Any:
    """TVM's rules for processors, for CUDA cores, or in float16 and bfloat16 for tensor cores."""
    from tvm.s_tir import meta_schedule as ms

    kind = "llvm" if isinstance(target, CpuTarget) else "cuda"
    steps: Any = None
    if kind == "cuda" and target.capability >= _WMMA.get(problem.dtype, math.inf):
        tensor_intrinsics.register()
        kind = "cuda-tensorcore"
        if problem.dtype == "bfloat16":
            steps = tensor_intrinsics.bfloat16_rules()
    return ms.space_generator.PostOrderApply(
        sch_rules=steps or kind, postprocs=kind, mutator_probs=kind
    )


def gpu(arch: str = "sm_90") -> Any:
    """What TVM would say of a GPU of this architecture."""
    import tvm

    return tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_shared_memory_per_block": 48 * 1024,
            "max_threads_per_block": 1024,
            "registers_per_block": 65536,
            "thread_warp_size": 32,
        },
        host="llvm",
    )


def plain(value: Any) -> Any:
    """TVM's JSON as Python's own lists, strings and numbers; JSON in its strings without blanks."""
    if isinstance(value, str):
        text = str(value)
        if not text.startswith("{"):
            return text
        return json.dumps(json.loads(text), separators=(",", ":"))
    if value is None or isinstance(value, int | float):
        return value
    if hasattr(value, "value"):  # of an IntImm or FloatImm
        return value.value
    return [plain(entry) for entry in value]


def refusal(
    trace: Any, function: Any, tvm_target: Any, make_rules: Callable[[], Any] | None = None
) -> str | None:
    """Why a trace, as `plain` has it, is none of TVM's rules' for a function; None if it is.

    make_rules: a PostOrderApply; None is what TVM takes for the target.
    """
    try:
        steps, decisions = trace
        own = steps[: [step[0] for step in steps].index("EnterPostproc")]
        asked = json.dumps(_for_any_processor(own))
        context, sketches = _sketches(function, tvm_target, make_rules)
        if not any(json.dumps(_for_any_processor(sketch)) == asked for sketch in sketches):
            return "trace: its steps are none that TVM's rules give this function"
        reason = _of_decisions(own, decisions)
        if reason is None and json.dumps(_made(context, own, decisions)) != json.dumps(trace):
            reason = "trace: TVM's rules give another one with these decisions"
    except Exception as error:  # whatever comes of what is no trace, and what TVM raises
        said = (str(error).strip().splitlines() or [""])[-1]
        return f"trace: {type(error).__name__}: {ascii(said)[1:-1][:200]}"
    return reason


def _sketches(
    function: Any, tvm_target: Any, make_rules: Callable[[], Any] | None
) -> tuple[Any, list[list]]:
    """A TuneContext of a function, and the steps of its sketches.

    Also without those that come to nothing, which some of TVM's searches leave out.
    """
    from tvm.s_tir import meta_schedule as ms

    for seed in _SEEDS:
        context = ms.TuneContext(
            mod=ms.tir_integration._normalize_mod(function),
            target=tvm_target,
            space_generator=make_rules() if make_rules else "post-order-apply",
            search_strategy="evolutionary",
            task_name="main",
            rand_state=seed,
            num_threads=1,
            logger=_QUIET,
        ).clone()
        try:
            space = context.generate_design_space()
        except Exception:
            if seed == _SEEDS[-1]:
                raise
        else:
            break
    traces = [form for each in space for form in (each.trace, each.trace.simplified(True))]
    return context, [plain(trace.as_json())[0] for trace in traces]


def _made(context: Any, steps: list, decisions: list) -> list:
    """The trace of a sketch's steps with other decisions, after TVM's postprocessing."""
    from tvm import s_tir

    schedule = s_tir.Schedule(context.mod, error_render_level="none")
    s_tir.schedule.Trace.apply_json_to_schedule([steps, decisions], schedule)
    schedule.enter_postproc()
    for postproc in context.space_generator.postprocs:
        if not postproc.apply(schedule):
            raise ValueError(f"{type(postproc).__name__} refuses it")
    return plain(schedule.trace.as_json())


def _for_any_processor(steps: list) -> list:
    """Steps without the number of threads that they are for, where it is one."""
    return [
        ["Annotate", [step[1][0], None, *step[1][2:]], *step[2:]]
        if step[0] == "Annotate" and step[2] == [_PARALLEL] and _is_int(step[1][1], 1, _THREADS)
        else step
        for step in steps
    ]


def _of_decisions(steps: list, decisions: list) -> str | None:
    """What is wrong with the decisions of steps that are a sketch's.

    There is one for each step that samples, because TVM draws where there is none.
    """
    sampling = [place for place, step in enumerate(steps) if step[0].startswith("Sample")]
    if json.dumps([place for place, _ in decisions]) != json.dumps(sampling):
        return "trace: allowed: a decision for each step that samples, in their order"
    for place, decision in decisions:
        kind, _, attributes, _ = steps[place]
        if not _DECIDED[kind](decision, attributes):
            return f"trace: step {place}: {kind}: decision {ascii(decision)[:80]}: not allowed"
    return None


def _is_tile(decision: Any, attributes: list) -> bool:
    return (
        isinstance(decision, list)
        and len(decision) == attributes[0]
        and all(_is_int(factor, 1, _LARGEST) for factor in decision)
        and math.prod(decision) < _LARGEST
    )


def _is_int(value: Any, least: int, end: int) -> bool:
    return type(value) is int and least <= value < end


_DECIDED: dict[str, Callable[[Any, list], bool]] = {
    "SamplePerfectTile": _is_tile,
    "SampleCategorical": lambda chosen, given: _is_int(chosen, 0, len(given[0])),
    # A loop by its number; -1 is to inline, -2 to leave a block where it is.
    "SampleComputeLocation": lambda loop, _: _is_int(loop, -2, _LOOPS),
}
