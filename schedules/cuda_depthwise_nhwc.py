"""`cuda_depthwise` for NHWC, in TIRx: a thread has a vector of channels, its neighbours the next.

No shared memory and no barrier: what neighbouring threads read twice comes from the L1 cache.
"""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.

from tvm import tirx
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_depthwise_sums import Sums
from .cuda_depthwise_tiles import Config, Geometry


def units(g: Geometry) -> int:
    """Threads with outputs: tiles of outputs by vectors of channels."""
    return g.batch * g.h.tiles() * g.w.tiles() * (g.out_channels // g.config.vector)


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """x, packed filter (and bias, residual) -> y."""
    g, c = Geometry(problem, config), config
    h, w, DTYPE = g.h, g.w, problem.dtype
    V, THREADS, UNITS = c.vector, c.threads, units(g)
    VECTORS, TILES_H, TILES_W = g.out_channels // V, h.tiles(), w.tiles()
    XV = V if g.depthwise else 1  # channels of x in one load
    PIXEL = g.in_channels // XV  # from pixel to pixel of x, in loads
    TAP = g.out_channels
    RESIDUAL = epilogue.residual

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(problem.input_shape, DTYPE),
        packed: T.Buffer((g.group_in, g.taps, g.out_channels), "float32"),
        bias: T.Buffer((g.out_channels,), DTYPE),
        residual: T.Buffer(problem.output_shape, DTYPE),
        y: T.Buffer(problem.output_shape, DTYPE),
    ):
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": c.blocks})
        block = T.cta_id([-(-UNITS // THREADS)])
        thread = T.thread_id([THREADS])
        x_flat = T.decl_buffer((g.inputs,), DTYPE, data=x.data)
        packed_flat = T.decl_buffer(
            (g.group_in * g.taps * g.out_channels,), "float32", data=packed.data)
        y_flat = T.decl_buffer((g.outputs,), DTYPE, data=y.data)
        if RESIDUAL:
            residual_flat = T.decl_buffer((g.outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)

        # 1. Which outputs: neighbouring threads have neighbouring channels, then columns.
        unit: T.let = block * THREADS + thread
        vector: T.let = unit % VECTORS
        tile_w: T.let = unit // VECTORS % TILES_W
        tile_h: T.let = unit // (VECTORS * TILES_W) % TILES_H
        image: T.let = unit // (VECTORS * TILES_W * TILES_H)
        if unit < UNITS:
            first_row: T.let = h.input_of(h.first(tile_h))
            first_column: T.let = w.input_of(w.first(tile_w))
            start: T.let = (image * (h.inputs * w.inputs)
                            + first_row * w.inputs + first_column) * PIXEL
            sums = Sums(g, packed_flat, TAP)
            sums.clear()
            held = T.alloc_local((w.reads * XV,), DTYPE)

            @T.inline
            def load_line(r, channel):
                # Row r of what the thread reads, zeros beyond the input.
                for j in T.unroll(w.reads):
                    for e in T.unroll(XV):
                        held[j * XV + e] = T.Cast(DTYPE, T.float32(0))
                    row = T.meta_var(first_row + r * h.step)
                    column = T.meta_var(first_column + j * w.step)
                    if T.And(T.And(row >= 0, row < h.inputs),
                             T.And(column >= 0, column < w.inputs)):
                        at = T.meta_var(
                            start + channel + (r * (h.step * w.inputs) + j * w.step) * PIXEL)
                        for e in T.vectorized(XV):
                            held[j * XV + e] = x_flat[at * XV + e]
                for i in T.unroll(w.reads * XV):
                    sums.line[i] = T.Cast("float32", held[i])

            # 2. Rows of the input pass by, those of one channel of the group after the other.
            for i in T.serial(g.group_in):
                channel: T.let = (
                    vector if g.depthwise else vector * V // g.group_out * g.group_in + i)
                tap: T.let = i * (g.taps * VECTORS) + vector
                sums.load_filter(tap)
                if c.resident:
                    for r in T.unroll(h.reads):
                        load_line(r, channel)
                        sums.add_line(r, tap)
                else:
                    for r in T.serial(h.reads):
                        load_line(r, channel)
                        sums.add_line(r, tap)

            # 3. Outputs, a vector of channels each.
            out = T.alloc_local((V,), DTYPE)
            extra = T.alloc_local((V,), DTYPE)
            for i in T.unroll(c.rows):
                for j in T.unroll(c.columns):
                    row: T.let = h.first(tile_h) + i * h.classes
                    column: T.let = w.first(tile_w) + j * w.classes
                    if T.And(row < h.outputs, column < w.outputs):
                        at: T.let = (
                            (image * h.outputs + row) * w.outputs + column) * VECTORS + vector
                        if RESIDUAL:
                            for e in T.vectorized(V):
                                extra[e] = residual_flat[at * V + e]
                        for e in T.unroll(V):
                            out[e] = finish(sums.total[sums.at(i, j, e)], vector * V + e, [e],
                                            problem, epilogue, bias, extra)
                        for e in T.vectorized(V):
                            y_flat[at * V + e] = out[e]
    # fmt: on

    unused = ("" if epilogue.bias else "bias", "" if RESIDUAL else "residual")
    parameters = [p for p in function.params if p.name not in unused]
    function = tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)
    size = problem.itemsize
    return function.with_attr(ALIGNMENT, {"x": XV * size, "y": V * size, "residual": V * size})
