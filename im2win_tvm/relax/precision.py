"""Models in float16: convolutions and matrix products in it, what loses by it in float32."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from .constants import FoldConstants

__all__ = ["in_float32", "to_float16"]


def to_float16(module: tvm.IRModule, *, inputs: bool = False) -> tvm.IRModule:
    """A float32 module by `relax.transform.ToMixedPrecision`, which decides operator by operator.

    inputs: whether the inputs of ``main`` become float16, too. Outputs are what its last operator
    gives. Batch normalisation is taken apart and folded before, in float32: its statistics need
    not fit into float16.
    """
    names = [p.name for p in module["main"].params if _is_float32(p)] if inputs else None
    passes = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        FoldConstants(),
        relax.transform.ConvertToDataflow(1),
        _Clips(),
        relax.transform.ToMixedPrecision("float16", names),
    ]
    return tvm.ir.transform.Sequential(passes)(module)


@tvm.transform.module_pass(opt_level=0, name="ClipsByTensors")
class _Clips:
    """`clip` (ReLU6) by constants that are tensors: TVM's pass fails on numbers among operands."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        mutator = _ByTensors(module)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                mutator.builder_.update_func(variable, mutator.visit_expr(function))
        return mutator.builder_.get()


@relax.expr_functor.mutator
class _ByTensors(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.clip":
            return call
        x, *limits = call.args
        least, most = (relax.const(_number(each), str(x.ty.dtype)) for each in limits)
        return relax.op.minimum(self.builder_.emit(relax.op.maximum(x, least)), most)


def _number(value: Any) -> float:
    while hasattr(value, "value"):
        value = value.value
    return float(value)


def _is_float32(parameter: relax.Var) -> bool:
    return str(getattr(parameter.ty, "dtype", "")) == "float32"


def in_float32(program: Any) -> bool:
    """Make an exported program of PyTorch one of float32, in place; whether it was of float16.

    TVM's importer gives convolutions and products of float16 the type float32, and then refuses to
    add their float16 biases or to normalise them.
    """
    import torch

    tensors = [*program.state_dict.values(), *program.constants.values()]
    if not any(isinstance(t, torch.Tensor) and t.dtype == torch.float16 for t in tensors):
        return False
    for place in (program.state_dict, program.constants):
        for name, value in place.items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float16:
                wide = value.detach().float()
                as_parameter = isinstance(value, torch.nn.Parameter)
                place[name] = torch.nn.Parameter(wide, False) if as_parameter else wide
    for node in program.graph.nodes:
        if node.kwargs.get("dtype") == torch.float16:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16:
            node.meta["val"] = value.float()
            node.meta.pop("tensor_meta", None)
    return True
