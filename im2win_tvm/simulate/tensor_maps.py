"""Tensor maps: an array as the copy engine sees it (CUDA Driver API, cuTensorMapEncodeTiled)."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tvm_ffi
from tvm import ir

from .errors import SimulationError
from .intrinsics import intrinsic
from .memory import Region

# CUtensorMapDataType of TFLOAT32, which rounds float32 as it copies.
_TFLOAT32 = 11
_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "uint32": np.dtype(np.uint32),
}
# CUtensorMapSwizzle: bytes of a row whose 16-byte chunks are exchanged.
_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}
CHUNK = 16
_MOST_BOX, _MOST_STEP, _MOST_STRIDE, _MOST_SIZE = 256, 8, 1 << 40, 1 << 32


def swizzled(chunk: np.ndarray, span: int) -> np.ndarray:
    """Where 16-byte chunks of a block's shared memory go: by the number of their 128 bytes."""
    return chunk ^ (chunk >> 3 & (span // CHUNK - 1)) if span else chunk


class TensorMap(NamedTuple):
    """Sizes in elements and strides in bytes, innermost axis first, whose stride is an element's.

    box: elements that a copy spans of each axis, of which it takes every `steps`-th. span: bytes
    of a row that is swizzled, or 0.
    """

    name: str
    region: Region
    start: int
    dtype: np.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    span: int
    rounds: bool

    @property
    def taken(self) -> tuple[int, ...]:
        """Elements of each axis that a copy brings."""
        # The innermost axis has no steps without interleaving: the driver ignores them.
        steps = (1, *self.steps[1:])
        return tuple(-(-b // s) for b, s in zip(self.box, steps, strict=True))

    def reason(self) -> str | None:
        """Why the driver refuses the map, or why it is not simulated; None if it is fine."""
        row = self.box[0] * self.dtype.itemsize
        last = sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        if self.start % CHUNK:
            return f"starts at byte {self.start}, not a multiple of {CHUNK}"
        if not all(1 <= n <= _MOST_SIZE for n in self.sizes):
            return f"sizes {self.sizes}: allowed are 1 to 2**32"
        if any(s % CHUNK or not 0 <= s < _MOST_STRIDE for s in self.strides[1:]):
            return f"strides of {self.strides[1:]} bytes: allowed are multiples of 16 below 2**40"
        if not all(1 <= n <= _MOST_BOX for n in self.box):
            return f"a box of {self.box}: allowed are 1 to {_MOST_BOX}"
        if not all(1 <= s <= _MOST_STEP for s in self.steps):
            return f"steps of {self.steps}: allowed are 1 to {_MOST_STEP}"
        if row % CHUNK:
            return f"a box with rows of {row} bytes, not a multiple of {CHUNK}"
        if self.span and row > self.span:
            return f"a box with rows of {row} bytes, more than the {self.span} of the swizzle"
        if self.span and row < self.span:
            return f"rows of {row} bytes with a swizzle of {self.span} are not simulated"
        if self.start + last + self.dtype.itemsize > self.region.nbytes:
            end = self.start + last + self.dtype.itemsize
            return f"ends at byte {end} of the {self.region.nbytes} of the array"
        return None

    def elements(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of a box at a corner, row by row, the elements' places in the array, and which exist."""
        offset = np.zeros((), np.int64)
        inside = np.ones((), bool)
        for axis, (first, taken) in enumerate(zip(corner, self.taken, strict=True)):
            at = first + np.arange(taken) * (self.steps[axis] if axis else 1)
            shape = (-1, *[1] * axis)
            inside = inside & ((at >= 0) & (at < self.sizes[axis])).reshape(shape)
            offset = offset + (at * self.strides[axis]).reshape(shape)
        index = np.where(inside, (offset + self.start) // self.dtype.itemsize, 0).ravel()
        return index, np.broadcast_to(inside, offset.shape).ravel()


def as_tf32(data: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest of 10 bits of mantissa, to the even of two."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    bits = bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def map_of(program, node: Any) -> TensorMap:
    """The map that an operand is the address of."""
    variables: list[Any] = []
    tvm_ffi.structural_walk(node, (ir.Var, variables.append))
    for variable in variables:
        found = program.maps.get(variable.__chandle__())
        if found is not None:
            return found
    raise SimulationError(f"{node}: no tensor map that the host encodes")


@intrinsic("tirx.tvm_stack_alloca")
def _(program, node):
    if str(node.args[0].value) != "tensormap":
        raise SimulationError(f"{node} is not simulated")
    return lambda mask: None


@intrinsic("tirx.tensormap_encode_tiled")
def _(program, node):
    a = node.attrs
    options = (a.interleave, a.swizzle, a.l2_promotion, a.oob_fill, a.force_cu_dtype)
    _encode(program, node, node.args[0], str(a.descriptor_dtype), node.args[1], int(a.rank),
            node.args[2:], *map(int, options))  # fmt: skip
    return lambda mask: None


@intrinsic("tirx.tvm_call_packed")
def _(program, node):
    if str(getattr(node.args[0], "value", "")) != "runtime.cuTensorMapEncodeTiled":
        raise SimulationError(f"{node} is not simulated")
    variable, dtype, rank, data, *rest = node.args[1:]
    rank = int(rank)
    options = [int(o) for o in rest[4 * rank - 1 :]]
    _encode(program, node, variable, str(dtype.value), data, rank, rest[: 4 * rank - 1], *options)
    return lambda mask: None


def _encode(program, node, variable, dtype, data, rank, numbers, interleave, swizzle, promotion,
            fill, forced=-1) -> None:  # fmt: skip
    codes = [program.compile(n) for n in numbers]
    if not all(hasattr(c, "value") for c in codes):
        raise SimulationError(f"{node}: sizes that are not constants are not simulated")
    values = [int(c.value) for c in codes]
    if dtype not in _DTYPES or forced not in (-1, _TFLOAT32) or interleave or fill:
        raise SimulationError(f"{node}: this form is not simulated")
    element = _DTYPES[dtype]
    if forced == _TFLOAT32 and element != np.float32:
        raise SimulationError(f"{node}: TFLOAT32 of {dtype}")
    pointer = program.pointer(data)
    region, start = program.space.array(int(pointer.value(None)))
    made = TensorMap(
        pointer.name,
        region,
        start,
        element,
        tuple(values[:rank]),
        (element.itemsize, *values[rank : 2 * rank - 1]),
        tuple(values[2 * rank - 1 : 3 * rank - 1]),
        tuple(values[3 * rank - 1 : 4 * rank - 1]),
        _SPANS[swizzle],
        forced == _TFLOAT32,
    )
    wrong = made.reason()
    if wrong:
        raise SimulationError(f"{pointer.name}: tensor map {wrong}, in `{node}`")
    program.maps[variable.__chandle__()] = made
