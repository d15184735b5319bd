"""Layer normalisation over channels on a GPU: some lanes of a warp for a row.

TVM's rules give a row to a block: seven times the time of moving the data, for the 96 channels with
which ConvNeXt begins.
"""

# The body below is parsed as TIRx: its names are variables of the kernel, not of Python.

import math

import numpy as np
import tvm
from tvm import relax
from tvm.script import tirx as T

from .passes import as_scheduled, extents, rewritten

__all__ = ["NormaliseByRows"]

_THREADS, _WARP = 256, 32
# Bytes of a thread's load, the most that one instruction takes, and how many loads a thread holds.
_VECTOR, _HELD = 16, 8


@tvm.transform.module_pass(opt_level=0, name="NormaliseByRows")
class NormaliseByRows:
    """`layer_norm` over the last axis, of known shape, as calls of such functions."""

    @staticmethod
    def transform_module(module: tvm.IRModule, _context) -> tvm.IRModule:
        return rewritten(module, _Mutator)


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):
    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.nn.layer_norm":
            return call
        attributes, dtypes = call.attrs, {str(each.ty.dtype) for each in call.args}
        shape = extents(call)
        if shape is None:
            return call
        last = [int(axis) % len(shape) for axis in attributes.axes] == [len(shape) - 1]
        if not last or not attributes.center or not attributes.scale or len(dtypes) > 1:
            return call
        few = math.prod(shape) < 2**31  # offsets are 32 bits wide
        if few and dtypes & {"float16", "float32"} and lanes(shape[-1], *dtypes) is not None:
            function = normalise(shape, *dtypes, float(attributes.epsilon))
            variable = self.builder_.add_func(as_scheduled(function), "im2win_layer_norm")
            return relax.call_tir(variable, list(call.args), call.ty)
        return call


def lanes(channels: int, dtype: str) -> int | None:
    """Of a warp, how many divide a row; None where they do not, or would hold too much."""
    vector = _VECTOR // np.dtype(dtype).itemsize
    if channels % vector:
        return None
    found = math.gcd(channels // vector, _WARP)
    return found if channels // vector <= _HELD * found else None


def normalise(shape, dtype: str, epsilon: float):
    """x, gamma, beta -> y, in float32."""
    CHANNELS, ROWS = shape[-1], math.prod(shape[:-1])
    V = _VECTOR // np.dtype(dtype).itemsize
    LANES = lanes(CHANNELS, dtype)
    LOADS = CHANNELS // V // LANES
    STEPS = LANES.bit_length() - 1

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(shape, dtype),
        gamma: T.Buffer((CHANNELS,), dtype),
        beta: T.Buffer((CHANNELS,), dtype),
        y: T.Buffer(shape, dtype),
    ):
        T.device_entry()
        block = T.cta_id([(ROWS * LANES + _THREADS - 1) // _THREADS])
        thread = T.thread_id([_THREADS])
        x_flat = T.decl_buffer((ROWS * CHANNELS,), dtype, data=x.data)
        y_flat = T.decl_buffer((ROWS * CHANNELS,), dtype, data=y.data)
        held = T.alloc_local((LOADS * V,), dtype)
        scale = T.alloc_local((V,), dtype)
        shift = T.alloc_local((V,), dtype)
        row: T.let = (block * _THREADS + thread) // LANES
        lane: T.let = thread % LANES
        # All lanes take part in the exchange of sums, those of no row with the last one.
        start: T.let = T.min(row, ROWS - 1) * CHANNELS
        for i in T.unroll(LOADS):
            for e in T.vectorized(V):
                held[i * V + e] = x_flat[start + (i * LANES + lane) * V + e]
        mean: T.float32 = T.float32(0)
        for i in T.unroll(LOADS * V):
            mean = mean + T.Cast("float32", held[i])
        for i in T.unroll(STEPS):
            mean = mean + T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), mean, 1 << i, 32, 32)
        mean = mean / T.float32(CHANNELS)
        spread: T.float32 = T.float32(0)
        for i in T.unroll(LOADS * V):
            apart: T.let = T.Cast("float32", held[i]) - mean
            spread = spread + apart * apart
        for i in T.unroll(STEPS):
            spread = spread + T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), spread, 1 << i, 32, 32)
        factor: T.let = T.rsqrt(spread / T.float32(CHANNELS) + T.float32(epsilon))
        if row < ROWS:
            for i in T.unroll(LOADS):
                channel: T.let = (i * LANES + lane) * V
                for e in T.vectorized(V):
                    scale[e] = gamma[channel + e]
                for e in T.vectorized(V):
                    shift[e] = beta[channel + e]
                for e in T.unroll(V):
                    held[i * V + e] = T.Cast(dtype, (
                        (T.Cast("float32", held[i * V + e]) - mean) * factor
                        * T.Cast("float32", scale[e]) + T.Cast("float32", shift[e])))
                for e in T.vectorized(V):
                    y_flat[start + channel + e] = held[i * V + e]
    # fmt: on
    return function
