"""The filter of `cuda_window`: tiles as wgmma reads them in shared memory, in the order of use."""

from tvm import te, tirx

from ..problem import ConvProblem
from .cuda_elementwise import elementwise
from .cuda_window_tiles import Config, Geometry
from .hopper import ATOM_ROWS, ROW_BYTES


def prepare(problem: ConvProblem, config: Config, whole: ConvProblem):
    """w -> packed, see `packed_tiles`. Runs once.

    problem: as the kernel walks through it; whole: as w is shaped. Where columns of the window are
    channels to the kernel, these are the columns' channels one after the other.
    A tile holds a row of input channels of one tap for block_m output channels; tiles are in order
    of output channels (groups outermost), then of input channels, then of taps as `Geometry.order`
    has them. The 16-byte chunks of a row are exchanged by the row's number among eight; channels
    beyond a group's are zeros.
    """
    g = Geometry(problem, config)
    chunk = 16 // problem.itemsize
    taps, inputs = len(g.order), problem.in_channels // problem.groups
    w = te.placeholder(whole.weight_shape, problem.dtype, name="w")
    columns_are_channels = problem.kernel_size != whole.kernel_size

    def element(tile, row, place, held):
        block, k_tile = tile // g.filter_tiles, tile % g.filter_tiles
        o = block % g.m_tiles * config.block_m + channel_of_row(g, row)
        c = k_tile // taps * g.row_channels + (place ^ (row % ATOM_ROWS)) * chunk + held
        inside = tirx.all(o < g.per_group, c < inputs)
        u, v = _tap(g, k_tile % taps)
        if columns_are_channels:
            c, v = c % whole.in_channels, c // whole.in_channels
        value = w[block // g.m_tiles * g.per_group + o, c, u, v]
        if problem.dtype == "float32":
            value = _rounded(value)
        return tirx.if_then_else(inside, value, tirx.const(0, problem.dtype))

    packed = te.compute(packed_tiles(g), element, name="packed")
    return elementwise([w, packed], "packed")


def packed_tiles(g: Geometry) -> tuple[int, ...]:
    """``[tiles, block_m rows, 8 chunks of 16 bytes, elements]``."""
    tiles = g.groups * g.m_tiles * g.filter_tiles
    chunk = 16 // g.problem.itemsize
    return tiles, g.config.block_m, ROW_BYTES // 16, chunk


def channel_of_row(g: Geometry, row):
    """The output channel of a row of a tile; see `cuda_window_store` for why they may differ."""
    if g.staged:
        return row
    return row // 16 * 16 + row % 8 * 2 + row % 16 // 8


def _tap(g: Geometry, index):
    """Row and column of a tap by its place in the order."""
    if g.class_h == g.class_w == 1:
        return index // g.taps_w, index % g.taps_w
    u = v = tirx.const(0, "int32")
    for place, (row, column) in enumerate(g.order):
        u = tirx.Select(index == place, row, u)
        v = tirx.Select(index == place, column, v)
    return u, v


def _rounded(value):
    """To the 10 bits that tf32 keeps, halves away from zero; Inf and NaN as they are."""
    bits = tirx.reinterpret("uint32", value)
    kept = (bits + tirx.const(1 << 12, "uint32")) & tirx.const(0xFFFFE000, "uint32")
    special = (bits & tirx.const(0x7F800000, "uint32")) == tirx.const(0x7F800000, "uint32")
    return tirx.if_then_else(special, value, tirx.reinterpret("float32", kept))
