"""Whether a trace of MetaSchedule is data alone; it may come from a stranger.

TVM takes what a trace says in good faith: it prints the names of scopes and threads into the source
of a kernel, reads JSON wherever a string looks like it, and follows indices that lead out of its
arrays. So a trace is taken only if each of its steps has the form, the names and the numbers that
TVM's rules for "llvm", "cuda" and "cuda-tensorcore", and their postprocessing, give it. What such
steps do to a function TVM checks itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["plain", "refusal"]

# Of a whole trace, and what its numbers are within: loops of a kernel are no longer.
_STEPS, _LEAST, _LARGEST = 10_000, -2, 1 << 31
# The letters of values in the forms below. Names of blocks, loops and variables are b1, l2, v3.
_NAMED = re.compile(r"[blv][0-9]{1,6}")
# Inputs, attributes and outputs of each step: b, l and v are names of blocks, loops and variables,
# i is a whole number, f another, t a boolean, n null, N TVM's word for it, s a string, m a map.
_FORMS = {
    "AddUnitLoop": r"\([bl]\) \(\) \(l\)",
    "Annotate": r"\([bl](?:[ivs]|\(i+\))\) \(s\) \(\)",
    "Bind": r"\(l\) \(s\) \(\)",
    "Blockize": r"\(l\) \(i\) \(b\)",
    "CacheRead": r"\(b\(b*\)\) \(is\) \(b\)",
    "CacheWrite": r"\(b\(b*\)\) \(is\) \(b\)",
    "ComputeAt": r"\(bl\) \(ii\) \(\)",
    "ComputeInline": r"\(b\) \(\) \(\)",
    "DecomposeReduction": r"\(bl\) \(\) \(b\)",
    "EnterPostproc": r"\(\) \(\) \(\)",
    "Fuse": r"\(l+\) \(i\) \(l\)",
    "GetChildBlocks": r"\([bl]\) \(\) \(b*\)",
    "GetConsumers": r"\(b\) \(\) \(b*\)",
    "GetLoops": r"\(b\) \(\) \(l*\)",
    "GetProducers": r"\(b\) \(\) \(b*\)",
    "GetSBlock": r"\(\) \(ss\) \(b\)",
    "PadEinsum": r"\(b\) \(\(i+\)\) \(\)",
    "Parallel": r"\(l\) \(\) \(\)",
    "RFactor": r"\(l\) \(i\) \(b\)",
    "ReIndex": r"\(b\) \(ii\) \(b\)",
    "Reorder": r"\(l+\) \(\) \(\)",
    "ReverseComputeAt": r"\(bl\) \(ii\) \(\)",
    "ReverseComputeInline": r"\(b\) \(\) \(\)",
    "SampleCategorical": r"\(\) \(\(i+\)\(f+\)\) \(v\)",
    "SampleComputeLocation": r"\(b\) \(\) \(l\)",
    "SamplePerfectTile": r"\(l\) \(ii\) \(v+\)",
    "Split": r"\(l[Niv]+\) \(tt\) \(l+\)",
    "StorageAlign": r"\(b\) \(iiii\) \(\)",
    "Tensorize": r"\(b\) \(si\) \(\)",
    "TransformBlockLayout": r"\(b\) \(m\) \(\)",
    "TransformLayout": r"\(bm\) \(iini\) \(\)",
    "Unannotate": r"\([bl]\) \(s\) \(\)",
    "Vectorize": r"\(l\) \(\) \(\)",
}
# Least and most of the whole numbers among attributes; of other steps 0 and 1.
_BOUNDS = {
    "CacheRead": (0, 3),
    "CacheWrite": (0, 3),
    "ComputeAt": (-2, 64),
    "PadEinsum": (1, 64),
    "RFactor": (-1, 8),
    "ReverseComputeAt": (-2, 64),
    "SampleCategorical": (0, 1 << 16),
    "SamplePerfectTile": (1, 1024),
    "StorageAlign": (-2, 1024),
}
# TVM's intrinsics for tensor cores.
_INTRINSIC = r"wmma_[a-z0-9_]{1,60}"
# The strings of a step, all of them.
_STRINGS = {
    "Bind": r"(?:blockIdx|threadIdx|vthread)\.[xyz]",
    "CacheRead": r"global|local|shared|shared\.dyn|wmma\.matrix_[ab]",
    "CacheWrite": r"global|local|shared|shared\.dyn|wmma\.accumulator",
    "GetSBlock": r"[A-Za-z_][A-Za-z0-9_.]{0,120}",
    "Tensorize": _INTRINSIC,
}
# Annotations and their values; a loop or block is first. TVM writes strings there in quotes.
_NUMBER, _TEXT = r"[bl][iv]", r"[bl]s"
_NOTES = {
    **{
        f"meta_schedule.{name}": _NUMBER
        for name in (
            "cooperative_fetch", "parallel", "random_compute_producer",
            "thread_extent_high_inclusive", "thread_extent_low_inclusive", "unroll_explicit",
            "unroll_implicit", "vectorize",
        )
    },
    "meta_schedule.auto_tensorize": _TEXT,
    "meta_schedule.auto_tensorize_init": _TEXT,
    "meta_schedule.tiling_structure": _TEXT,
    "pragma_auto_unroll_max_step": r"li",
    "pragma_unroll_explicit": r"li",
    "pragma_unroll_implicit": r"li",
    "software_pipeline_async_stages": r"l\(i+\)",
    "software_pipeline_order": r"l\(i+\)",
    "software_pipeline_stage": r"l\(i+\)",
    "warp_execution": r"bi",
}  # fmt: skip
_NOTED = re.compile(rf'"(?:{_INTRINSIC}|[SR]{{1,16}})"')
# Of annotations: steps that are unrolled, threads; and of a pipeline, whose stages are copies.
_NOTED_MOST, _PIPELINE_MOST = 1 << 16, 16
# A map's expressions grow by naming others twice.
_EXPRESSION_MOST = 1000


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


def refusal(trace: Any) -> str | None:
    """What in a trace, as `json.loads` gives it, TVM's rules do not make; None if there is nothing.

    It names the step's position and what was found there.
    """
    try:
        steps, decisions = trace
        if len(steps) > _STEPS:
            return f"trace: {len(steps)} steps: allowed: {_STEPS}"
        for place, step in enumerate(steps):
            reason = _of_step(*step)
            if reason is not None:
                return f"trace: step {place}: {reason}"
        return _of_decisions(steps, decisions)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        return f"trace: allowed: steps and decisions as TVM writes them, not {_shown(error)}"


def _of_step(kind: str, inputs: list, attributes: list, outputs: list) -> str | None:
    if kind not in _FORMS:
        return f"{_shown(kind)}: allowed: {', '.join(_FORMS)}"
    form = " ".join(map(_form, (inputs, attributes, outputs)))
    if re.fullmatch(_FORMS[kind], form, re.ASCII) is None:
        return f"{kind}: {_shown([inputs, attributes, outputs])}: no such form"
    if kind in ("Annotate", "Unannotate"):
        return _of_note(kind, inputs, attributes[0])
    least, most = _BOUNDS.get(kind, (0, 1))
    if not all(least <= number <= most for number in _numbers(attributes)):
        return f"{kind}: {_shown(attributes)}: allowed: numbers from {least} to {most}"
    for text in _strings([inputs, attributes]):
        if kind in _STRINGS and re.fullmatch(_STRINGS[kind], text) is None:
            return f"{kind}: {_shown(text)}: allowed: {_STRINGS[kind]}"
    return None


def _of_note(kind: str, inputs: list, name: str) -> str | None:
    if name not in _NOTES:
        return f"annotation {_shown(name)}: allowed: {', '.join(_NOTES)}"
    if kind == "Unannotate":
        return None
    value = inputs[1]
    most = _PIPELINE_MOST if isinstance(value, list) else _NOTED_MOST
    small = all(0 <= number <= most for number in _numbers([value]))
    if not small or re.fullmatch(_NOTES[name], _form(inputs)[1:-1]) is None:
        return f"annotation {name}={_shown(value)}: allowed: {_NOTES[name]}, up to {most}"
    if _kind(value) == "s" and _NOTED.fullmatch(value) is None:
        return f"annotation {name}={_shown(value)}: allowed: {_NOTED.pattern}"
    return None


def _of_decisions(steps: list, decisions: list) -> str | None:
    """One for each step that samples: without it TVM draws, another time another one."""
    sampling = [place for place, step in enumerate(steps) if step[0].startswith("Sample")]
    if [place for place, _ in decisions] != sampling or not all(_is_int(p) for p, _ in decisions):
        return "trace: allowed: a decision for each step that samples, in their order"
    for place, decision in decisions:
        kind, _, attributes, _ = steps[place]
        if not _DECIDED[kind](decision, attributes):
            return f"trace: step {place}: {kind}: decision {_shown(decision)}: not allowed"
    return None


def _is_tile(decision: Any, attributes: list) -> bool:
    return (
        isinstance(decision, list)
        and len(decision) == attributes[0]
        and all(_is_int(factor) and factor > 0 for factor in decision)
        and math.prod(decision) < _LARGEST
    )


_DECIDED: dict[str, Callable[[Any, list], bool]] = {
    "SamplePerfectTile": _is_tile,
    "SampleCategorical": lambda chosen, given: _is_int(chosen) and 0 <= chosen < len(given[0]),
    # A loop by its number; -1 is to inline, -2 to leave a block where it is.
    "SampleComputeLocation": lambda loop, _: _is_int(loop) and -2 <= loop < 64,
}


def _form(values: list) -> str:
    return f"({''.join(map(_kind, values))})"


def _kind(value: Any) -> str:
    """A value's letter in `_FORMS`; a question mark is in none of them."""
    if isinstance(value, list):
        return _form(value)
    if isinstance(value, bool):
        return "t"
    if value is None:
        return "n"
    if isinstance(value, int):
        return "i" if _is_int(value) else "?"
    if isinstance(value, float):
        return "f" if math.isfinite(value) else "?"
    if not isinstance(value, str):
        return "?"
    if _NAMED.fullmatch(value):
        return value[0]
    if value == "None":
        return "N"
    return ("m" if _is_map(value) else "?") if value.startswith("{") else "s"


