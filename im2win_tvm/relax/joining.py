"""Patches of a transposed convolution beside another image on a GPU: a vector of channels a thread.

What U-Net does after each transposed convolution (see `disguised`): its patches are put in place,
get their bias, and lie behind the channels of an earlier image. TVM makes one function of all that,
element by element: four times the time of moving the data.
"""

# The body below is parsed as TIRx: its names are variables of the kernel, not of Python.

import math
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T

from .passes import as_scheduled, extents, rewritten
from .scope import in_scope

__all__ = ["JoinPatches"]

_THREADS = 256
# Bytes of a thread's load, the most that one instruction takes.
_VECTOR = 16
_OF_PATCHES = (0, 1, 3, 2, 4, 5)


class _Patches(NamedTuple):
    """``[N, rows, columns, height, width, F]``: a patch a pixel; bias: of each channel."""

    value: relax.Var
    bias: relax.Expr


@tvm.transform.module_pass(opt_level=0, name="JoinPatches")
class JoinPatches:
    """Such `concat` in NHWC, of known shape, as calls of such functions."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return relax.transform.DeadCodeElimination()(rewritten(module, _Mutator))


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if _name(call) != "relax.concat" or not isinstance(call.args[0], relax.Tuple):
            return call
        fields = list(call.args[0].fields)
        if len(fields) != 2 or call.ty.ndim != 4 or call.attrs.axis is None:
            return call
        shape = extents(call)
        if shape is None:
            return call
        other, patches = fields[0], self._patches(fields[1])
        if patches is None or int(call.attrs.axis) != 3:
            return call
        dtype = str(call.ty.dtype)
        vector = _VECTOR // np.dtype(dtype).itemsize
        parts = [int(each.ty.shape[-1]) for each in (other, patches.value)]
        if any(n % vector for n in parts) or math.prod(shape) >= 2**31:
            return call
        function = join(shape, [int(n) for n in patches.value.ty.shape], dtype)
        variable = self.builder_.add_func(as_scheduled(function), "im2win_join")
        return relax.call_tir(variable, [other, *patches], call.ty)

    def _patches(self, image: relax.Expr) -> _Patches | None:
        """What an image is made of, if it is made of patches with a bias."""
        add = self._bound(image)
        if _name(add) != "relax.add":
            return None
        value, bias = add.args
        if not isinstance(bias, tvm.ir.GenericConst) or not in_scope(image, value):
            return None
        channels, dtype = int(image.ty.shape[-1]), str(image.ty.dtype)
        values = bias.value.numpy()
        along_last = values.shape[-1:] == (channels,) and values.size == channels
        if not along_last or dtype not in ("float16", "float32"):
            return None
        for wanted in ("relax.reshape", "relax.permute_dims", "relax.reshape"):
            call = self._bound(value)
            if _name(call) != wanted:
                return None
            if wanted == "relax.permute_dims":
                axes, patches = call.attrs.axes, call.args[0]
                if axes is None or tuple(int(a) for a in axes) != _OF_PATCHES:
                    return None
            if not in_scope(value, call.args[0]):
                return None
            value = call.args[0]
        n, rows, columns, height, width, filters = (int(n) for n in patches.ty.shape)
        if [int(n) for n in image.ty.shape] != [n, rows * height, columns * width, filters]:
            return None
        return _Patches(patches, relax.const(values.reshape(channels), dtype))

    def _bound(self, expr: relax.Expr) -> relax.Expr | None:
        return self.lookup_binding(expr) if isinstance(expr, relax.Var) else None


def _name(expr) -> str:
    return getattr(getattr(expr, "op", None), "name", "")


def join(shape, patches_shape, dtype: str):
    """other ``[N, H, W, A]``, patches, bias -> y ``[N, H, W, A + F]``."""
    BATCH, HEIGHT, WIDTH, CHANNELS = shape
    ROWS, COLUMNS, PATCH_H, PATCH_W, F = patches_shape[1:]
    V = _VECTOR // np.dtype(dtype).itemsize
    A = CHANNELS - F
    VECTORS = BATCH * HEIGHT * WIDTH * CHANNELS // V

    # fmt: off
    @T.prim_func
    def function(
        other: T.Buffer((BATCH, HEIGHT, WIDTH, A), dtype),
        patches: T.Buffer(patches_shape, dtype),
        bias: T.Buffer((F,), dtype),
        y: T.Buffer(shape, dtype),
    ):
        T.device_entry()
        block = T.cta_id([(VECTORS + _THREADS - 1) // _THREADS])
        thread = T.thread_id([_THREADS])
        other_flat = T.decl_buffer((BATCH * HEIGHT * WIDTH * A,), dtype, data=other.data)
        patches_flat = T.decl_buffer((BATCH * HEIGHT * WIDTH * F,), dtype, data=patches.data)
        y_flat = T.decl_buffer((BATCH * HEIGHT * WIDTH * CHANNELS,), dtype, data=y.data)
        held = T.alloc_local((V,), dtype)
        shift = T.alloc_local((V,), dtype)
        number: T.let = block * _THREADS + thread
        if number < VECTORS:
            pixel: T.let = number // (CHANNELS // V)
            channel: T.let = number % (CHANNELS // V) * V
            if channel < A:
                for e in T.vectorized(V):
                    held[e] = other_flat[pixel * A + channel + e]
            else:
                column: T.let = pixel % WIDTH
                row: T.let = pixel // WIDTH % HEIGHT
                patch: T.let = (
                    pixel // (WIDTH * HEIGHT) * ROWS + row // PATCH_H) * COLUMNS + column // PATCH_W
                within: T.let = row % PATCH_H * PATCH_W + column % PATCH_W
                start: T.let = (patch * (PATCH_H * PATCH_W) + within) * F + channel - A
                for e in T.vectorized(V):
                    held[e] = patches_flat[start + e]
                for e in T.vectorized(V):
                    shift[e] = bias[channel - A + e]
                for e in T.unroll(V):
                    held[e] = T.Cast(
                        dtype, T.Cast("float32", held[e]) + T.Cast("float32", shift[e]))
            for e in T.vectorized(V):
                y_flat[number * V + e] = held[e]
    # fmt: on
    return function
