"""Traces that a stranger may have written: what TVM's rules do not make is refused.

Each of these changes to traces of real searches once ended the process, wrote C++ of the stranger's
into a kernel's source, or gave a kernel that computes something else.
"""

import json
import operator
from copy import deepcopy
from functools import cache

import pytest

from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import metaschedule
from im2win_tvm.target import CudaTarget
from im2win_tvm.traces import refusal
from im2win_tvm.tuning import lookup

GPU = CudaTarget("sm_90", "NVIDIA H200")
SCOPE = 'local q; }\nstatic int evil = system("id");\nextern "C" __global__ void f() { float z'


@cache
def _records():
    """The traces that ship, for CUDA cores and for tensor cores."""
    path = lookup.SHIPPED / "nvidia-h200" / "cuda_metaschedule.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {record["dtype"] for record in found} >= {"float32", "float16"}
    return found


def _first(dtype):
    record = next(record for record in _records() if record["dtype"] == dtype)
    problem = ConvProblem.parse(record["problem"], dtype=dtype, layout=record["layout"])
    return problem, json.loads(record["config"]["trace"])


CORES, TENSOR = (lambda: _first("float32")[1]), (lambda: _first("float16")[1])


def _steps(trace, kind):
    return [step for step in trace[0] if step[0] == kind]


def _decisions(trace, kind):
    return [entry for entry in trace[1] if trace[0][entry[0]][0] == kind]


def test_traces_of_searches_are_allowed():
    for record in _records():
        assert refusal(json.loads(record["config"]["trace"])) is None


def _put(kind, part, place, value):
    """Another value in a step: of its inputs (1), attributes (2) or outputs (3)."""
    return lambda trace: operator.setitem(_steps(trace, kind)[0][part], place, value)


def _decide(kind, value, place=1):
    return lambda trace: operator.setitem(_decisions(trace, kind)[0], place, value)


def _note(name, value):
    """Another value of the first annotation of that name."""

    def change(trace):
        step = next(step for step in _steps(trace, "Annotate") if step[2] == [name])
        step[1][1] = value

    return change


def _begin(*step):
    return lambda trace: trace.__setitem__(slice(None), [[list(step)], []])


def _piped():
    """A trace with a pipeline."""
    return next(
        trace
        for record in _records()
        if STAGE in record["config"]["trace"]
        for trace in (json.loads(record["config"]["trace"]),)
    )


