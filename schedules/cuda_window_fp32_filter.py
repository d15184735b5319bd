"""The filter of `cuda_window_fp32`: tiles of halves as wgmma reads them, and their scales."""

# The body below is parsed as TIRx: its names are variables of the kernel, not of Python.

import math

from tvm.script import tirx as T

from ..problem import ConvProblem
from .cuda_window_filter import _tap, channel_of_row
from .cuda_window_fp32_split import CHUNK, Halves, exponent, inverse, magnitude, mend, scale
from .cuda_window_fp32_tiles import ROW_CHANNELS, Config, SplitGeometry

_THREADS = 128
_INFINITY = 0x7F800000


def packed_shape(g: SplitGeometry) -> tuple[int, int]:
    """``[tiles, words]``: of each tile block_m rows of 32 words, then block_m scales."""
    tiles = g.groups * g.m_tiles * g.filter_tiles
    return tiles, g.config.block_m * (ROW_CHANNELS + 1)


def prepare(problem: ConvProblem, config: Config):
    """w -> packed, see `packed_shape`. Runs once, a thread for each row of a tile.

    Tiles are in the order of `cuda_window_filter`. A row holds 32 input channels of one tap for one
    output channel, split as `Splitter` splits pixels: 32 high and 32 low halves, the 16-byte chunks
    exchanged by the row's number among eight. Channels beyond a group's are zeros.
    """
    g, BM = SplitGeometry(problem, config), config.block_m
    TILES, WORDS = packed_shape(g)
    ROWS = TILES * BM
    TAPS, INPUTS = len(g.order), problem.in_channels // problem.groups
    WEIGHTS = math.prod(problem.weight_shape)

    # fmt: off
    @T.prim_func
    def function(
        w: T.Buffer(problem.weight_shape, "float32"),
        packed: T.Buffer((TILES, WORDS), "float32"),
    ):
        T.device_entry()
        block = T.cta_id([(ROWS + _THREADS - 1) // _THREADS])
        thread = T.thread_id([_THREADS])
        w_flat = T.decl_buffer((WEIGHTS,), "float32", data=w.data)
        floats = T.decl_buffer((TILES * WORDS,), "float32", data=packed.data)
        words = T.decl_buffer((TILES * WORDS,), "uint32", data=packed.data)
        halfs = T.decl_buffer((2 * TILES * WORDS,), "uint16", data=packed.data)
        value = T.alloc_local((2,), "float32")
        halves = Halves()
        number: T.let = block * _THREADS + thread
        if number < ROWS:
            tile: T.let = number // BM
            row: T.let = number % BM
            within: T.let = tile // g.filter_tiles % g.m_tiles * BM + channel_of_row(g, row)
            group: T.let = tile // g.filter_tiles // g.m_tiles
            k_tile: T.let = tile % g.filter_tiles
            first_c: T.let = k_tile // TAPS * ROW_CHANNELS
            u, v = T.meta_var(_tap(g, k_tile % TAPS))
            # Of channel 0; the next ones are a window apart.
            start: T.let = ((group * g.per_group + within) * INPUTS * g.taps_h + u) * g.taps_w + v
            top: T.float32 = T.float32(0)
            for i in T.serial(ROW_CHANNELS):
                if T.And(within < g.per_group, first_c + i < INPUTS):
                    value[0] = w_flat[start + (first_c + i) * (g.taps_h * g.taps_w)]
                    if magnitude(value[0]) < T.uint32(_INFINITY):
                        top = T.max(top, T.fabs(value[0]))
            e2: T.let = exponent(T.reinterpret("uint32", top))
            begin: T.let = tile * WORDS + row * ROW_CHANNELS
            for i in T.serial(ROW_CHANNELS // 2):
                for e in T.unroll(2):
                    value[e] = T.float32(0)
                    if T.And(within < g.per_group, first_c + i * 2 + e < INPUTS):
                        value[e] = w_flat[start + (first_c + i * 2 + e) * (g.taps_h * g.taps_w)]
                halves.split(value[0] * inverse(e2), value[1] * inverse(e2))
                chunk: T.let = i // 4
                words[begin + T.bitwise_xor(chunk, row % 8) * 4 + i % 4] = halves.high
                words[begin + T.bitwise_xor(chunk + 4, row % 8) * 4 + i % 4] = halves.low
                for e in T.unroll(2):
                    mend(halfs, (begin + T.bitwise_xor(chunk, row % 8) * 4) * 2 + i * 2 % CHUNK + e,
                         (begin + T.bitwise_xor(chunk + 4, row % 8) * 4) * 2 + i * 2 % CHUNK + e)
            floats[tile * WORDS + BM * ROW_CHANNELS + row] = scale(e2)
    # fmt: on
    return function
