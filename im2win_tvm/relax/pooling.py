"""Maximum pooling on a GPU: a thread for some channels of an output pixel.

TVM's rules take a window for a reduction, which they spread over threads: twice the time of moving
the data, and 27 times where a conversion to float32 follows the last pooling of VGG-16.
"""

from __future__ import annotations

import functools
import itertools
import math

import tvm
from tvm import relax, s_tir, te, tirx

from .passes import as_scheduled, extents, rewritten

__all__ = ["PoolByPixels"]

_THREADS = 256
# Bytes of a thread's load, the most that one instruction takes.
_VECTOR = 16
# A thread's window is written out.
_LARGEST = 25
_ITEMSIZE = {"float16": 2, "float32": 4}


@tvm.transform.module_pass(opt_level=0, name="PoolByPixels")
class PoolByPixels:
    """`max_pool2d` in NHWC, of known shape, as calls of such functions."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return rewritten(module, _Mutator)


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.nn.max_pool2d":
            return call
        attributes, x = call.attrs, call.args[0]
        layouts = {str(attributes.layout), str(attributes.out_layout or attributes.layout)}
        dtype = str(x.ty.dtype)
        shapes = [extents(x), extents(call)]
        if None in shapes:
            return call
        # Indices of these functions are 32 bits wide.
        if layouts != {"NHWC"} or dtype not in _ITEMSIZE or math.prod(shapes[0]) >= 2**31:
            return call
        size, strides, padding = (
            [int(n) for n in getattr(attributes, name)]
            for name in ("pool_size", "strides", "padding")
        )
        dense = all(int(n) == 1 for n in attributes.dilation)
        if not dense or math.prod(size) > _LARGEST or not _meets(shapes, size, strides, padding):
            return call
        function = as_scheduled(maximum(*shapes, dtype, size, strides, padding))
        variable = self.builder_.add_func(function, "im2win_max_pool2d")
        return relax.call_tir(variable, [x], call.ty)


def _meets(shapes, size, strides, padding) -> bool:
    """Whether every window has a pixel of the image."""
    (_, *image, _), (_, *windows, _) = shapes
    axes = zip(image, windows, size, strides, padding[:2], strict=True)
    return all(pad < k and (n - 1) * step - pad < length for length, n, k, step, pad in axes)


def _within(position: tirx.Expr, extent: int) -> tirx.Expr:
    return tirx.max(0, tirx.min(position, extent - 1))


def maximum(shape, out_shape, dtype, size, strides, padding) -> tirx.PrimFunc:
    """x -> y, scheduled.

    In place of what lies beyond an edge comes the pixel at the edge, which is in the window, too:
    so that there is no condition, and loads are of vectors. Windows have a pixel of the image.
    """
    (batch, height, width, channels), (top, left) = shape, padding[:2]
    x = te.placeholder(shape, dtype, name="x")

    def element(n, i, j, c):
        found = []
        for r, s in itertools.product(*map(range, size)):
            h, w = i * strides[0] + r - top, j * strides[1] + s - left
            found.append(x[n, _within(h, height), _within(w, width), c])
        return functools.reduce(tirx.max, found)

    y = te.compute((batch, *out_shape[1:3], channels), element, name="y")
    schedule = s_tir.Schedule(te.create_prim_func([x, y]))
    loops = schedule.get_loops(schedule.get_sblock("y"))
    lanes = math.gcd(channels, _VECTOR // _ITEMSIZE[dtype])
    pixels, vector = schedule.split(schedule.fuse(*loops), [None, lanes])
    blocks, threads = schedule.split(pixels, [None, _THREADS])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(threads, "threadIdx.x")
    schedule.vectorize(vector)
    return schedule.mod["main"]
