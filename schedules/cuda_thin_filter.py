"""The filter of `cuda_thin`: an image of shared memory, in the order of K of a window."""

from tvm import te, tirx

from ..problem import ConvProblem
from .cuda_elementwise import elementwise
from .cuda_thin_tiles import Config, Geometry
from .cuda_thin_window import word_of
from .hopper import ATOM_ROWS, ROW_BYTES


def prepare(problem: ConvProblem, config: Config):
    """w -> packed, see `packed_filter`. Runs once.

    K is that of `cuda_thin_window`. The 16-byte chunks of a row are exchanged by the row's number
    among eight; channels, columns and words that are not there are zeros.
    """
    g = Geometry(problem, config)
    chunk = 16 // problem.itemsize
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")

    def element(tile, k_row, row, place, held):
        k = (k_row * (ROW_BYTES // 16) + (place ^ (row % ATOM_ROWS))) * chunk + held
        word, of_word = k // g.per_word, k % g.per_word
        u, word = word_of(g, word)
        at = word * g.per_word + of_word
        v, c = at // config.channels, at % config.channels
        o = tile * config.block_n + channel_of_row(g, row)
        value = w[o, c, u, v]
        if problem.dtype == "float32":
            value = tirx.reinterpret("float32", rounded(tirx.reinterpret("uint32", value)))
        there = tirx.all(u < g.taps_h, v < g.taps_w, c < g.in_channels, o < g.out_channels)
        return tirx.if_then_else(there, value, tirx.const(0, problem.dtype))

    packed = te.compute(packed_filter(g), element, name="packed")
    return elementwise([w, packed], "packed")


def packed_filter(g: Geometry) -> tuple[int, ...]:
    """``[tiles of block_n, rows of 128 bytes of K, block_n, 8 chunks of 16 bytes, elements]``."""
    return g.n_tiles, g.k_chunks, g.config.block_n, ROW_BYTES // 16, 16 // g.problem.itemsize


def runs(g: Geometry) -> list[tuple[int, int]]:
    """First eight of columns, and number of eights, in which a thread has a run of channels.

    In NHWC a run is 16 bytes, of four eights of two-byte outputs; the last one may be shorter.
    """
    eights = g.config.block_n // 8
    each = 8 // g.problem.itemsize if g.problem.channels_last else 1
    return [(first, min(each, eights - first)) for first in range(0, eights, each)]


def channel_of_row(g: Geometry, row):
    """The output channel of a column of the product.

    A thread holds two neighbouring columns of every eight: those of a run of eights are made
    neighbouring channels of it.
    """
    eights = g.config.block_n // 8
    each = min(8 // g.problem.itemsize, eights) if g.problem.channels_last else 1
    first = row // 8 // each * each
    count = tirx.min(each, eights - first) if eights % each else each
    return first * 8 + row % 8 // 2 * 2 * count + (row // 8 - first) * 2 + row % 2


def rounded(bits):
    """The bits of a float32 to the 10 of its fraction that tf32 keeps, halves away from zero.

    Infinity stays, and a NaN stays one without its lower bits.
    """
    magnitude, infinity = bits & tirx.const(0x7FFFFFFF, "uint32"), tirx.const(0x7F800000, "uint32")
    kept = (bits + tirx.const(1 << 12, "uint32")) & tirx.const(0xFFFFE000, "uint32")
    special = tirx.Select(magnitude > infinity, bits | tirx.const(1 << 22, "uint32"), bits)
    return tirx.Select(magnitude < infinity, kept, special)
