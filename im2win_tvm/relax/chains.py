"""Convolutions of a Relax function, each with what follows it and can be computed with it.

``relu(affine(conv2d(x, w)) + residual)``, or ReLU6 or GELU of it: affine is any number of
additions, subtractions, multiplications and divisions by a constant for each channel, which is what
batch normalisation and a bias are at inference. Everything but the last may have no other reader.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

__all__ = ["Chain", "chains"]

_AFFINE = {"relax.add", "relax.subtract", "relax.multiply", "relax.divide"}


@dataclass
class Chain:
    """A convolution and what is computed with it.

    call: the convolution; bindings: of it and what follows, in order. scale, shift: of each output
    channel, in float64; residual: what is added; activation: as in `Epilogue`.
    """

    call: relax.Call
    bindings: list[relax.Binding]
    scale: np.ndarray | None = None
    shift: np.ndarray | None = None
    residual: relax.Expr | None = None
    activation: str | None = None
    operators: list[str] = field(default_factory=list)

    @property
    def last(self) -> relax.Binding:
        return self.bindings[-1]


def chains(function: relax.Function) -> list[Chain]:
    """Those of all dataflow blocks, in the order of their convolutions."""
    readers, outputs = _readers(function)
    found = []
    for block in function.body.blocks:
        if not isinstance(block, relax.DataflowBlock):
            continue
        taken: set[Any] = set()  # a sum of two convolutions is computed with the first
        for number, binding in enumerate(block.bindings):
            if _operator(binding.value) == "relax.nn.conv2d":
                chain = Chain(binding.value, [binding], operators=["conv2d"])
                _follow(chain, block.bindings[number + 1 :], readers, outputs, taken)
                found.append(chain)
    return found


def _readers(function: relax.Function) -> tuple[Counter, set]:
    """How often each variable is read, and those that a block hands out."""
    readers: Counter = Counter()
    outputs = set()

    def count(expr):
        if isinstance(expr, relax.Var):
            readers[expr] += 1

    for block in function.body.blocks:
        for binding in block.bindings:
            relax.analysis.post_order_visit(binding.value, count)
            if not isinstance(binding.var, relax.DataflowVar):
                outputs.add(binding.var)
    relax.analysis.post_order_visit(function.body.body, count)
    return readers, outputs


def _operator(expr: relax.Expr) -> str | None:
    named = isinstance(expr, relax.Call) and hasattr(expr.op, "name")
    return expr.op.name if named else None


def _follow(chain: Chain, later: list, readers: Counter, outputs: set, taken: set) -> None:
    """Take what reads the chain's end, as far as it can be computed with it."""
    while chain.activation in (None, "relu"):
        var = chain.last.var
        if var in outputs or readers[var] != 1:
            return
        binding = next((b for b in later if _reads(b.value, var)), None)
        if binding is None or binding.var in taken or not _take(chain, binding, var):
            return
        taken.add(binding.var)
        chain.bindings.append(binding)
        chain.operators.append(_operator(binding.value).rpartition(".")[2])


def _reads(expr: relax.Expr, var: relax.Var) -> bool:
    return isinstance(expr, relax.Call) and any(var.same_as(a) for a in expr.args)


def _take(chain: Chain, binding: relax.Binding, var: relax.Var) -> bool:
    """Whether the operator of a binding is now part of the chain."""
    call, name = binding.value, _operator(binding.value)
    activation = _activation(call, name, var, chain.activation)
    if activation is not None:
        chain.activation = activation
        return True
    if chain.activation is not None or name not in _AFFINE or binding.var.ty != var.ty:
        return False
    left, right = call.args
    other = right if var.same_as(left) else left
    values = _per_channel(other, chain.call)
    if values is None:
        # Added as it is: after the sums, and before the function that makes negatives 0.
        fits = name == "relax.add" and chain.residual is None and other.ty == var.ty
        if fits and not isinstance(other, tvm.ir.GenericConst):
            chain.residual = other
            return True
        return False
    if chain.residual is not None or (name == "relax.divide" and other.same_as(left)):
        return False
    _compose(chain, name, values, negative=other.same_as(left))
    return True


def _activation(call: relax.Call, name: str, var: relax.Var, before: str | None) -> str | None:
    """What an operator makes of the activation before it, as `Epilogue` names it; None if neither.

    GELU is the exact one; ReLU6 is one `clip`, or two steps where models are brought into float16.
    """
    if name in ("relax.nn.relu", "relax.nn.gelu") and before is None:
        return name.rpartition(".")[2]
    if name == "relax.clip" and [_number(each) for each in call.args[1:]] == [0, 6]:
        return "relu6"
    if name in ("relax.maximum", "relax.minimum"):
        left, right = call.args
        limit = _number(right if var.same_as(left) else left)
        if name == "relax.maximum" and limit == 0 and before is None:
            return "relu"
        if name == "relax.minimum" and limit == 6 and before == "relu":
            return "relu6"
    return None


def _number(expr: relax.Expr) -> float | None:
    """The value of a constant of one element, or of a number among operands."""
    while not isinstance(expr, int | float | tvm.ir.GenericConst) and hasattr(expr, "value"):
        expr = expr.value
    if isinstance(expr, tvm.ir.GenericConst):
        values = expr.value.numpy()
        return float(values.reshape(())) if values.size == 1 else None
    return float(expr) if isinstance(expr, int | float) else None


def _per_channel(expr: relax.Expr, conv: relax.Call) -> np.ndarray | None:
    """A constant for each output channel, as float64."""
    if not isinstance(expr, tvm.ir.GenericConst):
        return None
    values = expr.value.numpy().astype("float64")
    try:
        channels = int(conv.args[1].ty.shape[conv.attrs.kernel_layout.index("O")])
    except (TypeError, ValueError):  # symbolic, or unknown
        return None
    axis = (conv.attrs.out_layout or conv.attrs.data_layout).index("C")
    shape = (1,) * (4 - values.ndim) + values.shape
    if len(shape) != 4 or any(n != 1 for i, n in enumerate(shape) if i != axis):
        return None
    return (
        np.broadcast_to(values.reshape(-1), (channels,)) if shape[axis] in (1, channels) else None
    )


def _compose(chain: Chain, name: str, values: np.ndarray, negative: bool) -> None:
    """Apply an affine function after those that were applied; negative: constant - x."""
    scale = np.ones_like(values) if chain.scale is None else chain.scale
    shift = np.zeros_like(values) if chain.shift is None else chain.shift
    if name == "relax.add":
        shift = shift + values
    elif name == "relax.subtract":
        shift = shift - values
        if negative:
            scale, shift = -scale, -shift
    else:
        factor = values if name == "relax.multiply" else 1 / values
        scale, shift = scale * factor, shift * factor
    chain.shift = shift
    chain.scale = None if (scale == 1).all() else scale