STAGE = "software_pipeline_stage"
EDITS = {
    "a scope with C++ in it": (CORES, _put("CacheWrite", 2, 1, SCOPE)),
    "a scope that begins as one": (CORES, _put("CacheRead", 2, 1, "shared.x")),
    "a buffer far away": (CORES, _put("CacheRead", 2, 0, 1 << 20)),
    "a thread with C++ in it": (CORES, _put("Bind", 2, 0, "threadIdx.x); } int f;")),
    "a thread of clusters": (CORES, _put("Bind", 2, 0, "clusterCtaIdx.x")),
    "a thread that begins as one": (CORES, _put("Bind", 2, 0, "vthreadq")),
    "an intrinsic of a stranger's": (TENSOR, _put("Tensorize", 2, 0, "evil")),
    "a block's name with C++ in it": (CORES, _put("GetSBlock", 2, 0, "conv; f()")),
    "a block without a name": (CORES, _put("GetSBlock", 2, 1, None)),
    "a block for a loop": (CORES, _put("Bind", 1, 0, "b0")),
    "a number for a loop": (CORES, _put("GetLoops", 1, 0, 3)),
    "escapes for the terminal": (CORES, _put("GetLoops", 1, 0, "x\x1b[2J")),
    "an output too many": (CORES, lambda trace: _steps(trace, "Bind")[0][3].append("l999")),
    "a tile for another step": (CORES, _decide("SamplePerfectTile", 0, place=0)),
    "a tile for no step": (CORES, _decide("SamplePerfectTile", 10**11, place=0)),
    "a tile for a step from behind": (CORES, _decide("SamplePerfectTile", -1, place=0)),
    "a tile of nothing": (CORES, _decide("SamplePerfectTile", [6, 0, 1, 1, 1])),
    "a tile of null": (CORES, _decide("SamplePerfectTile", [None, 1, 1, 1, 1])),
    "a negative tile": (CORES, _decide("SamplePerfectTile", [-2, -3, 1, 1, 1])),
    "a tile of few numbers": (CORES, _decide("SamplePerfectTile", [6])),
    "a tile that overflows": (CORES, _decide("SamplePerfectTile", [1 << 16] * 5)),
    "a tile for a choice": (CORES, _decide("SampleCategorical", [1])),
    "a choice that is not there": (CORES, _decide("SampleCategorical", 1 << 33)),
    "a choice from behind": (CORES, _decide("SampleCategorical", -1)),
    "no decisions": (CORES, lambda trace: trace[1].clear()),
    "a decision twice": (CORES, lambda trace: trace[1].append(trace[1][0])),
    "ten million stages": (_piped, _note(STAGE, [0, 0, 10**7])),
    "negative stages": (_piped, _note(STAGE, [-1, 0, 1])),
    "stages of null": (_piped, _note(STAGE, [None, 0, 0])),
    "an object": (CORES, _note("pragma_auto_unroll_max_step", {"a": 1})),
    "much to unroll": (CORES, _note("pragma_auto_unroll_max_step", 1 << 20)),
    "an annotation that imports": (CORES, _put("Annotate", 2, 0, "pragma_import_c")),
    "a text for a number": (CORES, _note("pragma_auto_unroll_max_step", '"x"')),
    "a text with C++ in it": (TENSOR, _note("meta_schedule.auto_tensorize", '"f();"')),
    "a map for an annotation": (TENSOR, _note("meta_schedule.auto_tensorize", "{}")),
    "a buffer of no kind": (TENSOR, _put("TransformLayout", 2, 1, 7)),
    "a map of what pads": (TENSOR, _put("TransformLayout", 2, 2, "{}")),
    "padding without end": (TENSOR, _put("TransformLayout", 2, 3, 1 << 30)),
    "no map": (TENSOR, _put("TransformBlockLayout", 2, 0, "f()")),
    "a step that is none": (CORES, _begin("Evaluate", [], [], [])),
    "a step of few parts": (CORES, _begin("Bind", [])),
    "a step that is a number": (CORES, lambda trace: trace[0].append(3)),
    "steps without end": (CORES, lambda trace: trace[0].extend([trace[0][0]] * 20_000)),
    "an object for steps": (CORES, lambda trace: trace.__setitem__(0, {"a": 1})),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_trace_is_refused(edit):
    original, change = EDITS[edit]
    trace = deepcopy(original())
    assert refusal(trace) is None
    change(trace)
    reason = refusal(trace)
    assert reason.startswith("trace: ")
    assert reason.isprintable()
    assert len(reason) < 1500


def _map(trace):
    """The first map of indices that changes a layout, as Python has it."""
    return json.loads(_steps(trace, "TransformLayout")[0][1][1])


def _of(graph, kind):
    return next(node for node in graph["nodes"] if node["type"] == kind)


def _data(kind, **changed):
    """Other data of the first node of a kind."""
    return lambda graph: _of(graph, kind)["data"].update(changed)


def _doubled(graph):
    """Forty sums, each of the one before with itself."""
    nodes, last = graph["nodes"], graph["nodes"].pop()
    for _ in range(40):
        place = len(nodes) - 1 if nodes[-1]["type"] == "prim.Add" else 3
        nodes.append({"type": "prim.Add", "data": {"span": 0, "ty": 1, "a": place, "b": place}})
    nodes.append({"type": "ffi.Array", "data": [len(nodes) - 1]})
    last["data"]["final_indices"] = len(nodes) - 1
    nodes.append(last)
    graph["root_index"] = len(nodes) - 1


def _chain(graph):
    nodes, last = graph["nodes"], graph["nodes"].pop()
    for _ in range(20_000):
        nodes.append({"type": "prim.Add", "data": {"span": 0, "ty": 1, "a": 3, "b": 3}})
    nodes.append(last)
    graph["root_index"] = len(nodes) - 1


MAPS = {
    "a call": lambda graph: graph["nodes"].insert(0, {"type": "tirx.Call", "data": {}}),
    "a sum that is a call": lambda graph: _of(graph, "prim.Mul").update(type="prim.Call"),
    "what comes later": _data("prim.Mul", a=10_000),
    "a text for a place": _data("prim.Mul", a="5"),
    "more than it has": _data("prim.Mul", c=0),
    "null for an operand": _data("prim.Mul", a=0),
    "a type for an operand": _data("prim.Mul", a=1),
    "null among variables": lambda graph: _of(graph, "ffi.Array").update(data=[0]),
    "an array for an inverse": _data("tirx.IndexMap", inverse_index_map=13),
    "sums for variables": lambda graph: _data(
        "tirx.IndexMap", initial_indices=_of(graph, "tirx.IndexMap")["data"]["final_indices"]
    )(graph),
    "a name with C++ in it": lambda graph: _of(graph, "ffi.String").update(data="i; f()"),
    "a name beyond ASCII": lambda graph: _of(graph, "ffi.String").update(data="\u00fc"),
    "a pointer": _data("ir.PrimType", dtype="handle"),
    "a large number": lambda graph: _of(graph, "int").update(data=10**30),
    "a truth for a number": lambda graph: _of(graph, "int").update(data=True),
    "another root": lambda graph: graph.update(root_index=0),
    "no root": lambda graph: graph.update(root_index=10_000),
    "another field": lambda graph: graph.update(more=1),
    "a number for nodes": lambda graph: graph.update(nodes=3),
    "a sum of itself": _doubled,
    "a long chain": _chain,
}


@pytest.mark.parametrize("edit", MAPS)
def test_an_edited_map_is_refused(edit):
    trace = deepcopy(TENSOR())
    graph = _map(trace)
    assert refusal(trace) is None
    MAPS[edit](graph)
    text = json.dumps(graph)
    _steps(trace, "TransformLayout")[0][1][1] = text
    assert ": TransformLayout: " in refusal(trace)
    trace = deepcopy(TENSOR())
    _steps(trace, "TransformBlockLayout")[0][2][0] = text
    assert ": TransformBlockLayout: " in refusal(trace)


def _layout(trace, block, place, write, change):
    """Another layout of a buffer of a block, before all other steps."""
    names = ["i0", "i1", "i2", "i3"]
    nodes = [{"type": "None"}, {"type": "ir.PrimType", "data": {"span": 0, "dtype": "int32"}}]
    for name in names:
        nodes.append({"type": "ffi.String", "data": name})
        nodes.append({"type": "ir.Var", "data": {"span": 0, "ty": 1, "name": len(nodes) - 1}})
    variables = [3, 5, 7, 9]
    nodes.append({"type": "ffi.Array", "data": variables})
    final = change(nodes, variables)
    nodes.append({"type": "ffi.Array", "data": final})
    ends = {"initial_indices": 10, "final_indices": len(nodes) - 1, "inverse_index_map": 0}
    nodes.append({"type": "tirx.IndexMap", "data": ends})
    text = json.dumps({"root_index": len(nodes) - 1, "nodes": nodes})
    trace[0][:0] = [
        ["GetSBlock", [], [block, "main"], ["b9999"]],
        ["TransformLayout", ["b9999", text], [place, write, None, 1], []],
    ]
    trace[1] = [[step + 2, decision] for step, decision in trace[1]]


def _swapped(nodes, variables):
    return [variables[0], variables[1], variables[3], variables[2]]


def _halved(nodes, variables):
    """Two elements in one place."""
    nodes.append({"type": "int", "data": 2})
    nodes.append({"type": "ir.IntImm", "data": {"span": 0, "ty": 1, "value": len(nodes) - 1}})
    data = {"span": 0, "ty": 1, "a": variables[3], "b": len(nodes) - 1}
    nodes.append({"type": "prim.FloorDiv", "data": data})
    return [*variables[:3], len(nodes) - 1]


@pytest.mark.parametrize(
    ("buffer", "change", "reason"),
    [
        (("y", 0, 1), _swapped, "it changes the parameter y"),
        (("im2win", 0, 0), _swapped, "it changes the parameter x"),
        (("conv", 0, 1), _halved, "trace: "),
    ],
    ids=["output", "input", "two elements in one place"],
)
def test_a_layout_that_changes_what_is_computed_is_refused(buffer, change, reason):
    """It is made of what rules make, too: the steps themselves tell."""
    problem, trace = _first("float32")
    trace = deepcopy(trace)
    _layout(trace, *buffer, change)
    assert refusal(trace) is None
    found = metaschedule.CUDA.check(metaschedule.Config(json.dumps(trace)), problem, GPU)
    assert reason in found
