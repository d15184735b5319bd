"""Expressions of TIRx as Python functions of a mask.

A value is an array with a column for every lane (a vector: a row for each element), or a scalar
where all lanes agree: int, bool or a NumPy float. Columns of lanes outside the mask hold anything.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import ir, tirx

from .arrays import Array, scalar
from .errors import SimulationError, Site
from .intrinsics import INTRINSICS
from .machine import Machine
from .values import Code, cast, dtype_of, wrapped


def choose(condition: np.ndarray, true: Any, false: Any, dtype: np.dtype):
    """Lane by lane one of two values."""
    shape = np.broadcast_shapes(np.shape(condition), np.shape(true), np.shape(false))
    out = np.empty(shape, dtype)
    out[...] = false
    np.copyto(out, true, where=condition, casting="unsafe")
    return out


def _truncated_quotient(x, y):
    quotient = x // y
    return quotient + ((quotient * y != x) & ((x < 0) != (y < 0)))


def _truncated_remainder(x, y):
    return x - _truncated_quotient(x, y) * y


_ARITHMETIC = {
    "Add": lambda x, y: x + y,
    "Sub": lambda x, y: x - y,
    "Mul": lambda x, y: x * y,
    "BitwiseAnd": lambda x, y: x & y,
    "BitwiseOr": lambda x, y: x | y,
    "BitwiseXor": lambda x, y: x ^ y,
    "LShift": lambda x, y: x << y,
    "RShift": lambda x, y: x >> y,
}
_COMPARISONS = {
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: x != y,
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
}
_DIVISIONS = {
    "FloorDiv": lambda x, y: x // y,
    "FloorMod": lambda x, y: x % y,
    "Div": _truncated_quotient,
    "Mod": _truncated_remainder,
}
# NaN gives way to a number, as in CUDA's fmin and fmax.
_EXTREMA = {"Min": (min, np.fmin), "Max": (max, np.fmax)}


class Expressions:
    """Compiles expressions. A program adds variables, arrays, statements."""

    machine: Machine
    env: list  # values of variables
    site: Site  # the statement being compiled
    slot: Callable[[Any], int]
    array: Callable[[Any], Array]

    def compile(self, expression: Any) -> Code:
        """A function that takes a mask and returns the value."""
        kind = type(expression).__name__
        if kind in _ARITHMETIC:
            return self._arithmetic(expression, _ARITHMETIC[kind])
        if kind in _COMPARISONS:
            return self._comparison(expression, _COMPARISONS[kind])
        if kind in _DIVISIONS:
            return self._division(expression, kind)
        if kind in _EXTREMA:
            return self._extremum(expression, *_EXTREMA[kind])
        method = getattr(self, f"_{kind.lower()}", None)
        if method is None:
            raise SimulationError(f"{kind} is not simulated: {expression}")
        return method(expression)

    def constant(self, value: Any) -> Code:
        """The function that always returns a value."""

        def code(mask):
            return value

        code.value = value
        return code

    def _folded(self, code: Code, *parts: Code) -> Code:
        """`code`, or its value where that is known already."""
        return self.constant(code(None)) if all(hasattr(p, "value") for p in parts) else code

    def _intimm(self, node):
        return self.constant(bool(node.value) if dtype_of(node).kind == "b" else int(node.value))

    def _floatimm(self, node):
        return self.constant(dtype_of(node).type(node.value))

    def _stringimm(self, node):
        return self.constant(str(node.value))

    def _var(self, node):
        if tirx.is_buffer_var(node):
            raise SimulationError(f"{node.name}: a buffer as a value is not simulated")
        slot, env = self.slot(node), self.env
        return lambda mask: env[slot]

    def _arithmetic(self, node, operation):
        a, b, dtype = self.compile(node.a), self.compile(node.b), dtype_of(node)
        if dtype.kind not in "iu":
            return lambda mask: operation(a(mask), b(mask))
        wrap = wrapped(dtype)

        def code(mask):
            value = operation(a(mask), b(mask))
            return wrap(value) if type(value) is int else value

        return self._folded(code, a, b)

    def _comparison(self, node, operation):
        a, b = self.compile(node.a), self.compile(node.b)

        def code(mask):
            value = operation(a(mask), b(mask))
            return value if type(value) is np.ndarray else bool(value)

        return code

    def _division(self, node, kind):
        a, b, dtype = self.compile(node.a), self.compile(node.b), dtype_of(node)
        if dtype.kind not in "iu":
            if kind != "Div":
                raise SimulationError(f"{kind} of {dtype} is not simulated: {node}")
            return lambda mask: a(mask) / b(mask)
        operation, wrap = _DIVISIONS[kind], wrapped(dtype)
        machine, site = self.machine, self.site

        def code(mask):
            x, y = a(mask), b(mask)
            if type(y) is int:
                if y == 0:
                    site.fail(machine, "division by zero", int(mask.lanes[0]))
            else:
                zero = y == 0
                if zero.any():
                    bad = mask.where(zero.reshape(-1, zero.shape[-1]).any(axis=0))
                    if bad is not None:
                        site.fail(machine, "division by zero", int(bad.lanes[0]))
                    y = np.where(zero, dtype.type(1), y)
            value = operation(x, y)
            return wrap(value) if type(value) is int else value

        return code

    def _extremum(self, node, of_integers, of_arrays):
        a, b = self.compile(node.a), self.compile(node.b)

        def code(mask):
            x, y = a(mask), b(mask)
            return of_integers(x, y) if type(x) is type(y) is int else of_arrays(x, y)

        return code

    def _and(self, node):
        return self._short_circuit(node, False)

    def _or(self, node):
        return self._short_circuit(node, True)

    def _short_circuit(self, node, decided: bool):
        a, b = self.compile(node.a), self.compile(node.b)

        def code(mask):
            x = a(mask)
            if type(x) is bool:
                return x if x == decided else b(mask)
            # As in C, the second operand is not evaluated where the first decides.
            rest = mask.where(~x if decided else x)
            if rest is None:
                return x
            y = b(rest)
            return x | y if decided else x & y

        return code

    def _not(self, node):
        a = self.compile(node.a)

        def code(mask):
            value = a(mask)
            return ~value if type(value) is np.ndarray else not value

        return code

    def _bitwisenot(self, node):
        a, wrap = self.compile(node.a), wrapped(dtype_of(node))

        def code(mask):
            value = ~a(mask)
            return wrap(value) if type(value) is int else value

        return code

    def _select(self, node):
        condition, dtype = self.compile(node.condition), dtype_of(node)
        true, false = self.compile(node.true_value), self.compile(node.false_value)

        def code(mask):
            x, y = true(mask), false(mask)  # both, in every lane
            chosen = condition(mask)
            if type(chosen) is bool:
                return x if chosen else y
            return choose(chosen, x, y, dtype)

        return code

    def conditional(self, node, condition: Code, true: Code, false: Code) -> Code:
        """`if_then_else`: each side only in the lanes that take it."""
        dtype = dtype_of(node)

        def code(mask):
            chosen = condition(mask)
            if type(chosen) is bool:
                return true(mask) if chosen else false(mask)
            taken = mask.where(chosen)
            if taken is mask:
                return true(mask)
            if taken is None:
                return false(mask)
            return choose(chosen, true(taken), false(mask.where(~chosen)), dtype)

        return code

    def _cast(self, node):
        value, convert = self.compile(node.value), cast(dtype_of(node))
        code = lambda mask: convert(value(mask))  # noqa: E731
        return self._folded(code, value)

    def _let(self, node):
        value, slot = self.compile(node.value), self.slot(node.var)
        body, env = self.compile(node.body), self.env

        def code(mask):
            env[slot] = value(mask)
            return body(mask)

        return code

    def _ramp(self, node):
        base, stride = self.compile(node.base), self.compile(node.stride)
        steps = np.arange(int(node.lanes), dtype=dtype_of(node))[:, None]
        return lambda mask: base(mask) + stride(mask) * steps

    def _broadcast(self, node):
        return self.compile(node.value)

    def _tensorload(self, node):
        array = self.array(node.source)
        indices = [self.compile(index) for index in node.indices]
        site = self.site
        if array.registers and len(indices) == 1 and array.vector == 1:
            return self._register(array, indices[0], site)
        return lambda mask: array.load([index(mask) for index in indices], mask, site)

    def _register(self, array, index: Code, site) -> Code:
        """One row of registers: most accesses of a kernel, so without the general path."""
        extent, offset, registers = array.shape[0], array.offset, array.storage

        def code(mask):
            row = index(mask)
            if type(row) is int and 0 <= row < extent:
                return registers.load(row + offset, mask, site)
            return array.load([row], mask, site)

        return code

    def _call(self, node):
        if not isinstance(node.op, ir.Op):
            raise SimulationError(f"call of {node.op} is not simulated")
        make = INTRINSICS.get(node.op.name)
        if make is None:
            raise SimulationError(f"{node.op.name} is not simulated: {node}")
        return make(self, node)

    def reinterpreted(self, node, value: Code, source: np.dtype) -> Code:
        """The bits of a value as another type of the same size."""
        dtype = dtype_of(node)
        if dtype == source:
            return value

        def code(mask):
            held = value(mask)
            if type(held) is np.ndarray:
                return np.ascontiguousarray(held).view(dtype)
            return scalar(np.asarray(held, source).reshape(1).view(dtype)[0])

        return code
