"""`cuda_depthwise` for NCHW, in TIRx: a block has rows of planes, which are runs of memory.

A block's inputs are contiguous in memory, and its outputs too: whole planes of neighbouring groups,
or a band of rows of one plane. They come and go in vectors of 16 bytes through shared memory,
whatever the width of a row; the first and the last vector may hold a neighbour's elements.
"""

# The bodies below are parsed as TIRx: their names are variables of the kernel, not of Python.
# ruff: noqa: B023

from tvm import tirx
from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish
from ..problem import ConvProblem
from .base import ALIGNMENT
from .cuda_depthwise_sums import Sums
from .cuda_depthwise_tiles import WIDE, Bands, Config, Geometry


def convolve(problem: ConvProblem, config: Config, epilogue: Epilogue):
    """x, packed filter (and bias, residual) -> y."""
    g, c = Geometry(problem, config), config
    b = Bands(g)
    h, w, DTYPE = g.h, g.w, problem.dtype
    THREADS, WIDTH = c.threads, g.wide
    PLANE_IN, PLANE_OUT = h.inputs * w.inputs, h.outputs * w.outputs
    TILES_H, TILES_W = h.tiles(b.rows), w.tiles()
    PLANES = b.groups * g.group_out  # of outputs, in a block
    UNITS = PLANES * TILES_H * TILES_W
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
        block = T.cta_id([b.blocks])
        thread = T.thread_id([THREADS])
        x_flat = T.decl_buffer((g.inputs,), DTYPE, data=x.data)
        packed_flat = T.decl_buffer(
            (g.group_in * g.taps * g.out_channels,), "float32", data=packed.data)
        y_flat = T.decl_buffer((g.outputs,), DTYPE, data=y.data)
        if RESIDUAL:
            residual_flat = T.decl_buffer((g.outputs,), DTYPE, data=residual.data)
        else:
            residual_flat = T.meta_var(None)
        pool = T.SMEMPool()
        inputs = pool.alloc((b.runs_in * b.vectors_in * WIDTH,), DTYPE, align=16)
        outputs = pool.alloc((b.runs_out * b.vectors_out * WIDTH,), DTYPE, align=16)
        pool.commit()

        # 1. Groups of this block, counted over all images; its rows of outputs, and of inputs.
        group: T.let = block // b.bands * b.groups
        row_out: T.let = block % b.bands * b.rows
        row_in: T.let = T.max(h.input_of(row_out), 0) if b.banded else 0
        last_in: T.let = (
            T.min(h.input_of(row_out) + b.reach, h.inputs) if b.banded else h.inputs)
        start_in: T.let = group * (g.group_in * PLANE_IN) + row_in * w.inputs
        start_out: T.let = group * (g.group_out * PLANE_OUT) + row_out * w.outputs
        rows_out: T.let = T.min(b.rows, h.outputs - row_out) if b.banded else h.outputs
        groups: T.let = T.min(b.groups, g.batch * g.groups - group)

        # 2. Runs of the input, in vectors from the one on that holds the first element.
        length_in: T.let = (
            (last_in - row_in) * w.inputs if b.banded else groups * (g.group_in * PLANE_IN))
        for run in T.serial(b.runs_in):
            for k in T.serial(-(-b.vectors_in // THREADS)):
                at: T.let = k * THREADS + thread
                first: T.let = start_in + run * PLANE_IN
                vector: T.let = first // WIDTH + at
                into = T.meta_var((run * b.vectors_in + at) * WIDTH)
                # The last vector of x may be shorter, and what is behind it another's.
                if vector * WIDTH < T.min(first + length_in, g.inputs // WIDTH * WIDTH):
                    T.ptx["cp.async.cg.shared.global"](
                        inputs.ptr_to([into]), x_flat.ptr_to([vector * WIDTH]), 16)
                elif vector * WIDTH < first + length_in:
                    for e in T.unroll(g.inputs % WIDTH):
                        inputs[into + e] = x_flat[vector * WIDTH + e]
        T.ptx["cp.async.commit_group"]()
        T.ptx["cp.async.wait_group"](0)
        # All inputs are there, those that others have copied too.
        T.cuda.cta_sync()

        # 3. Outputs: neighbouring threads have neighbouring columns, then rows, then planes.
        for turn in T.serial(-(-UNITS // THREADS)):
            unit: T.let = turn * THREADS + thread
            tile_w: T.let = unit % TILES_W
            tile_h: T.let = unit // TILES_W % TILES_H
            plane: T.let = unit // (TILES_W * TILES_H)  # of the block's outputs
            if plane < groups * g.group_out:
                o: T.let = (group * g.group_out + plane) % g.out_channels
                first_row: T.let = h.input_of(row_out + h.first(tile_h))
                first_column: T.let = w.input_of(w.first(tile_w))
                sums = Sums(g, packed_flat, g.out_channels)
                sums.clear()

                @T.inline
                def load_line(r, i):
                    # Row r of what the thread reads, zeros beyond the input.
                    source = T.meta_var(
                        i * (b.vectors_in * WIDTH) + (start_in + i * PLANE_IN) % WIDTH
                        if b.banded else
                        start_in % WIDTH + (plane // g.group_out * g.group_in + i) * PLANE_IN)
                    row = T.meta_var(first_row + r * h.step)
                    for j in T.unroll(w.reads):
                        column = T.meta_var(first_column + j * w.step)
                        sums.line[j] = T.float32(0)
                        if T.And(T.And(row >= 0, row < last_in),
                                 T.And(column >= 0, column < w.inputs)):
                            sums.line[j] = T.Cast("float32", inputs[
                                source + (row - row_in) * w.inputs + column])

                for i in T.serial(g.group_in):
                    tap: T.let = i * (g.taps * g.out_channels) + o
                    sums.load_filter(tap)
                    if c.resident:
                        for r in T.unroll(h.reads):
                            load_line(r, i)
                            sums.add_line(r, tap)
                    else:
                        for r in T.serial(h.reads):
                            load_line(r, i)
                            sums.add_line(r, tap)

                into: T.let = (
                    plane * (b.vectors_out * WIDTH) + (start_out + plane * PLANE_OUT) % WIDTH
                    if b.banded else start_out % WIDTH + plane * PLANE_OUT)
                for i in T.unroll(c.rows):
                    for j in T.unroll(c.columns):
                        row: T.let = h.first(tile_h) + i * h.classes
                        column: T.let = w.first(tile_w) + j * w.classes
                        if T.And(row < rows_out, column < w.outputs):
                            at: T.let = row * w.outputs + column
                            outputs[into + at] = finish(
                                sums.total[sums.at(i, j, 0)], o,
                                [start_out + plane * PLANE_OUT + at],
                                problem, epilogue, bias, residual_flat)
        # All outputs are in shared memory.
        T.cuda.cta_sync()

        # 4. Runs of the output; where they begin or end within a vector, element by element.
        length_out: T.let = (
            rows_out * w.outputs if b.banded else groups * (g.group_out * PLANE_OUT))
        for run in T.serial(b.runs_out):
            for k in T.serial(-(-b.vectors_out // THREADS)):
                at: T.let = k * THREADS + thread
                first: T.let = start_out + run * PLANE_OUT
                vector: T.let = first // WIDTH + at
                if T.And(vector * WIDTH >= first, vector * WIDTH + WIDTH <= first + length_out):
                    for e in T.vectorized(WIDTH):
                        y_flat[vector * WIDTH + e] = outputs[(run * b.vectors_out + at) * WIDTH + e]
                else:
                    for e in T.unroll(WIDTH):
                        if T.And(vector * WIDTH + e >= first,
                                 vector * WIDTH + e < first + length_out):
                            y_flat[vector * WIDTH + e] = outputs[
                                (run * b.vectors_out + at) * WIDTH + e]
    # fmt: on

    unused = ("" if epilogue.bias else "bias", "" if RESIDUAL else "residual")
    parameters = [p for p in function.params if p.name not in unused]
    function = tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)
    return function.with_attr(ALIGNMENT, {"x": WIDE, "y": WIDE})
