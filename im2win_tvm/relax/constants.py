"""What is computed from constants alone, computed.

`relax.transform.FoldConstant` compiles a function for each such operator, of which a normalised
convolution has ten: minutes for a large model. The operators that parameters of convolutions pass
through are computed by NumPy here, in their own dtype; whatever is left is for TVM's pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

__all__ = ["FoldConstants"]


def _reshape(call: relax.Call, x: np.ndarray) -> np.ndarray:
    return x.reshape([int(n) for n in call.ty.shape])


def _elementwise(function: Callable) -> Callable:
    return lambda _call, *values: function(*values)


_FOLDED: dict[str, Callable[..., Any]] = {
    "relax.add": _elementwise(np.add),
    "relax.subtract": _elementwise(np.subtract),
    "relax.multiply": _elementwise(np.multiply),
    "relax.divide": _elementwise(np.divide),
    "relax.sqrt": _elementwise(np.sqrt),
    "relax.rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "relax.expand_dims": _reshape,
    "relax.reshape": _reshape,
    "relax.squeeze": _reshape,
    "relax.permute_dims": lambda call, x: x.transpose(
        None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
    ),
    "relax.astype": lambda call, x: x.astype(str(call.attrs.dtype)),
}
_BROADCASTING = ("relax.add", "relax.subtract", "relax.multiply", "relax.divide")
# NumPy has no others of these names, and integers are for shapes, which TVM follows.
_DTYPES = ("float16", "float32", "float64")


@tvm.transform.module_pass(opt_level=0, name="FoldConstants")
class FoldConstants:
    """The results of operators of `_FOLDED` in place of their calls on constants.

    A constant that an operator of two tensors broadcasts gets the rank of the other one.
    """

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        mutator = _Fold(module)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                mutator.builder_.update_func(variable, mutator.visit_expr(function))
        return relax.transform.DeadCodeElimination()(mutator.builder_.get())


@relax.expr_functor.mutator
class _Fold(relax.PyExprMutator):
    def __init__(self, module: tvm.IRModule):
        super().__init__(module)
        self._known: dict[relax.Var, relax.Expr] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = self._folded(binding.value)
        if value is not None and isinstance(binding.var, relax.DataflowVar):
            self._known[binding.var] = value
        else:
            super().visit_var_binding_(binding)

    def visit_dataflow_var_(self, variable: relax.DataflowVar) -> relax.Expr:
        known = self._known.get(variable)
        return super().visit_dataflow_var_(variable) if known is None else known

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") not in _BROADCASTING:
            return call
        ranks = [getattr(each.ty, "ndim", -1) for each in call.args]
        arguments = [
            _with_rank(each, rank, max(ranks)) for each, rank in zip(call.args, ranks, strict=True)
        ]
        return relax.Call(call.op, arguments, call.attrs, call.ty_args)

    def _folded(self, value: relax.Expr) -> relax.Expr | None:
        """The constant that an expression is; None if it is none, or not for this pass."""
        if isinstance(value, tvm.ir.GenericConst):
            return value
        if not isinstance(value, relax.Call):
            return None
        function = _FOLDED.get(getattr(value.op, "name", ""))
        given = [self._known.get(each, each) for each in value.args if _is_tensor(each)]
        if function is None or not given:
            return None
        if not all(isinstance(each, tvm.ir.GenericConst) for each in given):
            return None
        arrays = [each.value.numpy() for each in given]
        if any(str(array.dtype) not in _DTYPES for array in arrays):
            return None
        made = np.ascontiguousarray(function(value, *arrays))
        return relax.const(made, str(made.dtype))


def _with_rank(argument: relax.Expr, rank: int, wanted: int) -> relax.Expr:
    if not isinstance(argument, tvm.ir.GenericConst) or not 0 <= rank < wanted:
        return argument
    values = argument.value.numpy()
    return relax.const(values.reshape((1,) * (wanted - rank) + values.shape), str(values.dtype))


def _is_tensor(argument: relax.Expr) -> bool:
    return not isinstance(argument, relax.ShapeExpr)
