"""The ends of a network on a GPU: images to channels last, and means over all pixels.

TVM gives each element of an image a thread, whose reads are a plane apart, and each mean a block
after it converted all pixels to float32: at batch 128 a twentieth of ResNet-50's time in float16.
"""

# The body of `mean` is parsed as TIRx: its names are variables of the kernel, not of Python.

import math

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx
from tvm.script import tirx as T

from .passes import as_scheduled, extents, rewritten
from .scope import in_scope

__all__ = ["QuickEnds"]

_THREADS = 256
# Channels that a thread copies one by one.
_FEW = 8
# Means have a thread for so many bytes of channels, where that makes enough of them.
_VECTOR, _ENOUGH = 4, 8192


@tvm.transform.module_pass(opt_level=0, name="QuickEnds")
class QuickEnds:
    """`permute_dims` of images with few channels and `mean` over pixels, as such functions."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(rewritten(module, _Mutator))


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        if name == "relax.permute_dims":
            return self._channels_last(call)
        return self._mean(call) if name == "relax.mean" else call

    def _channels_last(self, call: relax.Call) -> relax.Expr:
        x, axes = call.args[0], call.attrs.axes
        shape = _image(x)
        if axes is None or [int(a) for a in axes] != [0, 2, 3, 1] or shape is None:
            return call
        # What is computed before it element by element becomes one function with it.
        if shape[1] > _FEW or (isinstance(x, relax.Var) and self.lookup_binding(x) is not None):
            return call
        return self._called(
            channels_last(shape, str(x.ty.dtype)), "im2win_channels_last", [x], call
        )

    def _mean(self, call: relax.Call) -> relax.Expr:
        x, attributes = call.args[0], call.attrs
        axes = None if attributes.axis is None else [int(a) for a in attributes.axis]
        if axes != [1, 2] or not attributes.keepdims:
            return call
        before = self.lookup_binding(x) if isinstance(x, relax.Var) else None
        if getattr(getattr(before, "op", None), "name", "") == "relax.astype":
            x = before.args[0] if in_scope(x, before.args[0]) else x
        shape, dtypes = _image(x), [str(x.ty.dtype), str(call.ty.dtype)]
        if shape is None or not set(dtypes) <= {"float16", "float32"} or dtypes[1] != "float32":
            return call
        lanes = math.gcd(shape[-1], _VECTOR // np.dtype(dtypes[0]).itemsize)
        if shape[0] * shape[-1] // lanes < _ENOUGH:
            return call
        share = relax.const(np.full(1, 1 / (shape[1] * shape[2]), "float32"), "float32")
        return self._called(mean(shape, dtypes[0], lanes), "im2win_mean", [x, share], call)

    def _called(self, function, name: str, arguments: list, call: relax.Call) -> relax.Call:
        variable = self.builder_.add_func(as_scheduled(function), name)
        return relax.call_tir(variable, arguments, call.ty)


def _image(x: relax.Expr) -> tuple[int, ...] | None:
    """The extents of a tensor of four axes that 32 bits count; None where they are unknown."""
    shape = extents(x)
    known = shape is not None and len(shape) == 4 and math.prod(shape) < 2**31
    return shape if known else None


def channels_last(shape, dtype: str) -> tirx.PrimFunc:
    """x ``[N, C, H, W]`` -> y ``[N, H, W, C]``: a thread a pixel, which reads planes in rows."""
    n, c, h, w = shape
    x = te.placeholder(shape, dtype, name="x")
    y = te.compute((n, h, w, c), lambda i, row, column, k: x[i, k, row, column], name="y")
    schedule = s_tir.Schedule(te.create_prim_func([x, y]))
    *pixel, channel = schedule.get_loops(schedule.get_sblock("y"))
    blocks, threads = schedule.split(schedule.fuse(*pixel), [None, _THREADS])
    schedule.bind(blocks, "blockIdx.x")
    schedule.bind(threads, "threadIdx.x")
    schedule.unroll(channel)
    return schedule.mod["main"]


def mean(shape, dtype: str, lanes: int) -> tirx.PrimFunc:
    """x ``[N, H, W, C]`` -> y ``[N, 1, 1, C]`` in float32: a thread for some channels.

    share: one over the number of pixels. A tensor, since TVM looks whether a function of a single
    one is a reshape, in a way that fails for TIRx.
    """
    N, H, W, C = shape
    V, PIXELS = lanes, H * W

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(shape, dtype),
        share: T.Buffer((1,), "float32"),
        y: T.Buffer((N, 1, 1, C), "float32"),
    ):
        T.device_entry()
        block = T.cta_id([(N * C // V + _THREADS - 1) // _THREADS])
        thread = T.thread_id([_THREADS])
        x_flat = T.decl_buffer((N * PIXELS * C,), dtype, data=x.data)
        y_flat = T.decl_buffer((N * C,), "float32", data=y.data)
        held = T.alloc_local((V,), dtype)
        total = T.alloc_local((V,), "float32")
        number: T.let = block * _THREADS + thread
        if number < N * C // V:
            image: T.let = number // (C // V)
            channel: T.let = number % (C // V) * V
            for e in T.unroll(V):
                total[e] = T.float32(0)
            for i in T.serial(PIXELS):
                for e in T.vectorized(V):
                    held[e] = x_flat[(image * PIXELS + i) * C + channel + e]
                for e in T.unroll(V):
                    total[e] = total[e] + T.Cast("float32", held[e])
            for e in T.unroll(V):
                y_flat[image * C + channel + e] = total[e] * share[0]
    # fmt: on
    return function
