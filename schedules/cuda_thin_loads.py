"""How a warpgroup of `cuda_thin` brings one input row from memory to the ring.

`Elements` copies one at a time, from any layout to any place.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .cuda_thin_filter import rounded
from .cuda_thin_tiles import LOADS, Geometry
from .hopper import WARPGROUP

WARPS = WARPGROUP // 32


@T.meta_class
class Elements:
    """A thread's elements of the rows of a stage, in one of two buffers of registers.

    parts: in which a row is copied, one after the other, if it is too long for a buffer.
    """

    def __init__(self, geometry: Geometry, ring, x, thread):
        g = self.geometry = geometry
        self.x, self.thread = x, thread
        self.bits = "uint16" if g.problem.itemsize == 2 else "uint32"
        # A view from the start of all shared memory, hence the offset.
        self.ring = T.decl_buffer(
            (g.ring_bytes // g.problem.itemsize,), self.bits, data=ring.data,
            elem_offset=ring.elem_offset * g.per_word)
        # Elements of a row in memory that neighbouring threads take, channel by channel in NCHW.
        self.last = g.problem.channels_last
        self.run = g.input_columns * (g.in_channels if self.last else 1)
        self.turns = g.row_loads if self.last else g.row_loads // g.in_channels
        self.parts = -(-g.row_loads // LOADS)
        self.count = g.row_loads if self.parts == 1 else LOADS
        self.each = g.config.rows * self.count
        self.held = T.alloc_local((2 * self.each,), self.bits)

    def element(self, number):
        """Of a row's loads by this thread: offset in x, place in the ring's row, is there one."""
        g = self.geometry
        channels = g.config.channels
        within = number % self.turns * WARPGROUP + self.thread
        if self.last:
            column, c, offset = within // g.in_channels, within % g.in_channels, within
        else:
            column, c = within, number // self.turns
            offset = c * (g.height * g.width) + column
        exists = T.And(within < self.run, number < g.row_loads)
        if self.last and channels == g.in_channels and g.classes == 1:
            return offset, within + g.left * channels, exists
        column = column + g.left
        words = g.class_words + g.copies - 1
        place = column % g.classes * (words * g.per_word) + column // g.classes * channels + c
        return offset, place, exists

    @T.inline
    def load(self, buffer, i, part, begin, inside):
        """A part of the stage's row i, which begins at `begin` of x; else padding: zeros."""
        for j in T.unroll(self.count):
            offset, _place, exists = T.meta_var(self.element(part * LOADS + j))
            self.held[buffer * self.each + i * self.count + j] = T.if_then_else(
                T.And(inside, exists), self.x[begin + offset], T.Cast(self.bits, 0))

    @T.inline
    def store(self, buffer, i, part, slot):
        """What was loaded of row i, into a row of the ring, and where that is mirrored."""
        g = T.meta_var(self.geometry)
        start: T.let = slot * (g.pitch * g.per_word)
        for j in T.unroll(self.count):
            _offset, place, exists = T.meta_var(self.element(part * LOADS + j))
            held_at = T.meta_var(buffer * self.each + i * self.count + j)
            if g.rounded:
                self.held[held_at] = rounded(self.held[held_at])
            value = T.meta_var(self.held[held_at])
            self.put(exists, slot, start + place, value)
            if g.copies == 2:
                # One element further: odd elements begin words.
                self.put(exists, slot, start + g.copy_words * 2 + 1 + place, value)

    @T.inline
    def put(self, exists, slot, at, value):
        g = T.meta_var(self.geometry)
        if exists:
            self.ring[at] = value
        if g.mirrored > 0:
            if T.And(exists, slot < g.mirrored):
                self.ring[at + g.ring_rows * g.pitch * g.per_word] = value
