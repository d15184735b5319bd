"""Where a function's buffers lie: parameters in global memory, the rest in shared memory."""

import re
from math import prod
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, tirx

from .arrays import Array, numpy_type
from .errors import SimulationError
from .history import log
from .machine import Machine
from .memory import SHARED, SPACING, Region

# Instructions that write through an address.
_STORES = (
    "tirx.ptx.st", "tirx.ptx.red", "tirx.ptx.atom", "tirx.cuda.atomic",
    "tirx.ptx.cp_async_bulk_s2g", "tirx.ptx.cp_async_bulk_tensor_s2g",
)  # fmt: skip
_ACCESSES = ("tirx.ptx.ld", "tirx.ptx.st", "tirx.ptx.red", "tirx.ptx.atom")
_TYPE = re.compile("[busf](8|16|32|64)")
# Bytes that shared memory is allocated in; also the least alignment of its start.
_UNIT = 16


def nodes(root: Any, kinds: Any) -> list[Any]:
    """All nodes of some types below a node."""
    found: list[Any] = []
    tvm_ffi.structural_walk(root, (kinds, found.append))
    return found


def calls(root: Any, prefixes: tuple[str, ...]) -> list[Any]:
    """All calls of operators whose names begin so."""
    found = nodes(root, ir.Call)
    return [c for c in found if isinstance(c.op, ir.Op) and c.op.name.startswith(prefixes)]


def scope(buffer: Any) -> str:
    """The storage scope of a buffer."""
    return str(buffer.scope())


def array_of(machine: Machine, buffer: Any, storage: Any, offset: int) -> Array:
    """A buffer over registers or a region, `offset` elements from its start."""
    layout = buffer.layout
    if layout is not None and not layout.is_trivial():
        raise SimulationError(f"{buffer.name}: layout {layout} is not simulated")
    shape, strides = ([int(n) for n in axes] for axes in (buffer.shape, buffer.strides))
    return Array(machine, buffer.name, str(buffer.dtype), shape, storage, offset, strides)


def parameters(function: tirx.PrimFunc, arrays: dict[str, np.ndarray]) -> list[Region]:
    """The regions of a function's parameters, in order."""
    regions = []
    for number, p in enumerate(function.params):
        if not tirx.is_buffer_var(p):
            raise SimulationError(f"parameter {p}: only arrays are simulated")
        if p.name not in arrays:
            raise SimulationError(f"arrays: no {p.name}, a parameter of the function")
        given = arrays[p.name]
        element, vector = numpy_type(str(p.dtype))
        shape = tuple(int(n) for n in p.shape) + ((vector,) if vector > 1 else ())
        if given.dtype != element or given.shape != shape or not given.flags.c_contiguous:
            raise SimulationError(
                f"{p.name}: the function takes {element}{list(shape)}, contiguous; this is "
                f"{given.dtype}{list(given.shape)} with strides {given.strides}"
            )
        # Aligned to what the parameter declares, and to no more.
        base = (number + 1 << SPACING) + int(p.data_alignment)
        regions.append(Region(p.name, given.reshape(-1).view("u1"), given.nbytes, base))
    return regions


def log_parameters(function: tirx.PrimFunc, regions: list[Region], machine: Machine) -> None:
    """Log accesses of the arrays that the function writes; others cannot conflict."""
    roots: dict[int, Any] = {}
    for node in nodes(function.body, tirx.DeclBuffer):
        for variable in nodes(node.data, ir.Var):
            roots[node.buffer.__chandle__()] = variable
    written = [node.buffer for node in nodes(function.body, tirx.BufferStore)]
    for call in calls(function.body, _STORES):
        if call.op.name == "tirx.ptx.cp_async_bulk_tensor_s2g":  # through a map of any array
            written += list(function.params)
        elif calls(call, ("tirx.address_of",)):
            written += [load.source for load in nodes(call, ir.TensorLoad)]
        else:  # through a pointer that might lead anywhere
            written += list(function.params)
    handles = set()
    for buffer in written:
        while buffer.__chandle__() in roots:
            buffer = roots[buffer.__chandle__()]
        handles.add(buffer.__chandle__())
    for p, region in zip(function.params, regions, strict=True):
        if p.__chandle__() in handles:
            granule = min(numpy_type(str(p.dtype))[0].itemsize, 4)
            region.log = log(machine, region, -(-region.nbytes // granule), granule, False)


def place_shared(
    function: tirx.PrimFunc, machine: Machine, checked: bool
) -> tuple[Region, dict[int, Array]]:
    """The region of shared memory, and its buffers: the pool first, then those of fixed size."""
    region = Region("shared memory", np.zeros(0, "u1"), 0, SHARED)
    buffers = [node.buffer for node in nodes(function.body, tirx.AllocBuffer)]
    buffers = [b for b in buffers if scope(b).startswith("shared")]
    pool = max(
        (
            int(node.value)
            for node in nodes(function.body, tirx.AttrStmt)
            if node.attr_key == "tirx.dyn_smem_bytes"
        ),
        default=0,
    )
    placed, end = {}, 0
    for buffer in sorted(buffers, key=lambda b: scope(b) != "shared.dyn"):
        element, vector = numpy_type(str(buffer.dtype))
        align = max(int(buffer.data_alignment), _UNIT)
        start = -(-end // align) * align
        placed[buffer.__chandle__()] = array_of(machine, buffer, region, start // element.itemsize)
        # A pool has no elements of its own; an attribute tells its size.
        nbytes = prod(int(n) for n in buffer.shape) * element.itemsize * vector
        end = start + (nbytes or pool)
    region.nbytes = -(-end // _UNIT) * _UNIT
    region.log = log(machine, region, 0, _granule(function), checked)
    return region, placed


def _granule(function: tirx.PrimFunc) -> int:
    """Bytes of the smallest access of shared memory, at most 4."""
    touched = [node.buffer for node in nodes(function.body, tirx.BufferStore)]
    loads = nodes(function.body, ir.TensorLoad)
    # An address is no access: the instruction that takes it says how much it touches.
    addressed = {c.args[0].__chandle__() for c in calls(function.body, ("tirx.address_of",))}
    touched += [load.source for load in loads if load.__chandle__() not in addressed]
    sizes = [numpy_type(str(b.dtype))[0].itemsize for b in touched if scope(b)[:6] == "shared"]
    for call in calls(function.body, _ACCESSES):
        types = [str(a.value) for a in call.args if isinstance(a, ir.StringImm)]
        sizes += [int(t[1:]) // 8 for t in types if _TYPE.fullmatch(t)]
    return min([4, *sizes])