def _is_int(value: Any) -> bool:
    return type(value) is int and _LEAST <= value < _LARGEST


def _numbers(value: Any) -> Iterator[int]:
    """The whole numbers in a step."""
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif _kind(value) == "i":
        yield value


def _strings(value: Any) -> Iterator[str]:
    """The strings in a step that are no names, no null and no maps."""
    if isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
    elif _kind(value) == "s":
        yield value


def _shown(value: Any) -> str:
    """A value of a stranger's, fit for a terminal: escaped and cut off."""
    return ascii(value)[:80]


class _Node(NamedTuple):
    """A node of TVM's JSON: what it is, and how large as an expression."""

    sort: str
    size: int = 1


# What a map's nodes have, and of what sort each is that they name. A variable is an expression.
_BINARY = {"span": "none", "ty": "type", "a": "expression", "b": "expression"}
_FIELDS = {
    "ir.Var": ("variable", {"span": "none", "ty": "type", "name": "string"}),
    "ir.IntImm": ("expression", {"span": "none", "ty": "type", "value": "int"}),
    "prim.Add": ("expression", _BINARY),
    "prim.Mul": ("expression", _BINARY),
    "prim.FloorDiv": ("expression", _BINARY),
    "prim.FloorMod": ("expression", _BINARY),
    "tirx.IndexMap": (
        "map",
        {
            "initial_indices": "variables",
            "final_indices": "expressions",
            "inverse_index_map": "none",
        },
    ),
}
_ALSO = {"variable": "expression", "variables": "expressions"}


