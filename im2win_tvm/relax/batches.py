"""A kernel is compiled for one batch size: functions of a model for those that will be used."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from .models import ModelError

__all__ = ["specialise"]


def specialise(module: tvm.IRModule, batches: int | Sequence[int]) -> tvm.IRModule:
    """The module with functions for these batch sizes, before `UseIm2win`.

    The batch size is the first extent of the inputs of ``main``, which is to be symbolic: in
    `torch.export.export` by ``dynamic_shapes``, in ONNX by a name. A number: ``main`` takes this
    batch alone. Several: ``main`` stays as it is, for any batch, by TVM's kernels, and there are
    ``main_batch8`` and so on beside it. Raises ModelError.
    """
    one = isinstance(batches, int)
    sizes = (batches,) if one else tuple(batches)
    wrong = [size for size in sizes if not isinstance(size, int) or size < 1]
    if wrong or not sizes:
        raise ModelError(f"batches={batches!r}: allowed are whole numbers from 1")
    variable = _batch(module["main"])
    if variable is None:
        if one and _fixed(module["main"]) == batches:
            return module
        raise ModelError(
            f"batches={batches!r}: the model's own is {_fixed(module['main'])}, and fixed; export "
            "it with a symbolic one (torch.export: dynamic_shapes; ONNX: a name as first extent)"
        )
    functions = {v: f for v, f in module.functions_items()}
    for size in sizes:
        bound = relax.transform.BindSymbolicVars({variable: size}, "main")(module)["main"]
        if one:
            return tvm.IRModule(functions | {module.get_global_var("main"): bound}, module.attrs)
        name = f"main_batch{size}"
        # Each function's variables are its own.
        bound = relax.utils.copy_with_new_vars(bound).with_attr("global_symbol", name)
        functions[tvm.ir.GlobalVar(name)] = bound
    return relax.transform.Normalize()(tvm.IRModule(functions, module.attrs))


def _first_extents(function: relax.Function) -> list:
    shapes = [getattr(p.ty, "shape", None) for p in function.params]
    return [shape[0] for shape in shapes if shape is not None and len(shape)]


def _batch(function: relax.Function) -> tvm.ir.Var | None:
    """The variable that is the first extent of inputs; None where there is none."""
    return next((n for n in _first_extents(function) if isinstance(n, tvm.ir.Var)), None)


def _fixed(function: relax.Function) -> int | None:
    return next((int(n) for n in _first_extents(function) if not isinstance(n, tvm.ir.Var)), None)
