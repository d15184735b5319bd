"""Traces that a stranger may have written: what TVM's rules do not make is refused.

Emulation says little of such a trace (two loops on one thread are two loops to it), so none is run.
"""

import json
import random
from copy import deepcopy
from functools import cache

import pytest

from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import metaschedule
from im2win_tvm.target import CudaTarget
from im2win_tvm.traces import plain
from im2win_tvm.tuning import lookup

GPU = CudaTarget("sm_90", "NVIDIA H200")
SCOPE = 'local q; }\nstatic int evil = system("id");\nextern "C" __global__ void f() { float z'


@cache
def _first(dtype):
    """A problem and its trace, of those that ship: for CUDA cores, or for tensor cores."""
    path = lookup.SHIPPED / "nvidia-h200" / "cuda_metaschedule.jsonl"
    records = map(json.loads, path.read_text().splitlines())
    record = next(record for record in records if record["dtype"] == dtype)
    problem = ConvProblem.parse(record["problem"], dtype=dtype, layout=record["layout"])
    return problem, plain(json.loads(record["config"]["trace"]))


def _reason(dtype, change=lambda trace: None):
    """What is said of the trace after a change."""
    problem, trace = _first(dtype)
    trace = deepcopy(trace)
    change(trace)
    return metaschedule.CUDA.check(metaschedule.Config(json.dumps(trace)), problem, GPU)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_trace_of_a_search_is_allowed(dtype):
    assert _reason(dtype) is None


def _at(kind, part, place, value):
    """Another value in the first step of a kind: of its inputs (1), attributes (2), outputs (3)."""

    def change(trace):
        next(step for step in trace[0] if step[0] == kind)[part][place] = value

    return change


def _decide(kind, value):
    def change(trace):
        next(entry for entry in trace[1] if trace[0][entry[0]][0] == kind)[1] = value

    return change


def _decision_of(place):
    """The first decision, as that of another step."""
    return lambda trace: trace[1][0].__setitem__(0, place)


def _doubled_name(trace):
    tile = next(step for step in trace[0] if step[0] == "SamplePerfectTile")
    tile[3][1] = tile[3][0]


def _other_intrinsic(trace):
    for step in trace[0]:
        if step[0] == "Tensorize" and "_f16_a_shared" in step[2][0]:
            step[2][0] = step[2][0].replace("_a_", "_a_trans_")


# Each ended the process, brought C++ of the stranger's into a kernel, or made one that is wrong.
EDITS = {
    "a scope with C++ in it": ("float32", _at("CacheWrite", 2, 1, SCOPE)),
    "a scope of one thread": ("float32", _at("CacheRead", 2, 1, "local")),
    "a thread with C++ in it": ("float32", _at("Bind", 2, 0, "threadIdx.x); } int f;")),
    "a thread twice": ("float32", _at("Bind", 2, 0, "threadIdx.x")),
    "a loop without its bounds": ("float32", _at("Split", 2, 1, True)),
    "one for a truth": ("float32", _at("Split", 2, 0, 1)),
    "an intrinsic of a stranger's": ("float16", _at("Tensorize", 2, 0, "evil")),
    "an operand the other way round": ("float16", _other_intrinsic),
    "a block without a name": ("float32", _at("GetSBlock", 2, 1, None)),
    "a name twice": ("float32", _doubled_name),
    "escapes for a terminal": ("float32", _at("GetLoops", 1, 0, "x\x1b[2J")),
    "another layout": ("float16", _at("TransformLayout", 2, 1, 1)),
    "no layout": ("float16", _at("TransformLayout", 1, 1, "{}")),
    "an annotation that imports": ("float32", _at("Annotate", 2, 0, "pragma_import_c")),
    "an object": ("float32", _at("Annotate", 1, 1, {"a": 1})),
    "a decision of no step": ("float32", _decision_of(10**11)),
    "a decision of a step from behind": ("float32", _decision_of(-1)),
    "a decision of another step": ("float32", _decision_of(0)),
    "a tile with nothing in it": ("float32", _decide("SamplePerfectTile", [6, 0, 1, 1, 1])),
    "a tile of null": ("float32", _decide("SamplePerfectTile", [None, 1, 1, 1, 1])),
    "a tile of few numbers": ("float32", _decide("SamplePerfectTile", [6])),
    "a tile that overflows": ("float32", _decide("SamplePerfectTile", [1 << 16] * 5)),
    "a tile of another loop": ("float32", _decide("SamplePerfectTile", [1, 1, 1, 1, 7])),
    "a choice that is not there": ("float32", _decide("SampleCategorical", 1 << 33)),
    "a truth for a choice": ("float32", _decide("SampleCategorical", True)),
    "no decisions": ("float32", lambda trace: trace[1].clear()),
    "a decision twice": ("float32", lambda trace: trace[1].append(trace[1][0])),
    "a step that is a number": ("float32", lambda trace: trace[0].append(3)),
    "steps that are an object": ("float32", lambda trace: trace.__setitem__(0, {"a": 1})),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_trace_is_refused(edit):
    reason = _reason(*EDITS[edit])
    assert reason.startswith("trace: ")
    assert reason.isprintable()
    assert len(reason) < 400


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_no_step_may_be_left_out_doubled_or_moved(dtype, seed):
    """Before postprocessing and in it."""
    chance = random.Random(seed)
    count = len(_first(dtype)[1][0])

    def left_out(trace):
        del trace[0][place]

    def doubled(trace):
        trace[0].insert(place, trace[0][place])

    def moved(trace):
        other = next(p for p in range(count) if trace[0][p] != trace[0][place])
        trace[0][place], trace[0][other] = trace[0][other], trace[0][place]

    for change in (left_out, doubled, moved):
        place = chance.randrange(1, count)
        assert _reason(dtype, change).startswith("trace: ")
