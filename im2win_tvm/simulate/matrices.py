"""Matrices of a warp: `ldmatrix`, `stmatrix`, `mma.sync`, by the fragment tables of the PTX ISA.

Of a fragment lane 4 g + t holds row or column g, and there the t-th register of neighbours.
"""

import numpy as np

from .launch import WARP
from .ptx import _unless, ptx
from .values import cast, dtype_of

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4


def whole_warps(machine, mask, site) -> np.ndarray:
    """The numbers of the warps that take part, all lanes of each."""
    bits = mask.bits.reshape(-1, WARP)
    some = bits.any(axis=1)
    partial = some & ~bits.all(axis=1)
    if partial.any():
        lane = int(np.flatnonzero(partial)[0]) * WARP
        site.fail(machine, "an instruction of a whole warp, by some of its threads", lane)
    return np.flatnonzero(some)


@ptx("ldmatrix")
def _(program, it):
    targets, trans = it.operands["r"], it.modifiers.get("trans")
    _unless(it.modifiers["shape"] == "m8n8" and it.modifiers["type"] == "b16", it)
    pointer = program.pointer(it.one("p"))
    stores = [program.target(target) for target in targets]
    convert = cast(dtype_of(targets[0]))
    machine, site, space, banks = program.machine, program.site, program.space, program.banks

    def code(mask):
        warps = whole_warps(machine, mask, site)
        address = np.broadcast_to(np.asarray(pointer.value(mask)), (machine.size,))
        # Matrix i: lane 8 i + r gives the address of row r, 16 bytes.
        rows = address.reshape(-1, WARP)[warps, : 8 * len(stores)]
        givers = (warps[:, None] * WARP + np.arange(8 * len(stores))).ravel()
        shared, start = space.locate(pointer, rows.ravel(), 16, "shared", givers, site)
        if banks is not None:
            banks.count(start % shared.nbytes, 16, givers, site)
        start = start.reshape(rows.shape)
        lanes = (warps[:, None] * WARP + _LANE).ravel()
        for i, store in enumerate(stores):
            if trans:  # the two elements are neighbours along a column
                first = start[:, 8 * i + 2 * _T] + 2 * _G
                second = start[:, 8 * i + 2 * _T + 1] + 2 * _G
            else:
                first = start[:, 8 * i + _G] + 4 * _T
                second = first + 2
            halves = [
                shared.read(np.dtype("u2"), at.ravel() // 2, lanes, site).astype("u4")
                for at in (first, second)
            ]
            store(convert(mask.spread(halves[0] | halves[1] << 16)), mask)

    return code


@ptx("stmatrix")
def _(program, it):
    sources, trans = [program.compile(r) for r in it.operands["r"]], it.modifiers.get("trans")
    _unless(it.modifiers["shape"] == "m8n8" and it.modifiers["type"] == "b16", it)
    pointer = program.pointer(it.one("p"))
    machine, site, space, banks = program.machine, program.site, program.space, program.banks
    row = np.arange(8)[:, None]
    # Of row r of a matrix, the lane and the half of its register that hold column c.
    slow, fast = (np.arange(8), row) if trans else (row, np.arange(8))
    holder, half = 4 * slow + fast // 2, fast % 2

    def code(mask):
        warps = whole_warps(machine, mask, site)
        address = np.broadcast_to(np.asarray(pointer.value(mask)), (machine.size,))
        count = 8 * len(sources)
        rows = address.reshape(-1, WARP)[warps, :count].ravel()
        givers = (warps[:, None] * WARP + np.arange(count)).ravel()
        shared, start = space.locate(pointer, rows, 16, "shared", givers, site)
        if banks is not None:
            banks.count(start % shared.nbytes, 16, givers, site)
        data = np.empty((warps.size, count, 8), np.uint16)
        for i, source in enumerate(sources):
            held = np.broadcast_to(np.asarray(source(mask)), (machine.size,)).astype(np.uint32)
            held = held.reshape(-1, WARP)[warps]
            data[:, 8 * i : 8 * i + 8] = held[:, holder] >> (16 * half).astype(np.uint32)
        # Every row is written by the lane that gave its address.
        words = np.ascontiguousarray(data.reshape(-1, 8)).view(np.uint32).T
        index = start // 4 + np.arange(4)[:, None]
        shared.write(np.dtype(np.uint32), index, words, givers, site)

    return code


def elements(registers: np.ndarray, dtype: str) -> np.ndarray:
    """The values of 32-bit registers as float32, those of one register along a new last axis."""
    if dtype == "f16":
        return registers.astype("u4")[..., None].view(np.float16).astype(np.float32)
    if dtype == "bf16":
        bits = np.stack([registers << 16, registers & 0xFFFF0000], axis=-1)
        return np.ascontiguousarray(bits.astype("u4")).view(np.float32)
    # tf32: the lower 13 bits of a float32 do not count.
    bits = np.ascontiguousarray(registers.astype("u4") & np.uint32(0xFFFFE000))
    return bits.view(np.float32)[..., None]


@ptx("mma")
def _(program, it):
    shape, dtype = it.modifiers["shape"], it.modifiers["atype"]
    each = 1 if dtype == "tf32" else 2  # elements of a register
    k = int(shape.rpartition("k")[2])
    _unless(shape.startswith("m16n8k") and dtype in ("f16", "bf16", "tf32"), it)
    _unless(it.modifiers["dtype"] == it.modifiers["ctype"] == "f32", it)
    _unless(it.modifiers["btype"] == dtype, it)
    a, b, c = ([program.compile(r) for r in it.operands[name]] for name in "abc")
    stores = [program.target(target) for target in it.operands["d"]]
    machine, site = program.machine, program.site

    def fragment(registers, mask):
        held = [np.broadcast_to(np.asarray(r(mask)), (machine.size,)) for r in registers]
        return np.stack(held).reshape(len(held), -1, WARP)

    def code(mask):
        warps = whole_warps(machine, mask, site)
        left, right = (elements(fragment(regs, mask)[:, warps], dtype) for regs in (a, b))
        matrix_a = np.empty((warps.size, 16, k), np.float64)
        matrix_b = np.empty((warps.size, k, 8), np.float64)
        for r in range(len(a)):  # rows g, g + 8, then the next columns
            for e in range(each):
                at = r // 2 * 4 * each + each * _T + e
                matrix_a[:, _G + r % 2 * 8, at] = left[r, ..., e]
        for r in range(len(b)):
            for e in range(each):
                matrix_b[:, r * 4 * each + each * _T + e, _G] = right[r, ..., e]
        sums = fragment(c, mask)[:, warps].astype(np.float64)
        product = matrix_a @ matrix_b
        for r, store in enumerate(stores):  # rows g, g, g + 8, g + 8; columns 2 t and 2 t + 1
            value = product[:, _G + r // 2 * 8, 2 * _T + r % 2] + sums[r]
            store(mask.spread(value.astype(np.float32).ravel()), mask)

    return code
