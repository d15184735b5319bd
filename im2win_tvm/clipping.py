"""ReLU6 of kernels that know ReLU.

Schedules apply ReLU as a comparison of the finished sum with zero. Where outputs end at 6, the sum
gets a second comparison beside it, in whatever a schedule made of the first; so schedules, and the
tuning records of what they generate, are as they were.
"""

import tvm
import tvm_ffi
from tvm import tirx

__all__ = ["at_most_six"]


def at_most_six(module: tvm.IRModule) -> tvm.IRModule:
    """The module with outputs above 6 as 6; NaN stays NaN, as in PyTorch."""
    found = []

    def clipped(call: tvm.ir.Call):
        value = _of_relu(call)
        if value is None:
            return call
        found.append(value)
        six = tirx.const(6, "float32")
        return tirx.if_then_else(value < call.args[1], call.args[1],
                                 tirx.if_then_else(six < value, six, value))  # fmt: skip

    functions = {
        variable: function.with_body(
            tvm_ffi.structural_map(function.body, (tvm.ir.Call, clipped), order="post")
        )
        for variable, function in module.functions_items()
    }
    if not found:
        raise RuntimeError("activation='relu6': the schedule's module applies no ReLU")
    return tvm.IRModule(functions, attrs=module.attrs)


def _of_relu(call: tvm.ir.Call):
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
