"""Where a variable may be used that was found by looking at what another one is bound to."""

from tvm import relax

__all__ = ["in_scope"]


def in_scope(variable: relax.Var, found: relax.Expr) -> bool:
    """Whether `found`, which `variable` is made of, may stand wherever `variable` is used.

    What lives in a dataflow block only is unknown where the block's outputs are used.
    """
    inner = isinstance(found, relax.DataflowVar)
    return not inner or isinstance(variable, relax.DataflowVar)
