"""The filter of `cuda_thin_fp32`: images of shared memory of its halves, and their scales."""

# The body below is parsed as TIRx: its names are variables of the kernel, not of Python.

import math

from tvm.script import tirx as T

from ..problem import ConvProblem
from .cuda_thin_filter import channel_of_row
from .cuda_thin_fp32_split import Halves
from .cuda_thin_fp32_tiles import ROW_HALVES, SplitGeometry, word_of
from .cuda_thin_tiles import Config
from .cuda_window_fp32_split import exponent, inverse, magnitude, scale
from .hopper import ROW_BYTES

_THREADS = 32
_INFINITY = 0x7F800000
ROW_WORDS = ROW_BYTES // 4


def packed_shape(g: SplitGeometry) -> tuple[int, int]:
    """``[tiles of block_n, words]``: of each tile an image for each half, then block_n scales.

    An image is ``[rows of 128 bytes of K, block_n, 32 words]``.
    """
    return g.n_tiles, g.filter_bytes // 4


def prepare(problem: ConvProblem, config: Config):
    """w -> packed, see `packed_shape`. Runs once, a thread for each output channel.

    A channel has one scale. K is that of `word_of`; the 16-byte chunks of a row are exchanged by
    its number among eight; channels and words that are not there are zeros.
    """
    g, BLOCK_N = SplitGeometry(problem, config), config.block_n
    TILES, WORDS = packed_shape(g)
    CHANNELS, TAPS_H, TAPS_W = g.in_channels, g.taps_h, g.taps_w
    WEIGHTS, IMAGE = math.prod(problem.weight_shape), g.image_bytes // 4

    def offset(word):
        """Of a word of K in one output channel's weights."""
        u, at = word // g.row_words, word % g.row_words
        return (at % CHANNELS * TAPS_H + u) * TAPS_W + at // CHANNELS

    # fmt: off
    @T.prim_func
    def function(
        w: T.Buffer(problem.weight_shape, "float32"),
        packed: T.Buffer((TILES, WORDS), "float32"),
    ):
        T.device_entry()
        block = T.cta_id([(TILES * BLOCK_N + _THREADS - 1) // _THREADS])
        thread = T.thread_id([_THREADS])
        w_flat = T.decl_buffer((WEIGHTS,), "float32", data=w.data)
        floats = T.decl_buffer((TILES * WORDS,), "float32", data=packed.data)
        words = T.decl_buffer((TILES * WORDS,), "uint32", data=packed.data)
        value = T.alloc_local((2,), "float32")
        halves = Halves(g.halves)
        number: T.let = block * _THREADS + thread
        if number < TILES * BLOCK_N:
            tile: T.let = number // BLOCK_N
            column: T.let = number % BLOCK_N
            channel: T.let = tile * BLOCK_N + channel_of_row(g, column)
            top: T.float32 = T.float32(0)
            for i in T.serial(problem.k):
                if channel < g.out_channels:
                    value[0] = w_flat[channel * problem.k + i]
                    if magnitude(value[0]) < T.uint32(_INFINITY):
                        top = T.max(top, T.fabs(value[0]))
            e2: T.let = exponent(T.reinterpret("uint32", top))
            for chunk_row in T.serial(g.k_chunks):
                begin: T.let = tile * WORDS + (chunk_row * BLOCK_N + column) * ROW_WORDS
                for i in T.serial(ROW_WORDS):
                    for e in T.unroll(2):
                        word: T.let = word_of(chunk_row * ROW_HALVES + i * 2 + e)
                        value[e] = T.float32(0)
                        if T.And(channel < g.out_channels, word < g.k_words):
                            value[e] = w_flat[channel * problem.k + offset(word)]
                    halves.split(value[0] * inverse(e2), value[1] * inverse(e2))
                    at: T.let = begin + T.bitwise_xor(i // 4, column % 8) * 4 + i % 4
                    for half in T.unroll(g.halves):
                        words[at + half * IMAGE] = halves.word[half]
            floats[tile * WORDS + g.halves * IMAGE + column] = scale(e2)
    # fmt: on
    return function
