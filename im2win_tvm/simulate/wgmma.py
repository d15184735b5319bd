"""Matrices of a warpgroup: `wgmma`, operands in shared memory by descriptor, or A in registers."""

from typing import Any

import ml_dtypes
import numpy as np

from .arrays import Registers
from .errors import SimulationError
from .intrinsics import intrinsic
from .launch import WARP, WARPGROUP
from .matrices import elements, whole_warps
from .ptx import _unless, ptx
from .tensor_maps import CHUNK, swizzled

# Layouts of a descriptor, bits 62 and 63: bytes of a swizzled row.
_SPANS = {1: 128, 2: 64, 3: 32}
# The same as TVM counts them: CUtensorMapSwizzle.
_LAYOUTS = {0: 0, 1: 3, 2: 2, 3: 1}
_DTYPES = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
# Chunks of a row that an instruction reads: 32 bytes of K.
_EACH = 2


class Apart(SimulationError):
    """A warpgroup whose warps run one by one has no products."""


def _groups(machine, mask, site) -> np.ndarray:
    """The warpgroups that execute, all threads of each."""
    warps = whole_warps(machine, mask, site)
    groups = np.unique(warps // 4)
    if machine.size < WARPGROUP:
        try:
            site.fail(machine, "wgmma: by a warpgroup whose warps wait for each other", 0)
        except SimulationError as error:
            raise Apart(f"{error} is not simulated", error.statement) from None
    if warps.size != 4 * groups.size:
        site.fail(machine, "wgmma: by a part of a warpgroup", int(warps[0]) * WARP)
    return groups


def _uniform(machine, site, value, groups, what) -> np.ndarray:
    """One value for each warpgroup; an error where its threads differ."""
    each = np.broadcast_to(np.asarray(value), (machine.size,)).reshape(-1, WARPGROUP)[groups]
    odd = (each != each[:, :1]).any(axis=1)
    if odd.any():
        lane = int(groups[np.flatnonzero(odd)[0]]) * WARPGROUP
        site.fail(machine, f"wgmma: threads of a warpgroup differ in {what}", lane)
    return each[:, 0]


def _chunks(machine, shared, site, descriptor: int, rows: int, group: int) -> np.ndarray:
    """The 16-byte chunks of a block's shared memory that hold 32 bytes of each row.

    Rows follow each other by the bytes of the swizzle, eights of rows by the stride offset. The
    swizzle exchanges by the address, wherever the matrix starts.
    """
    lane = group * WARPGROUP
    span = _SPANS.get(descriptor >> 62 & 3)
    if span is None:
        site.fail(machine, "wgmma: descriptors without a swizzle are not simulated", lane)
    if descriptor >> 49 & 7:
        site.fail(machine, "wgmma: descriptors with a base offset are not simulated", lane)
    start, stride = descriptor & 0x3FFF, descriptor >> 32 & 0x3FFF
    row = np.arange(rows)[:, None]
    chunk = start + row // 8 * stride + row % 8 * (span // CHUNK) + np.arange(_EACH)
    chunk = swizzled(chunk, span)
    if (int(chunk.max()) + 1) * CHUNK > shared.nbytes:
        site.fail(machine, "wgmma: a matrix beyond shared memory", lane)
    return chunk + int(machine.block[lane]) * shared.nbytes // CHUNK


def _values(raw: np.ndarray, kind: str) -> np.ndarray:
    """Rows of chunks as numbers."""
    if kind == "tf32":
        return elements(raw.reshape(len(raw), -1).view(np.uint32), kind)[..., 0].astype(np.float64)
    return raw.reshape(len(raw), -1).view(_DTYPES[kind]).astype(np.float64)


class _Sums:
    """The registers of an accumulator."""

    def __init__(self, program, it):
        nodes, self._machine, self._site = it.operands["d"], program.machine, program.site
        self.count = len(nodes)
        self._before = [program.compile(register) for register in nodes]
        self._stores = [program.target(register) for register in nodes]
        # With roles, where they are of one local array, they fly.
        arrays = [program.array(n.source) for n in nodes]
        one = all(a is arrays[0] for a in arrays) and len(arrays[0].shape) == 1
        self.registers: Registers | None = None
        if program.machine.roles and one and arrays[0].registers:
            self.registers, self._array = arrays[0].storage, arrays[0]
            self._rows = [program.compile(n.indices[0]) for n in nodes]

    def rows(self, mask) -> list[int]:
        """Where they are now, if they fly."""
        if self.registers is None:
            return []
        array, rows = self._array, [row(mask) for row in self._rows]
        return [array.element([row], mask, self._site) + array.offset for row in rows]

    def load(self, mask, rows: list[int], lanes: np.ndarray) -> np.ndarray:
        """[register, lane] of the lanes."""
        held = np.empty((self.count, lanes.size), np.float64)
        if self.registers is not None:
            flying = self.registers.flying
            for r, row in enumerate(rows):
                value = flying.get(row)
                held[r] = self.registers.load(row, mask, self._site) if value is None else value
            return held
        for r, before in enumerate(self._before):
            held[r] = np.broadcast_to(np.asarray(before(mask)), (self._machine.size,))[lanes]
        return held

    def store(self, mask, rows: list[int], values: np.ndarray) -> None:
        """Set them from [register, lane]."""
        if self.registers is None:
            for store, value in zip(self._stores, values, strict=True):
                store(mask.spread(value), mask)
        for row, value in zip(rows, values, strict=False):
            self.registers.fly(row, value)


class _Shared:
    """An operand that a descriptor tells of."""

    def __init__(self, program, it, name: str, rows: int, kind: str):
        self._program, self._site = program, program.site
        self._rows, self._kind = rows, kind
        self._descriptor = program.compile(it.one(name))

    def prepare(self, mask, groups) -> None:
        """What all threads of a warpgroup agree on."""
        machine, site = self._program.machine, self._site
        value = self._descriptor(mask)
        self._described = _uniform(machine, site, value, groups, "a descriptor")

    def matrix(self, mask, n: int, group: int) -> np.ndarray:
        """Of the n-th of the warpgroups."""
        program, site = self._program, self._site
        described = int(self._described[n])
        at = _chunks(program.machine, program.shared, site, described, self._rows, group)
        return _values(program.wgmma.read(group, at, mask, site), self._kind)


class _Held:
    """A in registers: of a warp 16 rows, by the fragment table of mma.m16n8k16 or k8."""

    def __init__(self, program, it, kind: str):
        self._program, self._site, self._kind = program, program.site, kind
        nodes = it.operands["a"]
        self._registers = [program.compile(register) for register in nodes]
        # With roles, where they are of one local array, they are lent.
        arrays = [program.array(n.source) if hasattr(n, "indices") else None for n in nodes]
        one = all(a is not None and a is arrays[0] for a in arrays)
        self._array = arrays[0] if program.machine.roles and one else None
        if self._array is not None:
            _unless(self._array.registers and len(self._array.shape) == 1, it)
            self._rows = [program.compile(n.indices[0]) for n in nodes]

    def prepare(self, mask, groups) -> None:
        """The registers of all lanes, which the instruction reads from now on."""
        machine, array = self._program.machine, self._array
        held = [np.broadcast_to(np.asarray(r(mask)), (machine.size,)) for r in self._registers]
        self._values = elements(np.stack(held), self._kind).astype(np.float64)
        if array is not None:
            rows = [array.element([row(mask)], mask, self._site) for row in self._rows]
            self._program.wgmma.lend(groups, array.storage, [r + array.offset for r in rows])

    def matrix(self, mask, n: int, group: int) -> np.ndarray:
        """Of a warpgroup."""
        values = self._values[:, group * WARPGROUP : (group + 1) * WARPGROUP]
        each = values.shape[-1]  # elements of a register
        matrix = np.empty((64, 8 * each), np.float64)
        thread = np.arange(WARPGROUP)
        row, first = thread // WARP * 16 + thread % WARP // 4, thread % 4 * each
        for register in range(4):  # rows g, g + 8, then the next columns
            for e in range(each):
                column = first + register // 2 * 4 * each + e
                matrix[row + register % 2 * 8, column] = values[register, :, e]
        return matrix


@ptx("wgmma_f16_ss", "wgmma_bf16_ss", "wgmma_tf32_ss")
@ptx("wgmma_f16_rs", "wgmma_bf16_rs", "wgmma_tf32_rs")
def _(program, it):
    columns = int(it.modifiers["shape"].partition("n")[2].partition("k")[0])
    kind = it.modifiers["atype"]
    for name, value in (("scale_a", 1), ("scale_b", 1), ("trans_a", 0), ("trans_b", 0)):
        _unless(name not in it.operands or int(it.one(name)) == value, it)
    _unless(it.modifiers["dtype"] == "f32", it)
    in_registers = "a" in it.operands
    a = _Held(program, it, kind) if in_registers else _Shared(program, it, "a_desc", 64, kind)
    b = _Shared(program, it, "b_desc", columns, kind)
    scale, sums = program.compile(it.one("scale_d")), _Sums(program, it)
    machine, site, pending = program.machine, program.site, program.wgmma
    # Registers by row of four warps: g and g + 8, columns 2 t and 2 t + 1 of eight.
    within, register = np.arange(WARPGROUP), np.arange(sums.count)[:, None]
    row = within // WARP * 16 + within % WARP // 4 + register % 4 // 2 * 8
    column = register // 4 * 8 + within % 4 * 2 + register % 2

    def code(mask):
        groups = _groups(machine, mask, site)
        a.prepare(mask, groups)
        b.prepare(mask, groups)
        adds = _uniform(machine, site, scale(mask), groups, "scale-d").astype(bool)
        values = np.empty((sums.count, groups.size, WARPGROUP))
        for n, group in enumerate(groups.tolist()):
            left, right = a.matrix(mask, n, group), b.matrix(mask, n, group)
            values[:, n] = (left @ right.T)[row, column]
        values, rows = values.reshape(sums.count, -1), sums.rows(mask)
        if adds.any():
            lanes = (groups[:, None] * WARPGROUP + within).ravel()
            values += np.where(adds.repeat(WARPGROUP), sums.load(mask, rows, lanes), 0)
        sums.store(mask, rows, values.astype(np.float32))
        pending.fill(groups, sums.registers, rows)

    return code


class Pending:
    """Instructions of wgmma that were not waited for.

    Their operands must not change. With roles that is seen from the order of accesses; without,
    from their values when they are waited for. With roles, what they add to is not to be touched.
    """

    def __init__(self, machine: Any, shared: Any):
        self._machine, self._shared = machine, shared
        self.start()

    def start(self) -> None:
        """Forget everything."""
        self._open: dict[int, list] = {}
        self._groups: dict[int, list[list]] = {}

    def read(self, group: int, chunks: np.ndarray, mask, site) -> np.ndarray:
        """The bytes of chunks, which an instruction of the warpgroup reads from now on."""
        machine, shared = self._machine, self._shared
        each = CHUNK // shared.log.granule
        words = chunks[..., None] * each + np.arange(each)
        values = shared.view(np.dtype((np.void, CHUNK)))[chunks]
        if machine.roles:
            number = machine.groups_of(machine.number[0])
            column, clock = machine.clocks.threads + number, machine.committed[number] + 1
            shared.log.read_later(words.ravel(), mask.lanes, column, clock, site, "wgmma")
        else:
            self._check(words, group, site)
            self._open.setdefault(group, []).append((words, chunks, values.tobytes()))
        return values

    def _check(self, words, group, site) -> None:
        lane = np.array([group * WARPGROUP])
        granule = self._shared.log.granule
        self._shared.log.read(words.reshape(-1, 1), granule, lane, site)

    def fill(self, groups: np.ndarray, registers: Registers | None, rows: list[int]) -> None:
        """An instruction is to fill rows of registers."""
        if registers is not None:
            for group in groups.tolist():
                self._open.setdefault(group, []).append((registers, rows))

    def lend(self, groups: np.ndarray, registers: Registers, rows: list[int]) -> None:
        """An instruction reads rows of registers from now on."""
        for row in rows:
            registers.lend(row)
        for group in groups.tolist():
            self._open.setdefault(group, []).append((registers, rows))

    def commit(self, mask, site) -> None:
        """Close the group of instructions of these warpgroups."""
        machine = self._machine
        for group in _groups(machine, mask, site).tolist():
            self._groups.setdefault(group, []).append(self._open.pop(group, []))
            if machine.roles:
                machine.committed[machine.groups_of(machine.number[0])] += 1

    def wait(self, mask, recent: int, site) -> None:
        """All but the most recent groups are over."""
        machine = self._machine
        for group in _groups(machine, mask, site).tolist():
            groups = self._groups.get(group, [])
            kept = max(0, len(groups) - recent)
            done, self._groups[group] = groups[:kept], groups[kept:]
            if machine.roles:
                self._over(mask, done, [*groups[kept:], self._open.get(group, [])])
            else:
                self._compare(done, group, site)

    def _compare(self, done, group, site) -> None:
        for words, chunks, values in (each for instructions in done for each in instructions):
            self._check(words, group, site)
            now = self._shared.view(np.dtype((np.void, CHUNK)))[chunks]
            if now.tobytes() != values:
                message = "wgmma: an operand changed before it was waited for"
                site.fail(self._machine, message, group * WARPGROUP)

    def _over(self, mask, done, later) -> None:
        machine = self._machine
        number = machine.groups_of(machine.number[0])
        busy = {(id(held), r) for each in later for held, rows in each for r in rows}
        for registers, rows in (each for instructions in done for each in instructions):
            for row in rows:
                if row in registers.lent:
                    registers.take_back(row)
                elif row in registers.flying and (id(registers), row) not in busy:
                    registers.land(row)
        if done:
            over = machine.committed[number] - len(self._groups[0])
            machine.completed[number] = over
            column = machine.clocks.threads + number
            machine.clocks.known[machine.number[mask.lanes], column] = over


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


@intrinsic("tirx.cuda.wgmma_encode_matrix_descriptor")
def _(program, node):
    (register,) = node.args[0].args
    store, pointer = program.target(register), program.pointer(node.args[1])
    leading, stride, swizzle = (program.compile(a) for a in node.args[2:])

    def code(mask):
        start = np.asarray(pointer.value(mask)).astype(np.uint64) >> np.uint64(4)
        fixed = int(leading(mask)) << 16 | int(stride(mask)) << 32 | _LAYOUTS[swizzle(mask)] << 62
        store((start & np.uint64(0x3FFF)) | np.uint64(fixed), mask)

    return code
