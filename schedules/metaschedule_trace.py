"""Whether a trace of MetaSchedule is data alone; it may come from a stranger.

Its steps are TVM's scheduling primitives, each of which TVM checks. What can bring in more is known
or refused: annotations (pragmas can bring C into a kernel), the names of tensor intrinsics, and the
maps of indices, which are expressions in TVM's own JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["refusal"]

# The steps of TVM's rules for "llvm", "cuda" and "cuda-tensorcore", and of their postprocessing.
STEPS = frozenset(
    """AddUnitLoop Annotate Bind Blockize CacheRead CacheWrite ComputeAt ComputeInline
    DecomposeReduction EnterPostproc Fuse GetChildBlocks GetConsumers GetLoops GetOutputBlocks
    GetProducers GetSBlock PadEinsum Parallel RFactor ReIndex Reorder ReverseComputeAt
    ReverseComputeInline SampleCategorical SampleComputeLocation SamplePartitionedTile
    SamplePerfectTile Split StorageAlign Tensorize TransformBlockLayout TransformLayout Unannotate
    Unroll Vectorize""".split()
)
# Their annotations. Others that begin with "pragma_" can bring C or LLVM code into a kernel.
NOTES = (
    "meta_schedule.", "software_pipeline_", "pragma_auto_unroll_max_step", "pragma_unroll_",
    "warp_execution",
)  # fmt: skip
# TVM's intrinsics for tensor cores.
INTRINSICS = ("wmma_", "mma_")

# The steps that TVM reads JSON in, whatever it begins with; and their other strings.
_LAYOUTS = ("TransformBlockLayout", "TransformLayout")
_NAME = re.compile(r"[bl]\d+")
# A map's nodes and what each has: the positions of nodes before it, unless told below.
_ARITHMETIC = ("span", "ty", "a", "b")
_NODES = {
    "ir.Var": ("span", "ty", "name"),
    "ir.IntImm": ("span", "ty", "value"),
    "prim.Add": _ARITHMETIC,
    "prim.Sub": _ARITHMETIC,
    "prim.Mul": _ARITHMETIC,
    "prim.FloorDiv": _ARITHMETIC,
    "prim.FloorMod": _ARITHMETIC,
    "tirx.IndexMap": ("initial_indices", "final_indices", "inverse_index_map"),
}
_DTYPES = ("int32", "int64")
_IDENTIFIER = re.compile(r"\w{1,64}")
_LARGEST = 1 << 40


def refusal(steps: list) -> str | None:
    """What in the steps of a trace is not known; None if all is.

    Raises whatever comes of steps that are not built as TVM's are.
    """
    for kind, inputs, attributes, _ in steps:
        if kind not in STEPS:
            return f"trace: step {kind!r}: allowed: {', '.join(sorted(STEPS))}"
        # TVM's JSON has strings of the step's own inputs in quotes.
        name = str(attributes[0]).strip('"') if kind in ("Annotate", "Tensorize") else None
        if kind == "Annotate" and not name.startswith(NOTES):
            return f"trace: annotation {name!r}: allowed: those that begin with {NOTES}"
        if kind == "Tensorize" and not name.startswith(INTRINSICS):
            return f"trace: intrinsic {name!r}: allowed: those that begin with {INTRINSICS}"
        for text in _strings([inputs, attributes]):
            if kind in _LAYOUTS and _NAME.fullmatch(text):
                continue
            if (kind in _LAYOUTS or text.strip('" \n\t\r').startswith("{")) and not _is_map(text):
                return f"trace: {kind}: {text[:60]!r}: allowed: a map of indices"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)


def _is_map(text: str) -> bool:
    """Whether a text is TVM's JSON of a map of indices by integer arithmetic."""
    try:
        graph = json.loads(text)
        nodes = graph["nodes"]
        known = all(_is_known(node, place) for place, node in enumerate(nodes))
        last = _is_before(graph["root_index"], len(nodes)) and nodes[graph["root_index"]]["type"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return False
    return known and last == "tirx.IndexMap" and set(graph) <= {"nodes", "root_index", "metadata"}


def _is_known(node: dict, place: int) -> bool:
    kind, data = node["type"], node.get("data")
    if kind == "None":
        return data is None
    if kind == "int":
        return type(data) is int and abs(data) < _LARGEST
    if kind == "ffi.String":
        return bool(_IDENTIFIER.fullmatch(data))
    if kind == "ir.PrimType":
        return data == {"span": 0, "dtype": data["dtype"]} and data["dtype"] in _DTYPES
    if kind == "ffi.Array":
        return all(_is_before(entry, place) for entry in data)
    return set(data) == set(_NODES[kind]) and all(_is_before(e, place) for e in data.values())


def _is_before(entry: Any, place: int) -> bool:
    return type(entry) is int and 0 <= entry < place
