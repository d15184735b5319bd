"""Store tiles of sums as the output tensor: the one step that TE's own vocabulary cannot say.

A TE stage writes every element of its own tensor. A kernel computes whole tiles, more elements
than the output has and in another order; so the function is written with the tiles as its output,
and its last statement is then turned into a guarded store to the place of each element in y.
"""

from collections.abc import Callable
from typing import NamedTuple

import tvm_ffi
from tvm import ir, s_tir, te, tirx

from ..epilogue import Epilogue
from ..problem import ConvProblem
from .epilogue import finish
from .graph import Arguments


class Place(NamedTuple):
    """Where an element of the tiles goes: image, channel, row, column, and when it is inside."""

    n: tirx.Expr | int
    o: tirx.Expr
    m: tirx.Expr
    q: tirx.Expr
    inside: list


def tiled_function(
    inputs: list[te.Tensor],
    acc: te.Tensor,
    place: Callable[..., Place],
    problem: ConvProblem,
    args: Arguments,
    epilogue: Epilogue,
) -> tirx.PrimFunc:
    """The function ``(*inputs, (bias), (residual), y)`` of float32 sums `acc`.

    `place` maps acc's axes to the output. The store is the block ``y``, over acc's axes, so that
    every loop of a schedule divides evenly. The output has the problem's layout and dtype.
    """

    def element(*axes):
        n, o, m, q, _ = place(*axes)
        index = _index(problem, n, o, m, q)
        return finish(acc[axes], o, index, problem, epilogue, args.bias, args.residual)

    tiles = te.compute(acc.shape, element, name="y")
    function = te.create_prim_func([*inputs, *args.extras(), tiles])
    y = tirx.decl_buffer(problem.output_shape, problem.dtype, "y")

    def store(block):
        if block.name_hint != "y":
            return block
        n, o, m, q, inside = place(*(axis.var for axis in block.iter_vars))
        index = _index(problem, n, o, m, q)
        body = tirx.BufferStore(y, block.body.value, index)
        if inside:
            body = tirx.IfThenElse(tirx.all(*inside), body, None)
        region = tirx.BufferRegion(y, [ir.Range.from_min_extent(i, 1) for i in index])
        return s_tir.SBlock(block.iter_vars, block.reads, [region], "y", body)

    body = tvm_ffi.structural_map(function.body, (s_tir.SBlock, store))
    return tirx.PrimFunc([*function.params[:-1], y], body, function.ret_type, function.attrs)


def _index(problem: ConvProblem, n, o, m, q) -> list:
    return [n, m, q, o] if problem.channels_last else [n, o, m, q]
