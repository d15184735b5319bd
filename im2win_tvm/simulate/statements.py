"""Statements of TIRx as Python functions of a mask."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
from tvm import ir, tirx

from .access import Accesses
from .arrays import Array, Registers, numpy_type
from .banks import Banks
from .errors import SimulationError, Site
from .layout import array_of, calls, nodes, scope
from .pointers import Pointer
from .values import Code

#: Passes of a while loop after which it counts as endless: one that waits for what never comes,
#: for instance for a block that runs only after those of the loop.
LONGEST_WHILE = 100_000


class _Frame:
    """A loop: the lanes that left it, and those that left the current pass through its body."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """No lane left it."""
        self.broken: list[np.ndarray] = []
        self.continued: list[np.ndarray] = []


class Statements(Accesses):
    """Compiles statements. A program adds the machine and its memory."""

    banks: Banks | None
    arrays: dict[int, Array]
    checked: bool  # whether reading what was never written is an error
    leaving: bool  # whether some statement leaves a loop or the kernel

    def __init__(self):
        self.env: list[Any] = []
        self.frames: list[_Frame] = []  # of the loops around the statement being compiled
        # What coroutines keep apart: values of all loops, and all local arrays.
        self.loops: list[_Frame] = []
        self.registers: list[Registers] = []
        self.maps: dict[int, Any] = {}  # tensor maps, by variable
        self.pointers: dict[int, Pointer] = {}
        self._slots: dict[int, int] = {}
        self._loops: tuple[tuple[str, int], ...] = ()
        self.site = Site("the function", (), self.env)

    def slot(self, variable: Any) -> int:
        """Where the value of a variable is kept."""
        handle = variable.__chandle__()
        if handle not in self._slots:
            self._slots[handle] = len(self.env)
            self.env.append(None)
        return self._slots[handle]

    def array(self, buffer: Any) -> Array:
        """The array of a buffer."""
        try:
            return self.arrays[buffer.__chandle__()]
        except KeyError:
            raise SimulationError(f"{buffer.name}: used before its declaration") from None

    def statement(self, node: Any) -> Code:
        """A function that executes a statement in the lanes of a mask."""
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        if method is None:
            raise SimulationError(f"{type(node).__name__} is not simulated: {node}")
        return method(node)

    def _here(self, node: Any) -> Site:
        self.site = Site(node, self._loops, self.env)
        return self.site

    def _seqstmt(self, node) -> Code:
        steps = [self.statement(s) for s in node.seq]
        machine = self.machine

        def code(mask):
            for step in steps:
                step(mask)

        def shrinking(mask):
            for step in steps:
                step(mask)
                if machine.absent.any():
                    mask = mask.where(~machine.absent)
                    if mask is None:
                        return

        return shrinking if self.leaving else code

    def _attrstmt(self, node) -> Code:
        if node.attr_key in ("thread_extent", "virtual_thread"):
            raise SimulationError(f"{node.attr_key}: threads are T.cta_id and T.thread_id here")
        return self.statement(node.body)

    def _scopeiddefstmt(self, node) -> Code:
        for variable in getattr(node, "def").def_ids:
            self.slot(variable)
        return lambda mask: None

    def _evaluate(self, node) -> Code:
        self._here(node)
        code = self.compile(node.value)
        return (lambda mask: None) if hasattr(code, "value") else code

    def _bind(self, node) -> Code:
        self._here(node)
        slot, env = self.slot(node.var), self.env
        if not isinstance(node.value, ir.Var | tirx.IntImm):
            pointer = self.pointer(node.value)
            if pointer.bounds is not None:
                handle = node.var.__chandle__()
                self.pointers[handle] = pointer._replace(value=lambda mask: env[slot])
        value = self.compile(node.value)

        def code(mask):
            env[slot] = value(mask)

        def uniform(mask):  # scalars are faster, and lanes of a warpgroup often agree
            held = value(mask)
            if type(held) is np.ndarray and held.ndim == 1 and held.dtype.kind in "iu":
                held = _agreed(held, mask)
            env[slot] = held

        return uniform if self.machine.roles else code

    def _bufferstore(self, node) -> Code:
        site = self._here(node)
        array, value = self.array(node.buffer), self.compile(node.value)
        indices = [self.compile(index) for index in node.indices]
        if not (array.registers and len(indices) == 1 and array.vector == 1):
            return lambda mask: array.store(
                [index(mask) for index in indices], value(mask), mask, site
            )
        index, registers, extent, offset = indices[0], array.storage, array.shape[0], array.offset

        def code(mask):
            row = index(mask)
            if type(row) is int and 0 <= row < extent:
                registers.store(row + offset, value(mask), mask)
            else:
                array.store([row], value(mask), mask, site)

        return code

    def _allocbuffer(self, node) -> Code:
        buffer = node.buffer
        if scope(buffer).startswith("shared"):
            return lambda mask: None
        if scope(buffer) != "local":
            raise SimulationError(f"{buffer.name}: scope {scope(buffer)} is not simulated")
        dtype, vector = numpy_type(str(buffer.dtype))
        rows = prod(int(n) for n in buffer.shape) * vector
        registers = Registers(self.machine, buffer.name, dtype, rows, self.checked)
        self.registers.append(registers)
        self.arrays[buffer.__chandle__()] = array_of(self.machine, buffer, registers, 0)
        return lambda mask: registers.reset()

    def _declbuffer(self, node) -> Code:
        buffer = node.buffer
        owners = nodes(node.data, ir.Var)
        if len(owners) != 1 or not calls(node.data, ("tirx.buffer_data",)):
            raise SimulationError(f"{buffer.name}: a buffer at {node.data} is not simulated")
        owner = self.array(owners[0])
        dtype, _ = numpy_type(str(buffer.dtype))
        if owner.registers and owner.dtype != dtype:
            raise SimulationError(f"{buffer.name}: {owner.name} as {dtype} is not simulated")
        # As in generated code the data of a buffer begins where its memory does, whatever the
        # buffer's own offset in it: that of a pool, for instance.
        array = array_of(self.machine, buffer, owner.storage, int(buffer.elem_offset))
        array.banks = self.banks
        end = (array.offset + array.count) * dtype.itemsize
        limit = owner.storage.size if owner.registers else owner.storage.nbytes
        if end > limit:
            raise SimulationError(
                f"{buffer.name}: ends at byte {end} of the {limit} of {owner.storage.name}"
            )
        self.arrays[buffer.__chandle__()] = array
        return lambda mask: None

    def _assertstmt(self, node) -> Code:
        site, machine = self._here(node), self.machine
        condition = self.compile(node.condition)

        def code(mask):
            holds = np.broadcast_to(condition(mask), machine.size)
            failed = mask.where(~holds)
            if failed is not None:
                site.fail(machine, "assertion", int(failed.lanes[0]))

        return code

    def _ifthenelse(self, node) -> Code:
        self._here(node.condition)
        condition = self.compile(node.condition)
        true = self.statement(node.then_case)
        false = self.statement(node.else_case) if node.else_case is not None else None

        def code(mask):
            chosen = condition(mask)
            if type(chosen) is not np.ndarray:
                if chosen:
                    true(mask)
                elif false is not None:
                    false(mask)
                return
            taken = mask.where(chosen)
            if taken is not None:
                true(taken)
            if false is not None and taken is not mask:
                false(mask if taken is None else mask.where(~chosen))

        return code

    # --- Loops

    def _for(self, node) -> Code:
        if node.kind == tirx.ForKind.VECTORIZED:
            return self._vectorized(node)
        if node.kind not in (tirx.ForKind.SERIAL, tirx.ForKind.UNROLLED):
            raise SimulationError(f"a loop of kind {tirx.ForKind(node.kind).name} in a kernel")
        self._here(node.extent)
        first, extent = self.compile(node.min), self.compile(node.extent)
        step = self.compile(node.step) if node.step is not None else self.constant(1)
        slot, env = self.slot(node.loop_var), self.env
        body, close = self._loop_body(node.body, (str(node.loop_var.name), slot))
        leaving = self.leaving

        def code(mask):
            start, count, stride = first(mask), _agreed(extent(mask), mask), step(mask)
            if type(count) is int and not leaving:
                for trip in range(count):
                    env[slot] = start + trip * stride
                    body(mask)
                return
            active, trip = mask, 0
            while active is not None:
                if type(count) is not int:
                    active = active.where(trip < count)
                elif trip >= count:
                    break
                if active is not None:
                    env[slot] = start + trip * stride
                    body(active)
                    active = close(active)
                    trip += 1
            close(None)

        return code

    def _while(self, node) -> Code:
        site, machine = self._here(node.condition), self.machine
        condition = self.compile(node.condition)
        body, close = self._loop_body(node.body, None)

        def code(mask):
            active, passes = mask, 0
            while active is not None:
                holds = condition(active)
                if type(holds) is np.ndarray:
                    active = active.where(holds)
                elif not holds:
                    break
                if active is not None:
                    if passes == LONGEST_WHILE:
                        message = f"while loop has not ended after {passes} passes"
                        site.fail(machine, message, int(active.lanes[0]))
                    passes += 1
                    body(active)
                    active = close(active)
            close(None)

        return code

    def _loop_body(self, body, loop) -> tuple[Code, Callable]:
        """The code of a loop's body, and what ends each pass (and, with None, the loop)."""
        frame, machine, leaving = _Frame(), self.machine, self.leaving
        self.loops.append(frame)
        outer = self._loops
        self.frames.append(frame)
        self._loops = outer if loop is None else (*outer, loop)
        code = self.statement(body)
        self._loops = outer
        self.frames.pop()

        def back(lists):
            for bits in lists:
                machine.absent &= ~bits
            lists.clear()
            machine.absent |= machine.exited

        def close(active):
            if not leaving:
                return active
            back(frame.continued)
            if active is None:
                back(frame.broken)
                return None
            return active.where(~machine.absent)

        return code, close

    def _vectorized(self, node) -> Code:
        """All trips at once, as vectors, where TVM makes vectors too; otherwise one by one."""
        count, first = int(node.extent), int(node.min)
        slot, env = self.slot(node.loop_var), self.env
        outer = self._loops
        self._loops = (*outer, (str(node.loop_var.name), slot))
        body = self.statement(node.body)
        self._loops = outer
        if _vectorizable(node.body, node.loop_var):
            values = np.arange(first, first + count, dtype=np.int32)[:, None]

            def together(mask):
                env[slot] = values
                body(mask)

            return together

        def each(mask):
            for value in range(first, first + count):
                env[slot] = value
                body(mask)

        return each


def _agreed(value, mask):
    """A count as a scalar if the lanes of the mask agree on it."""
    if type(value) is not np.ndarray:
        return value
    mine = mask.of(value)
    return int(mine[0]) if (mine == mine[0]).all() else value


def _vectorizable(body, variable) -> bool:
    """Whether no control flow, definition or call of an instruction depends on the variable."""
    handle = variable.__chandle__()

    def depends(node) -> bool:
        return any(v.__chandle__() == handle for v in nodes(node, ir.Var))

    control = [n.condition for n in nodes(body, tirx.IfThenElse)]
    control += [n.condition for n in nodes(body, tirx.While)]
    control += [n.extent for n in nodes(body, tirx.For)]
    control += [n.value for n in nodes(body, (tirx.Bind, tirx.Evaluate))]
    control += nodes(body, (tirx.And, tirx.Or))
    control += [c.args[0] for c in calls(body, ("prim.if_then_else",))]
    control += calls(body, ("tirx.ptx.", "tirx.cuda.", "tirx.tvm_", "tirx.address_of"))
    return not any(depends(n) for n in control)
