"""Activations of kernels whose schedules know ReLU.

Schedules apply ReLU as a comparison of the finished sum with zero. Another activation takes its
place afterwards, in whatever a schedule made of it; so schedules, and the tuning records of what
they generate, stay as they are.
"""

from collections.abc import Callable

import tvm
import tvm_ffi
from tvm import tirx

__all__ = ["FUNCTIONS", "instead_of_relu"]


def _relu6(value: tirx.Expr) -> tirx.Expr:
    # Comparisons, so that NaN stays NaN, as in PyTorch.
    zero, six = tirx.const(0, "float32"), tirx.const(6, "float32")
    above = tirx.if_then_else(six < value, six, value)
    return tirx.if_then_else(value < zero, zero, above)


def _gelu(value: tirx.Expr) -> tirx.Expr:
    half, one, root = (tirx.const(n, "float32") for n in (0.5, 1, 0.5**0.5))
    return value * (half * (one + tirx.erf(value * root)))


#: By name, what each computes of a float32 sum.
FUNCTIONS: dict[str, Callable[[tirx.Expr], tirx.Expr]] = {"relu6": _relu6, "gelu": _gelu}


def instead_of_relu(module: tvm.IRModule, activation: str) -> tvm.IRModule:
    """A schedule's module, built with ReLU, with one of FUNCTIONS in its place."""
    function, found = FUNCTIONS[activation], []

    def replaced(call: tvm.ir.Call):
        value = _of_relu(call)
        if value is None:
            return call
        found.append(value)
        return function(value)

    functions = {
        variable: each.with_body(
            tvm_ffi.structural_map(each.body, (tvm.ir.Call, replaced), order="post")
        )
        for variable, each in module.functions_items()
    }
    if not found:
        from .schedules.base import ScheduleError  # which needs this module

        raise ScheduleError(f"activation={activation!r}: the schedule's module applies no ReLU")
    return tvm.IRModule(functions, attrs=module.attrs)


def _of_relu(call: tvm.ir.Call) -> tirx.Expr | None:
    """v of ``0 if v < 0 else v`` in float32, as `expr.finish` writes it; None of anything else."""
    if getattr(call.op, "name", "") != "prim.if_then_else" or str(call.ty.dtype) != "float32":
        return None
    condition, zero, value = call.args
    same = tvm_ffi.structural_equal
    applies = (
        isinstance(condition, tirx.LT)
        and isinstance(zero, tirx.FloatImm)
        and zero.value == 0
        and same(condition.b, zero)
        and same(condition.a, value)
    )
    return value if applies else None