def _is_map(text: str) -> bool:
    """Whether a text is TVM's JSON of a map of indices by integer arithmetic."""
    try:
        graph = json.loads(text)
        nodes: list[_Node] = []
        for node in graph["nodes"]:
            if len(nodes) > _EXPRESSION_MOST or not set(node) <= {"type", "data"}:
                return False
            nodes.append(_node(node["type"], node.get("data"), nodes))
        root = graph["root_index"]
        return (
            type(root) is int
            and root == len(nodes) - 1
            and nodes[root].sort == "map"
            and set(graph) <= {"nodes", "root_index", "metadata"}
        )
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        return False


def _node(kind: str, data: Any, before: list[_Node]) -> _Node:
    """A node, after those before it. Raises ValueError, or what comes of data of another form."""

    def named(place: Any, sort: str | None = None) -> _Node:
        if type(place) is not int or not 0 <= place < len(before):
            raise ValueError(place)
        node = before[place]
        if sort not in (None, node.sort, _ALSO.get(node.sort)):
            raise ValueError(node.sort)
        return node

    if kind == "None" and data is None:
        return _Node("none")
    if kind == "int" and _is_int(data):
        return _Node("int")
    if kind == "ffi.String" and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,60}", data):
        return _Node("string")
    if (
        kind == "ir.PrimType"
        and data["dtype"] in ("int32", "int64")
        and set(data) <= {"span", "dtype"}
    ):
        named(data["span"], "none")
        return _Node("type")
    if kind == "ffi.Array":
        entries = [named(place, "expression") for place in data]
        variables = all(entry.sort == "variable" for entry in entries)
        size = sum(entry.size for entry in entries)
        return _sized("variables" if variables else "expressions", size)
    sort, fields = _FIELDS[kind]
    if set(data) != set(fields):
        raise ValueError(sorted(data))
    return _sized(sort, 1 + sum(named(data[name], of).size for name, of in fields.items()))


def _sized(sort: str, size: int) -> _Node:
    if size > _EXPRESSION_MOST:
        raise ValueError(size)
    return _Node(sort, size)
