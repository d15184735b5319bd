"""Calls of TIRx and of the `T.cuda` namespace, by operator name.

An entry makes, from the compiler and the call, a function of a mask. Other modules add theirs with
`intrinsic`, and `ptx.ptx` those of PTX.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import ir

from .arrays import numpy_type
from .errors import SimulationError
from .launch import WARP
from .values import Code, cast, dtype_of

Maker = Callable[[Any, Any], Code]
INTRINSICS: dict[str, Maker] = {}


def intrinsic(*names: str) -> Callable[[Maker], Maker]:
    """Make a function the meaning of the operators of these names."""

    def register(make: Maker) -> Maker:
        INTRINSICS.update(dict.fromkeys(names, make))
        return make

    return register


def nothing(program, node) -> Code:
    """An operator without an effect here."""
    return lambda mask: None


_FUNCTIONS = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log10": np.log10,
    "sqrt": np.sqrt, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "floor": np.floor,
    "ceil": np.ceil, "trunc": np.trunc, "fabs": np.abs, "abs": np.abs, "pow": np.power,
    "nearbyint": np.rint, "round": np.rint, "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "isnan": np.isnan, "isinf": np.isinf,
    "isfinite": np.isfinite, "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "fma": lambda x, y, z: fused(x, y, z),
}  # fmt: skip


def fused(x, y, z):
    """x * y + z rounded once (for float32: in float64, whose product is exact, and then again)."""
    dtype = np.result_type(x)
    wide = np.float64 if dtype == np.float32 else np.float32
    if dtype not in (np.float16, np.float32):
        return x * y + z
    return (np.asarray(x, wide) * y + np.asarray(z, wide)).astype(dtype)[()]


def _function(name: str) -> Maker:
    def make(program, node):
        operands = [program.compile(a) for a in node.args]
        convert = cast(dtype_of(node))
        return lambda mask: convert(_FUNCTIONS[name](*(f(mask) for f in operands)))

    return make


for _name in _FUNCTIONS:
    INTRINSICS[f"prim.{_name}"] = INTRINSICS[f"tirx.{_name}"] = _function(_name)


@intrinsic("prim.if_then_else")
def _(program, node):
    return program.conditional(node, *(program.compile(a) for a in node.args))


@intrinsic("prim.likely")
def _(program, node):
    return program.compile(node.args[0])


@intrinsic("tirx.reinterpret", "tirx.cuda.uint_as_float", "tirx.cuda.float_as_uint")
def _(program, node):
    (value,) = node.args
    return program.reinterpreted(node, program.compile(value), dtype_of(value))


@intrinsic("tirx.address_of", "tirx.buffer_data", "tirx.ptx.addr")
@intrinsic("tirx.cuda.cvta_generic_to_shared")
def _(program, node):
    pointer = program.pointer(node).value
    if not isinstance(node.ty, ir.PrimType):
        return pointer
    dtype = dtype_of(node)

    def code(mask):
        value = pointer(mask)
        return value.astype(dtype) if type(value) is np.ndarray else value

    return code


@intrinsic("tirx.break_loop", "tirx.continue_loop")
def _(program, node):
    if not program.frames:
        raise SimulationError(f"{node} outside a loop")
    frame, machine = program.frames[-1], program.machine
    name = "broken" if node.op.name == "tirx.break_loop" else "continued"

    def code(mask):
        getattr(frame, name).append(mask.bits)
        machine.absent |= mask.bits

    return code


@intrinsic("tirx.thread_return")
def _(program, node):
    machine = program.machine

    def code(mask):
        machine.exited |= mask.bits
        machine.absent |= mask.bits

    return code


@intrinsic("tirx.cuda.func_call")
def _(program, node):
    name = str(node.args[0].value)
    if name != "im2win_settle":
        raise SimulationError(f"{name}: functions written in CUDA are not simulated")
    # A barrier to compilers only.
    return nothing(program, node)


@intrinsic("tirx.cuda.cta_sync")
def _(program, node):
    machine, site = program.machine, program.site
    return lambda mask: machine.block_barrier(mask, site)


@intrinsic("tirx.tvm_storage_sync")
def _(program, node):
    scope = str(node.args[0].value)
    if not scope.startswith("shared"):
        raise SimulationError(f"{node}: a barrier of {scope} is not simulated")
    machine, site = program.machine, program.site
    return lambda mask: machine.block_barrier(mask, site)


@intrinsic("tirx.cuda.warp_sync")
def _(program, node):
    machine, site = program.machine, program.site
    return lambda mask: machine.warp_barrier(mask, site)


@intrinsic("tirx.cuda.cluster_sync")
def _(program, node):
    machine, site = program.machine, program.site

    def code(mask):
        machine.cluster_arrive(mask, site, release=True)
        machine.cluster_wait(mask, site)

    return code


@intrinsic("tirx.cuda.thread_rank")
def _(program, node):
    machine = program.machine
    return lambda mask: machine.thread.astype(np.int32)


@intrinsic("tirx.cuda.elect_sync")
def _(program, node):
    machine = program.machine

    def code(mask):
        """1 in the first lane that executes of each warp."""
        elected = np.zeros(machine.size, np.uint32)
        _, first = np.unique(machine.warp[mask.lanes], return_index=True)
        elected[mask.lanes[first]] = 1
        return elected

    return code


for _name in ("printf", "thread_fence", "nano_sleep", "wgmma_noop_barrier"):
    INTRINSICS[f"tirx.cuda.{_name}"] = nothing


@intrinsic("tirx.cuda.ldg")
def _(program, node):
    if len(node.args) != 2:
        raise SimulationError(f"{node}: a vector load by ldg is not simulated")
    dtype, lanes = numpy_type(str(node.args[1].value))
    load = program.loader(program.pointer(node.args[0]), dtype, lanes, "global")
    return lambda mask: load(mask) if lanes > 1 else load(mask)[0]


@intrinsic("tirx.cuda.atomic_add")
def _(program, node):
    pointer, value = program.pointer(node.args[0]), program.compile(node.args[1])
    return program.adder(pointer, value, dtype_of(node.args[1]), "")


def _shuffle(name: str, source: Callable) -> None:
    """Register a shuffle; `source` gives the lane to read in a segment of `width` lanes."""

    @intrinsic(f"tirx.tvm_warp_shuffle{name}", f"tirx.cuda.__shfl{name}_sync")
    def _(program, node):
        value, number, width = (program.compile(a) for a in node.args[1:4])
        machine, site = program.machine, program.site

        def code(mask):
            held, segment = value(mask), width(mask)
            if type(held) is not np.ndarray:
                return held
            lane = machine.thread % WARP
            within = lane % segment
            taken = source(within, number(mask), segment)
            # Beyond the segment a thread keeps its own.
            taken = np.where((taken >= 0) & (taken < segment), taken, within)
            taken = machine.lanes - within + taken
            last = machine.size - 1
            absent = mask.lanes[~mask.bits[np.minimum(taken, last)[mask.lanes]]]
            if absent.size:
                site.fail(machine, "shuffle from a thread that does not take part", int(absent[0]))
            return held[..., np.minimum(taken, last)]

        return code


_shuffle("", lambda lane, n, width: lane * 0 + n % width)
_shuffle("_up", lambda lane, n, width: lane - n)
_shuffle("_down", lambda lane, n, width: lane + n)
_shuffle("_xor", lambda lane, n, width: lane ^ n)
