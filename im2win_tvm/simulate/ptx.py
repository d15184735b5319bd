"""PTX instructions, by their names in TVM's table (`tvm.backend.cuda.ptx.table`).

An entry makes, from the compiler and a decoded instruction, a function of a mask; the predicate is
taken care of here. What follows the semantics of the ISA loosely says so.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from tvm.backend.cuda.ptx.table import TABLE, mods, operand_layout

from .errors import SimulationError
from .intrinsics import INTRINSICS, fused
from .memory import SHARED, WINDOW
from .values import Code, cast, dtype_of


class Instruction(NamedTuple):
    """A call taken apart: modifiers by slot, and the expressions of each operand (None: `_`)."""

    node: Any
    modifiers: dict[str, str]
    operands: dict[str, list[Any]]
    predicate: Any

    def one(self, operand: str) -> Any:
        """The expression of an operand that is a single register, address or immediate."""
        (value,) = self.operands[operand]
        return value


Maker = Callable[[Any, Instruction], Code]


def decode(node: Any) -> Instruction:
    """Take a call apart. Its arguments are operands, predicate, modifiers and flags."""
    entry = TABLE[node.op.name.removeprefix("tirx.ptx.")]
    arguments = list(node.args)
    flags = str(arguments.pop().value).split(",")
    split = len(arguments) - len(entry.slots)
    tokens = [str(a.value) for a in arguments[split:]]
    values = arguments[:split]
    predicate = values.pop() if "pred" in flags else None
    skipped = {int(f[1:]) for f in flags if f[:1] == "s" and f[1:].isdigit()}
    modifiers = mods(entry, tokens)
    operands, rest = {}, iter(values)
    for slot, at, count in operand_layout(entry, modifiers):
        operands[slot.name] = [None if at + i in skipped else next(rest) for i in range(count)]
    return Instruction(node, modifiers, operands, predicate)


def ptx(*names: str) -> Callable[[Maker], Maker]:
    """Make a function the meaning of the instructions of these names."""

    def register(make: Maker) -> Maker:
        def predicated(program, node):
            instruction = decode(node)
            code = make(program, instruction)
            if instruction.predicate is None:
                return code
            holds = program.compile(instruction.predicate)

            def guarded(mask):
                value = holds(mask)
                if type(value) is np.ndarray:
                    mask = mask.where(value != 0)
                elif not value:
                    return
                if mask is not None:
                    code(mask)

            return guarded

        for name in names:
            if name not in TABLE:
                raise KeyError(f"{name}: not in TVM's table of PTX instructions")
            INTRINSICS[f"tirx.ptx.{name}"] = predicated
        return make

    return register


def _unless(condition: bool, instruction: Instruction) -> None:
    if not condition:
        raise SimulationError(f"{instruction.node}: this form is not simulated")


# --- Asynchronous copies


@ptx("cp_async_ca", "cp_async_cg")
@ptx("cp_async_ca_src_size", "cp_async_cg_src_size")
@ptx("cp_async_ca_ignore_src", "cp_async_cg_ignore_src")
def _(program, it):
    target, source = (program.pointer(it.one(name)) for name in ("dst_mem", "src_mem"))
    size = program.compile(it.one("cp_size"))
    part = None
    if "src_size" in it.operands:
        part = program.compile(it.one("src_size"))
    elif "ignore_src" in it.operands:
        ignored = program.compile(it.one("ignore_src"))

        def part(mask):
            skip = np.asarray(ignored(mask)) != 0
            return np.where(skip, 0, size(mask))

    machine, site, space, copies = program.machine, program.site, program.space, program.copies
    banks, bypass = program.banks, it.modifiers["cop"] == "cg"

    def code(mask):
        n, lanes = size(mask), mask.lanes
        if n not in ((16,) if bypass else (4, 8, 16)):
            site.fail(machine, f"a copy of {n} bytes does not exist", int(lanes[0]))
        shared, to = space.locate(target, mask.of(target.value(mask)), n, "shared", lanes, site)
        if banks is not None:
            banks.count(to % shared.nbytes, n, lanes, site)
        granule = shared.log.granule
        each = n // granule
        data = np.zeros((each, lanes.size), f"u{granule}")
        address = np.broadcast_to(mask.of(source.value(mask)), lanes.shape)
        wanted = n if part is None else mask.of(part(mask))
        wanted = np.broadcast_to(np.asarray(wanted, np.int64), lanes.shape)
        for amount in np.unique(wanted):
            if not 0 <= amount <= n or amount % granule:
                lane = int(lanes[np.flatnonzero(wanted == amount)[0]])
                site.fail(machine, f"a copy of {n} bytes with a source of {amount}", lane)
            if amount == 0:
                continue
            some = np.flatnonzero(wanted == amount)
            region, start = space.locate(
                source, address[some], int(amount), "global", lanes[some], site, aligned=n
            )
            index = start + np.arange(amount)[:, None]
            read = region.read(np.dtype("u1"), index, lanes[some], site)
            data[: amount // granule, some] = np.ascontiguousarray(read.T).view(data.dtype).T
        copies.issue(to // granule + np.arange(each)[:, None], data, lanes, site)

    return code


@ptx("cp_async_commit_group")
def _(program, it):
    copies = program.copies
    return copies.commit


@ptx("cp_async_wait_group")
def _(program, it):
    copies, recent = program.copies, program.compile(it.one("group"))
    return lambda mask: copies.wait(mask, recent(mask))


@ptx("cp_async_wait_all")
def _(program, it):
    return program.copies.wait_all


# --- Barriers


@ptx("bar_sync", "barrier_sync", "bar_sync_count", "barrier_sync_count")
@ptx("bar_arrive", "barrier_arrive")
def _(program, it):
    number, machine, site = program.compile(it.one("a")), program.machine, program.site
    if machine.roles:
        count = program.compile(it.one("b")) if "b" in it.operands else program.constant(None)
        waits = it.modifiers["action"] == "sync"
        return lambda mask: machine.named_barrier(mask, number(mask), count(mask), site, waits)
    _unless(hasattr(number, "value"), it)
    return lambda mask: machine.block_barrier(mask, site)


@ptx("bar_warp_sync")
def _(program, it):
    members = program.compile(it.one("membermask"))
    _unless(getattr(members, "value", None) == 0xFFFFFFFF, it)
    machine, site = program.machine, program.site
    return lambda mask: machine.warp_barrier(mask, site)


@ptx("barrier_cluster_arrive")
def _(program, it):
    machine, site = program.machine, program.site
    release = it.modifiers["sem"] != "relaxed"
    return lambda mask: machine.cluster_arrive(mask, site, release)


@ptx("barrier_cluster_wait")
def _(program, it):
    machine, site = program.machine, program.site
    return lambda mask: machine.cluster_wait(mask, site)


@ptx("setmaxnreg")
def _(program, it):
    machine, site = program.machine, program.site

    def code(mask):
        # Where the warps of a warpgroup run apart, this sees but whole warps.
        if not (mask.bits | machine.exited).all():
            lane = int(np.flatnonzero(~(mask.bits | machine.exited))[0])
            site.fail(machine, "setmaxnreg by a part of a warpgroup: not reached", lane)

    return code if machine.roles else lambda mask: None


@ptx("fence_mbarrier_init", "fence_proxy")
def _(program, it):
    machine = program.machine
    proxy = "proxykind" in it.modifiers
    if not machine.roles or (proxy and it.modifiers["proxykind"] != "async"):
        return lambda mask: None

    def code(mask):
        threads = machine.number[mask.lanes]
        machine.mbarriers.fence(threads, not proxy)
        if proxy:
            machine.clocks.fence(threads)

    return code


# Order of memory is taken from barriers alone; prefetches and hints change no value.
@ptx("fence", "prefetch")
@ptx("createpolicy_fractional", "createpolicy_fraction", "createpolicy_range")
def _(program, it):
    return lambda mask: None


# --- Addresses in a cluster


@ptx("mapa", "mapa_u64_raw", "mapa_u64_shared", "mapa_u32")
def _(program, it):
    pointer, rank = program.pointer(it.one("a")), program.compile(it.one("b"))
    store, dtype = program.target(it.one("d")), dtype_of(it.one("d"))
    generic = not it.modifiers.get("space")
    machine, site = program.machine, program.site

    def code(mask):
        address, to = np.asarray(pointer.value(mask)), np.asarray(rank(mask))
        bad = np.broadcast_to(to >= machine.ranks, (machine.size,)) & mask.bits
        if bad.any():
            site.fail(machine, "mapa: no such block in the cluster:", int(np.flatnonzero(bad)[0]))
        offset = address.astype(np.int64) & ((1 << WINDOW) - 1)
        mapped = ((to.astype(np.int64) + 1) << WINDOW) | offset
        mapped = np.broadcast_to(mapped + (SHARED if generic else 0), (machine.size,))
        store(mapped.astype(dtype), mask)

    return code


# --- Loads, stores, atomics

_SPACES = ("", "global", "shared", "shared::cta", "shared::cluster")


def _type(it: Instruction, register: np.dtype) -> np.dtype:
    """The type in memory: the instruction's, or for a bit-size type the register's."""
    token = it.modifiers["type"]
    names = {"f": "float", "s": "int", "u": "uint"}
    bits = int(token[1:])
    if token[0] == "b":
        return register if register.itemsize * 8 == bits else np.dtype(f"uint{bits}")
    return np.dtype(f"{names[token[0]]}{bits}")


@ptx("ld", "ld_vec")
def _(program, it):
    targets = it.operands["d"]
    space = it.modifiers["space"]
    _unless(space in _SPACES, it)
    register = dtype_of(next(t for t in targets if t is not None))
    load = program.loader(program.pointer(it.one("addr")), _type(it, register), len(targets), space)
    stores = [None if t is None else program.target(t) for t in targets]
    convert = cast(register)

    def code(mask):
        for store, value in zip(stores, load(mask), strict=True):
            if store is not None:
                store(convert(value), mask)

    return code


@ptx("st", "st_vec")
def _(program, it):
    sources = it.operands["value"]
    space = it.modifiers["space"]
    _unless(space in _SPACES and None not in sources, it)
    dtype = _type(it, dtype_of(sources[0]))
    store = program.storer(program.pointer(it.one("addr")), dtype, len(sources), space)
    values = [program.compile(s) for s in sources]
    convert = cast(dtype)
    return lambda mask: store([convert(value(mask)) for value in values], mask)


@ptx("red", "red_f32_noftz", "atom")
def _(program, it):
    _unless(it.modifiers["op"] == "add" and it.modifiers["space"] in _SPACES, it)
    source = it.one("value")
    dtype = _type(it, dtype_of(source))
    add = program.adder(
        program.pointer(it.one("addr")), program.compile(source), dtype, it.modifiers["space"]
    )
    if "d" not in it.operands:
        return add
    store = program.target(it.one("d"))
    return lambda mask: store(add(mask), mask)


# --- Arithmetic on registers


def _arithmetic(names: tuple[str, ...], operation: Callable) -> None:
    @ptx(*names)
    def _(program, it):
        plain = it.modifiers["type"] in ("f32", "f64", "u32", "s32", "u64", "s64")
        others = ("ftz", "sat", "srctype")
        _unless(plain and not any(it.modifiers.get(name) for name in others), it)
        _unless(it.modifiers.get("rnd", "") in ("", "rn"), it)
        _unless(it.modifiers.get("mode", "lo") == "lo", it)
        store, convert = program.target(it.one("d")), cast(dtype_of(it.one("d")))
        operands = [program.compile(it.one(name)) for name in it.operands if name != "d"]
        return lambda mask: store(convert(operation(*(f(mask) for f in operands))), mask)


_arithmetic(("add", "add_int"), lambda x, y: x + y)
_arithmetic(("sub",), lambda x, y: x - y)
_arithmetic(("mul", "mul_int"), lambda x, y: x * y)
_arithmetic(("fma", "mad_f"), fused)
_arithmetic(("mad_int",), lambda x, y, z: x * y + z)


@ptx("cvt_f16x2_f32", "cvt_bf16x2_f32")
def _(program, it):
    """Two float32 rounded to halves of a register: `a` is the upper one."""
    _unless(it.modifiers["rnd"] == "rn" and not it.modifiers.get("relu"), it)
    most = None  # of magnitude: what infinities become
    if it.modifiers.get("satfinite"):
        _unless(it.modifiers["dtype"] == "f16x2", it)
        most = np.float32(np.finfo(np.float16).max)
    to = np.float16 if it.modifiers["dtype"] == "f16x2" else ml_dtypes.bfloat16
    store, dtype = program.target(it.one("d")), dtype_of(it.one("d"))
    upper, lower = program.compile(it.one("a")), program.compile(it.one("b"))

    def code(mask):
        given = (np.asarray(half(mask), np.float32) for half in (upper, lower))
        kept = given if most is None else (np.clip(value, -most, most) for value in given)
        high, low = (value.astype(to).view(np.uint16).astype(np.uint32) for value in kept)
        store(np.broadcast_to(high << np.uint32(16) | low, (program.machine.size,)).astype(dtype),
              mask)  # fmt: skip

    return code


@ptx("elect_sync")
def _(program, it):
    elected = INTRINSICS["tirx.cuda.elect_sync"](program, it.node)
    machine = program.machine
    target, lane = it.one("p"), it.one("d")
    store = program.target(target)
    store_lane = None if lane is None else program.target(lane)

    def code(mask):
        chosen = elected(mask)
        store(chosen, mask)
        if store_lane is not None:
            leader = np.zeros(machine.size, np.uint32)
            for first in np.flatnonzero(chosen):
                leader[machine.warp == machine.warp[first]] = machine.thread[first] % 32
            store_lane(leader, mask)

    return code


@ptx("mov")
def _(program, it):
    source = it.one("a")
    value = program.compile(source)
    store = program.target(it.one("d"))
    _unless(dtype_of(source) == dtype_of(it.one("d")), it)
    return lambda mask: store(value(mask), mask)


@ptx("shf")
def _(program, it):
    """Two registers as one of 64 bits, `b` the upper half, shifted by the lowest 5 bits of `c`."""
    _unless(it.modifiers["dir"] == "r" and it.modifiers["mode"] == "wrap", it)
    store, dtype = program.target(it.one("d")), dtype_of(it.one("d"))
    low, high, by = (program.compile(it.one(name)) for name in "abc")

    def code(mask):
        both = np.asarray(high(mask), np.uint64) << np.uint64(32) | np.asarray(low(mask), np.uint64)
        value = both >> (np.asarray(by(mask), np.uint64) & np.uint64(31))
        store(np.broadcast_to(value, (program.machine.size,)).astype(np.uint32).astype(dtype), mask)

    return code
