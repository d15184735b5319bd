"""What passes over a module's functions do alike."""

import tvm
from tvm import relax

__all__ = ["as_scheduled", "extents", "rewritten"]

_SCHEDULED, _OPAQUE = "tirx.is_scheduled", 8


def as_scheduled(function: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """One that TVM's pipeline leaves as it is, and fuses with nothing."""
    function = function.without_attr("global_symbol")
    return function.with_attr(_SCHEDULED, True).with_attr("op_pattern", _OPAQUE)


def extents(expr: relax.Expr) -> tuple[int, ...] | None:
    """Those of a tensor; None where they are symbolic or unknown."""
    try:
        return tuple(int(n) for n in expr.ty.shape)
    except (AttributeError, TypeError, ValueError):
        return None


def rewritten(module: tvm.IRModule, mutator_class: type[relax.PyExprMutator]) -> tvm.IRModule:
    """The module with each of its Relax functions as a mutator of this class makes it."""
    mutator = mutator_class(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            mutator.builder_.update_func(variable, mutator.visit_expr(function))
    return mutator.builder_.get()
