"""What tensor cores read where x is not NHWC in whole vectors of channels: a copy that is.

A vector is 16 bytes: eights of channels of 16 bits, fours of 32.
"""

import math

from tvm import te, tirx
from tvm.script import tirx as T

from ..problem import ConvProblem
from .cuda_elementwise import elementwise

VECTOR_BYTES = 16
# Pixels and channels of a tile: a row of either is whole 128-byte lines.
TILE = 64
THREADS = 256


def padded_channels(problem: ConvProblem) -> int:
    """Input channels of a group, in whole vectors."""
    vector = VECTOR_BYTES // problem.itemsize
    return -(-problem.in_channels // problem.groups // vector) * vector


def shape(problem: ConvProblem) -> tuple[int, ...]:
    """Of the copy: ``[N, H, W, G * whole vectors]``."""
    return (problem.batch, *problem.input_size, problem.groups * padded_channels(problem))


def is_needed(problem: ConvProblem) -> bool:
    """Whether the kernel cannot read x itself."""
    return not problem.channels_last or shape(problem) != problem.input_shape


def copy_channels_last(problem: ConvProblem):
    """x -> nhwc, zeros in the channels that fill up each group."""
    return _transpose(problem) if not problem.channels_last else _fill_up(problem)


def _fill_up(problem: ConvProblem):
    x = te.placeholder(problem.input_shape, problem.dtype, name="x")
    channels, padded = problem.in_channels // problem.groups, padded_channels(problem)

    def element(n, h, w, c):
        inside = c % padded < channels
        source = x[n, h, w, c // padded * channels + c % padded]
        return tirx.if_then_else(inside, source, tirx.const(0, problem.dtype))

    return elementwise([x, te.compute(shape(problem), element, name="nhwc")], "nhwc")


def _transpose(problem: ConvProblem):
    """Tiles of pixels by channels through shared memory: rows of either are read and written."""
    dtype, pixels = problem.dtype, math.prod(problem.input_size)
    channels, padded = problem.in_channels // problem.groups, padded_channels(problem)
    wide = problem.groups * padded
    P_TILES, C_TILES = -(-pixels // TILE), -(-wide // TILE)
    ROWS = THREADS // TILE  # channels that are read at a time
    PER_WORD = 4 // problem.itemsize
    # Words of a row of the tile in shared memory: odd, so that a column falls on all banks.
    PITCH = TILE // PER_WORD + 1
    CHUNK = VECTOR_BYTES // problem.itemsize
    CHUNKS = TILE // CHUNK
    NEXT_P = THREADS // CHUNKS

    # fmt: off
    @T.prim_func
    def function(
        x: T.Buffer(problem.input_shape, dtype),
        nhwc: T.Buffer(shape(problem), dtype),
    ):
        T.device_entry()
        block = T.cta_id([problem.batch * P_TILES * C_TILES])
        thread = T.thread_id([THREADS])
        x_flat = T.decl_buffer((math.prod(problem.input_shape),), dtype, data=x.data)
        words = T.decl_buffer((math.prod(shape(problem)) // PER_WORD,), "uint32", data=nhwc.data)
        pool = T.SMEMPool()
        tile = pool.alloc((TILE * PITCH * PER_WORD,), dtype, align=128)
        pool.commit()
        tile_words = T.decl_buffer((TILE * PITCH,), "uint32", data=tile.data)
        first_c: T.let = block % C_TILES * TILE
        first_p: T.let = block // C_TILES % P_TILES * TILE
        image: T.let = block // (C_TILES * P_TILES)

        # 1. Neighbouring threads read neighbouring pixels of one channel.
        pixel: T.let = first_p + thread % TILE
        for i in T.unroll(TILE // ROWS):
            row: T.let = i * ROWS + thread // TILE
            c: T.let = first_c + row
            inside: T.let = T.And(T.And(c < wide, c % padded < channels), pixel < pixels)
            tile[thread % TILE * (PITCH * PER_WORD) + row] = T.if_then_else(
                inside,
                x_flat[(image * problem.in_channels + c // padded * channels + c % padded)
                       * pixels + pixel],
                T.Cast(dtype, T.float32(0)))
        T.cuda.cta_sync()

        # 2. Neighbouring threads write neighbouring eights of channels of one pixel.
        out = T.alloc_local((4,), "uint32")
        for i in T.unroll(TILE // NEXT_P):
            p: T.let = i * NEXT_P + thread // CHUNKS
            chunk: T.let = thread % CHUNKS
            if T.And(first_p + p < pixels, first_c + chunk * CHUNK < wide):
                for e in T.unroll(4):
                    out[e] = tile_words[p * PITCH + chunk * 4 + e]
                for e in T.vectorized(4):
                    words[((image * pixels + first_p + p) * wide + first_c) // PER_WORD
                          + chunk * 4 + e] = out[e]
    # fmt: on
    return function
