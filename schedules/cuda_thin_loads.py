"""How a warpgroup of `cuda_thin` brings one input row from memory to the ring.

`Elements` copies one at a time, from any layout to any place. `Words` copies two elements of two
bytes at a time, where a row lies in memory as it will in the ring: it may begin half a word off in
either, which the halves of neighbouring lanes' words make up for.
"""

# Bodies of inline functions are parsed as TIRx.

import math

from tvm.script import tirx as T

from .cuda_thin_filter import rounded
from .cuda_thin_tiles import LOADS, STORING_LANES, Geometry
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
            if g.problem.dtype == "float32":
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


@T.meta_class
class Words:
    """A thread's words of the rows of a stage.

    The k-th word of the row in the ring is made of the words of memory that hold its elements: of
    one, or where they begin half a word off there, of the upper half of one and the lower half of
    the next. The second copy of a row is the other of the two.
    """

    def __init__(self, geometry: Geometry, ring, x, thread):
        g = self.geometry = geometry
        self.ring, self.x, self.thread = ring, x, thread
        self.elements = g.input_columns * g.in_channels
        self.total = math.prod(g.problem.input_shape)
        # Whether there is padding beside the row. If not, its neighbours in memory are where no
        # window is, or where it masks what it reads.
        self.padded = g.left > 0 or g.input_columns + g.left < g.read_columns
        # The row's first word in the ring, how many elements it has before the row's, and how many
        # words have some.
        self.first, self.before = divmod(g.left * g.config.channels, 2)
        self.words = -(-(self.elements + self.before) // 2)
        # The second copy's first word begins one element before.
        self.early = g.copies - 1
        self.parts = -(-g.row_loads // LOADS)
        self.count = g.row_loads if self.parts == 1 else LOADS
        self.each = g.config.rows * self.count
        self.held = T.alloc_local((2 * self.each,), "uint32")
        self.off = T.alloc_local((2,), "int32")  # a bit for each row
        address = T.reinterpret("uint64", x.ptr_to([0]))
        self.base = T.Cast("int32", T.bitwise_and(T.shift_right(address, T.uint64(1)), T.uint64(1)))
        self.split_ends = T.Or(self.base == 1, (self.base + self.total) % 2 == 1)

    def word(self, number):
        """Of a row's words the one of this thread's load of this number."""
        return (number * WARPS + self.thread // 32) * STORING_LANES + self.thread % 32 - self.early

    def at_an_end(self, number):
        """Whether a load of this number may reach beyond the row."""
        last = (number + 1) * (WARPS * STORING_LANES) + 2 > self.elements // 2
        return T.Or(number == 0, last)

    def kept(self, number, at):
        """The mask of a word: halves of the rows before and after would be padding here."""
        all_of_it = T.uint32(0xFFFFFFFF)
        low, high = T.And(at >= 0, at < self.elements), T.And(at >= -1, at < self.elements - 1)
        mask = T.bitwise_or(
            T.if_then_else(low, T.uint32(0xFFFF), T.uint32(0)),
            T.if_then_else(high, T.uint32(0xFFFF0000), T.uint32(0)))
        return T.if_then_else(self.at_an_end(number), mask, all_of_it)

    @T.inline
    def load(self, buffer, i, part, begin, inside):
        """A part of the stage's row i, which begins at `begin` of x; else padding: zeros."""
        # Whether words of memory begin an element before those of the ring.
        off: T.let = (self.base + begin + self.before) % 2
        self.off[buffer] = T.if_then_else(
            i == 0, off, T.bitwise_or(self.off[buffer], T.shift_left(off, i)))
        for j in T.unroll(self.count):
            number = T.meta_var(part * LOADS + j)
            held_at = T.meta_var(buffer * self.each + i * self.count + j)
            at: T.let = begin + self.word(number) * 2 - self.before - off
            # No branches: all loads of a stage are to be on their way together.
            exists: T.let = T.And(inside, T.Or(
                T.Not(self.at_an_end(number)), T.And(at >= 0, at < self.total - 1)))
            self.held[held_at] = T.uint32(0)
            T.ptx["ld.global.b32"](self.held[held_at], self.x.ptr_to([at]), pred=exists,
                                   preserve_dst=True)
        # Where the tensor begins or ends within a word, the other half may not be touched.
        if self.split_ends:
            if T.And(inside, T.Or(begin == 0, begin + self.elements == self.total)):
                for j in T.unroll(self.count):
                    held_at = T.meta_var(buffer * self.each + i * self.count + j)
                    at: T.let = begin + self.word(part * LOADS + j) * 2 - self.before - off
                    if at == -1:
                        self.held[held_at] = T.shift_left(
                            T.Cast("uint32", self.x[0]), T.uint32(16))
                    if at == self.total - 1:
                        self.held[held_at] = T.Cast("uint32", self.x[self.total - 1])

    @T.inline
    def store(self, buffer, i, part, slot):
        """What was loaded of row i, into a row of the ring, and where that is mirrored."""
        g = T.meta_var(self.geometry)
        off: T.let = T.bitwise_and(T.shift_right(self.off[buffer], i), 1)
        start: T.let = slot * g.pitch + self.first
        for j in T.unroll(self.count):
            number = T.meta_var(part * LOADS + j)
            held_at = T.meta_var(buffer * self.each + i * self.count + j)
            word: T.let = self.word(number)
            if self.padded:
                self.held[held_at] = T.bitwise_and(
                    self.held[held_at], self.kept(number, word * 2 - self.before - off))
            mine = T.meta_var(self.held[held_at])
            following: T.let = T.tvm_warp_shuffle_down(T.uint32(0xFFFFFFFF), mine, 1, 32, 32)
            joined: T.let = T.bitwise_or(T.shift_right(mine, T.uint32(16)),
                                         T.shift_left(following, T.uint32(16)))
            first: T.let = T.if_then_else(off == 1, joined, mine)
            self.put(number, word, self.words, slot, start + word, first)
            if self.early > 0:
                # One element further: what begins half a word off here does not there.
                other: T.let = word + 1 - off
                second: T.let = T.if_then_else(off == 1, mine, joined)
                self.put(number, other, (self.elements + self.before) // 2 + 1, slot,
                         start + g.copy_words + other, second)

    @T.inline
    def put(self, number, word, words, slot, at, value):
        g = T.meta_var(self.geometry)
        stores: T.let = T.And(self.thread % 32 < STORING_LANES, T.Or(
            T.Not(self.at_an_end(number)), T.And(word >= 0, word < words)))
        if stores:
            self.ring[at] = value
        if g.mirrored > 0:
            if T.And(stores, slot < g.mirrored):
                self.ring[at + g.ring_rows * g.pitch] = value
