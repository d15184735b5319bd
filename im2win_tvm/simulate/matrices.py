"""Matrices of a warp: `ldmatrix` and `mma.sync`, by the fragment tables of the PTX ISA.

Of a fragment lane 4 g + t holds row or column g, and there the t-th register of neighbours.
"""

import ml_dtypes
import numpy as np

from .launch import WARP
from .ptx import _unless, ptx
from .values import cast, dtype_of

_LANE = np.arange(WARP)
_G, _T = _LANE // 4, _LANE % 4


def _whole_warps(machine, mask, site) -> np.ndarray:
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
        warps = _whole_warps(machine, mask, site)
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


def _elements(registers: np.ndarray, dtype: str) -> np.ndarray:
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
        warps = _whole_warps(machine, mask, site)
        left, right = (_elements(fragment(regs, mask)[:, warps], dtype) for regs in (a, b))
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


# --- wgmma: four warps, operands in shared memory by descriptor

_GROUP = 4 * WARP
_SWIZZLE_128 = 1


def _uniform(machine, site, value, groups, what) -> np.ndarray:
    """One value for each warpgroup; an error where its threads differ."""
    each = np.broadcast_to(np.asarray(value), (machine.size,)).reshape(-1, _GROUP)[groups]
    odd = (each != each[:, :1]).any(axis=1)
    if odd.any():
        lane = int(groups[np.flatnonzero(odd)[0]]) * _GROUP
        site.fail(machine, f"wgmma: threads of a warpgroup differ in {what}", lane)
    return each[:, 0]


def _rows_of(program, site, descriptors, rows, groups) -> np.ndarray:
    """Bytes in the region of shared memory of 16 halves of each row: [rows, 16, groups]."""
    machine, shared = program.machine, program.space.shared
    start, stride = (descriptors & 0x3FFF) << 4, (descriptors >> 32 & 0x3FFF) << 4
    wrong = (descriptors >> 62 != _SWIZZLE_128) | (descriptors >> 49 & 7 != 0)
    if wrong.any():
        lane = int(groups[np.flatnonzero(wrong)[0]]) * _GROUP
        site.fail(machine, "wgmma: of descriptors only the 128-byte swizzle is simulated", lane)
    r, k = np.arange(rows)[:, None, None], np.arange(16)[:, None]
    address = start.astype(np.int64) + r // 8 * stride.astype(np.int64) + r % 8 * 128 + 2 * k
    address ^= (address >> 7 & 7) << 4
    if address.max() >= shared.nbytes:
        site.fail(machine, "wgmma: a matrix beyond shared memory", int(groups[0]) * _GROUP)
    return machine.block[groups * _GROUP] * shared.nbytes + address


@ptx("wgmma_f16_ss", "wgmma_bf16_ss")
def _(program, it):
    columns = int(it.modifiers["shape"].partition("n")[2].partition("k")[0])
    dtype = np.dtype({"f16": np.float16, "bf16": ml_dtypes.bfloat16}[it.modifiers["atype"]])
    for name, value in (("scale_a", 1), ("scale_b", 1), ("trans_a", 0), ("trans_b", 0)):
        _unless(int(it.one(name)) == value, it)
    a, b, scale = (program.compile(it.one(name)) for name in ("a_desc", "b_desc", "scale_d"))
    before = [program.compile(register) for register in it.operands["d"]]
    stores = [program.target(register) for register in it.operands["d"]]
    machine, site = program.machine, program.site

    def code(mask):
        warps = _whole_warps(machine, mask, site)
        groups = np.unique(warps // 4)
        if warps.size != 4 * groups.size:
            site.fail(machine, "wgmma: by a part of a warpgroup", int(warps[0]) * WARP)
        matrices = []
        for descriptor, rows in ((a, 64), (b, columns)):
            described = _uniform(machine, site, descriptor(mask), groups, "a descriptor")
            at = _rows_of(program, site, described.astype(np.uint64), rows, groups)
            read = program.space.shared.read(dtype, at // 2, groups * _GROUP, site)
            program.wgmma.read(groups, at // 2, read)
            matrices.append(np.moveaxis(read.astype(np.float64), -1, 0))
        adds = _uniform(machine, site, scale(mask), groups, "scale-d").astype(bool)
        product = matrices[0] @ matrices[1].transpose(0, 2, 1)  # [groups, 64, columns]
        # Registers by row of four warps: g and g + 8, columns 2 t and 2 t + 1 of eight.
        within = np.arange(_GROUP)
        row = within // WARP * 16 + within % WARP // 4
        lanes = (groups[:, None] * _GROUP + within).ravel()
        for r, (held, store) in enumerate(zip(before, stores, strict=True)):
            column = r // 4 * 8 + within % 4 * 2 + r % 2
            value = product[:, row + r % 4 // 2 * 8, column]
            old = np.broadcast_to(np.asarray(held(mask)), (machine.size,))[lanes]
            old = old.reshape(value.shape).astype(np.float64)
            value = value + np.where(adds[:, None], old, 0)
            store(mask.spread(value.astype(np.float32).ravel()), mask)

    return code


class Pending:
    """Operands of wgmma instructions that were not waited for: they must not change."""

    def __init__(self, machine, shared):
        self._machine, self._shared = machine, shared
        self._open: dict[int, list] = {}
        self._groups: dict[int, list[list]] = {}

    def read(self, groups: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        """What each warpgroup's last instruction reads."""
        for n, group in enumerate(groups.tolist()):
            self._open.setdefault(group, []).append((index[..., n], values[..., n]))

    def commit(self, mask, site) -> None:
        """Close the group of instructions of these warpgroups."""
        for group in np.unique(_whole_warps(self._machine, mask, site) // 4).tolist():
            self._groups.setdefault(group, []).append(self._open.pop(group, []))

    def wait(self, mask, recent: int, site) -> None:
        """Check the operands of all but the most recent groups, and forget them."""
        for group in np.unique(_whole_warps(self._machine, mask, site) // 4).tolist():
            groups = self._groups.get(group, [])
            kept = max(0, len(groups) - recent)
            done, self._groups[group] = groups[:kept], groups[kept:]
            lane = np.array([group * _GROUP])
            for index, values in (each for instructions in done for each in instructions):
                now = self._shared.read(values.dtype, index[..., None], lane, site)[..., 0]
                if now.tobytes() != values.tobytes():
                    site.fail(self._machine, "wgmma: an operand changed before it was waited for",
                              group * _GROUP)  # fmt: skip


@ptx("wgmma_fence")
def _(program, it):
    return lambda mask: None


@ptx("wgmma_commit_group")
def _(program, it):
    pending, site = program.wgmma, program.site
    return lambda mask: pending.commit(mask, site)


@ptx("wgmma_wait_group")
def _(program, it):
    pending, site, recent = program.wgmma, program.site, int(it.one("group"))
    return lambda mask: pending.wait(mask, recent, site)
