"""How a warp of `cuda_thin` brings input rows to the ring where they lie together in memory (NHWC).

One lane of a warp asks the copy engine for each row of a stage: its bytes come, in whole sixteens,
to a slot of the warp in shared memory, while the warp and the others are busy. From there the warp
writes a row's words where windows find them. A row may begin anywhere in its slot; a word that lies
across two of the slot's is put together from both. Warps take stages by turns.
"""

# Bodies of inline functions are parsed as TIRx.

import math

from tvm.script import tirx as T

from .cuda_thin_filter import rounded
from .cuda_thin_rows import Ring, source
from .cuda_thin_tiles import CHUNK, Geometry
from .hopper import Position

_COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
_ALL = 0xFFFFFFFF
# Words of the ring that a lane makes at a time.
HELD = 8


@T.meta_class
class Slots:
    """Where copies arrive: rows of a stage for each warp, and an mbarrier that counts their bytes.

    A row begins in the second chunk of 16 bytes: words before and after it may be read.
    """

    def __init__(self, pool, geometry: Geometry):
        g = self.geometry = geometry
        self.data = pool.alloc((max(1, g.slots_bytes // 4),), "uint32", align=CHUNK)
        # The same by elements. A view from the start of all shared memory, hence the offset.
        self.bits = "uint16" if g.per_word == 2 else "uint32"
        self.elements = T.decl_buffer(
            (max(1, g.slots_bytes // g.problem.itemsize),), self.bits, data=self.data.data,
            elem_offset=self.data.elem_offset * g.per_word)
        self.full = None

    def place_barriers(self, pool):
        self.full = pool.alloc((self.geometry.copiers,), "uint64", align=8)

    @T.inline
    def init(self):
        for i in T.unroll(self.geometry.copiers):
            T.ptx.mbarrier.init.shared.b64(
                self.full.ptr_to([i]), T.uint32(self.geometry.config.rows))

    @T.inline
    def clear(self, thread, threads):
        """What no copy brings is read and masked."""
        words = T.meta_var(self.geometry.slots_bytes // 4)
        for i in T.serial((words + threads - 1) // threads):
            if i * threads + thread < words:
                self.data[i * threads + thread] = T.uint32(0)

    def word(self, warp, row):
        """Of a row's slot the first word after the chunk in front."""
        g = self.geometry
        return (warp * g.config.rows + row) * (g.slot_bytes // 4) + CHUNK // 4


@T.meta_class
class Copier:
    """A warp that fills every so-manieth stage of the ring, from row `first` on."""

    def __init__(self, geometry: Geometry, ring: Ring, slots: Slots, x, warp, lane, first):
        g = self.geometry = geometry
        self.ring, self.slots, self.x = ring, slots, x
        self.warp, self.lane, self.first = warp, lane, first
        self.elements = g.input_columns * g.in_channels
        self.total = math.prod(g.problem.input_shape)
        self.each = CHUNK // g.problem.itemsize
        # Elements between a multiple of 16 bytes and the tensor's first.
        address = T.reinterpret("uint64", x.ptr_to([0])) // T.uint64(g.problem.itemsize)
        self.base = T.Cast("int32", T.bitwise_and(address, T.uint64(self.each - 1)))
        # Whether there is padding beside a row, or rows of padding. If not, what is read instead is
        # where no window is, or where it is masked.
        self.beside = g.left > 0 or g.input_columns + g.left < g.read_columns
        last = (g.rows - 1) * g.stride_h + g.window_rows - g.top
        self.above = g.top > 0 or last > g.height
        # Words of a pixel whose channels are filled up, which begin at words of the ring.
        self.filled = g.config.channels // 2 if g.config.channels != g.in_channels else 0
        self.at = Position(ring.stages)
        self.stage, self.turn = T.local_scalar("int32"), T.local_scalar("int32")
        self.step = 32 // self.filled * g.in_channels // 2 if self.filled else 32
        self.held = T.alloc_local((HELD * g.per_word,), "uint32")
        self.word, self.kept = T.local_scalar("uint32"), T.local_scalar("uint32")
        self.shift = T.local_scalar("uint32")

    def lead(self, begin):
        """Elements in front of a row's first in its chunk of 16 bytes."""
        return T.bitwise_and(self.base + begin, self.each - 1)

    # --- From memory to slots

    @T.inline
    def ask(self, stage):
        """Start the copies of a stage, lane i that of row i. Nobody reads the slots any more."""
        g = T.meta_var(self.geometry)
        begin, inside = T.meta_var(source(g, self.first + stage * g.config.rows + self.lane))
        lead: T.let = self.lead(begin)
        start: T.let = begin - lead
        stop: T.let = begin + self.elements + self.each - 1 - self.lead(
            begin + self.elements + self.each - 1)
        # Of chunks that are in part beyond the tensor nothing is copied.
        low: T.let = T.if_then_else(start < 0, start + self.each, start)
        high: T.let = T.if_then_else(stop > self.total, stop - self.each, stop)
        count: T.let = T.if_then_else(inside, T.max(high - low, 0), 0)
        if self.lane < g.config.rows:
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                self.slots.full.ptr_to([self.warp]),
                T.Cast("uint32", count * g.problem.itemsize))
            if count > 0:
                T.ptx[_COPY](
                    self.slots.data.ptr_to(
                        [self.slots.word(self.warp, self.lane) + (low - start) // g.per_word]),
                    self.x.ptr_to([low]),
                    T.Cast("uint32", count * g.problem.itemsize),
                    self.slots.full.ptr_to([self.warp]))
        if T.And(T.And(inside, self.lane < g.config.rows), T.Or(start < 0, stop > self.total)):
            self.edges(start, stop, low, high)

    @T.inline
    def edges(self, start, stop, low, high):
        """The elements of a row that are in chunks which begin or end beyond the tensor."""
        g = T.meta_var(self.geometry)
        for e in T.serial(self.each):
            slot: T.let = self.slots.word(self.warp, self.lane) * g.per_word
            if T.And(start < low, start + e >= 0):
                if start + e < self.total:
                    self.slots.elements[slot + e] = self.x[start + e]
            if T.And(high < stop, high + e < self.total):
                if high + e >= 0:
                    self.slots.elements[slot + high - start + e] = self.x[high + e]

    # --- From slots to the ring

    def words(self, copy):
        """Of a row in the ring, those that have elements of the input's."""
        g = self.geometry
        if self.filled:
            return g.input_columns * self.filled
        return -(-(self.elements + self.before(copy)) // g.per_word)

    def before(self, copy):
        """Elements of the first of these words that are not the row's."""
        g = self.geometry
        return 0 if self.filled else g.left * g.config.channels % g.per_word + copy

    def element(self, copy):
        """The first of the lane's first word, from the row's first element on."""
        g = self.geometry
        if self.filled:
            return self.lane // self.filled * g.in_channels + self.lane % self.filled * 2
        return self.lane * g.per_word - self.before(copy)

    def mask(self, j, k, copy):
        """Those elements of the lane's word k, the j-th that it writes, that are the row's."""
        everything = T.uint32(_ALL)
        if self.filled:
            last = k % self.filled == self.filled - 1
            return T.if_then_else(last, T.uint32(0xFFFF), everything)
        at = 2 * k - self.before(copy)
        low = T.if_then_else(T.And(at >= 0, at < self.elements), T.uint32(0xFFFF), T.uint32(0))
        high = T.if_then_else(
            T.And(at >= -1, at < self.elements - 1), T.uint32(0xFFFF0000), T.uint32(0))
        at_an_end = T.Or(j == 0, (j + 1) * 64 > self.elements)
        return T.if_then_else(at_an_end, T.bitwise_or(low, high), everything)

    @T.inline
    def write(self, i):
        """A row of the stage, from its slot, and where it is mirrored."""
        g = T.meta_var(self.geometry)
        begin, inside = T.meta_var(source(g, self.first + self.stage * g.config.rows + i))
        self.kept = T.if_then_else(inside, T.uint32(_ALL), T.uint32(0))
        ring_row: T.let = self.at.stage * g.config.rows + i
        mirrored: T.let = ring_row < g.mirrored
        first = T.meta_var(g.left * g.config.channels // g.per_word)
        for copy in T.unroll(g.copies):
            # The lane's first element, from the chunk in front of the row on; of what follows every
            # 32 words of the ring are `step` of the slot.
            place: T.let = self.lead(begin) + self.element(copy)
            self.shift = T.Cast("uint32", place % 2 * 16)
            slot: T.let = self.slots.word(self.warp, i) + T.shift_right(place, g.per_word - 1)
            to: T.let = ring_row * g.pitch + copy * g.copy_words + first + self.lane
            words = T.meta_var(self.words(copy))
            # The last copy has the most words, a number known when this is compiled.
            for part in T.unroll((self.words(g.copies - 1) + 32 * HELD - 1) // (32 * HELD)):
                self.load(part, words, slot)
                self.store(part, words, copy, to, mirrored)

    @T.inline
    def load(self, part, words, slot):
        """The lane's words of a part of a row, all of them at a time."""
        g = T.meta_var(self.geometry)
        for m in T.unroll(HELD):
            j = T.meta_var(part * HELD + m)
            if j * 32 + self.lane < words:
                self.held[m * g.per_word] = self.slots.data[slot + j * self.step]
                if g.per_word == 2:
                    self.held[m * 2 + 1] = self.slots.data[slot + j * self.step + 1]

    @T.inline
    def store(self, part, words, copy, to, mirrored):
        g = T.meta_var(self.geometry)
        for m in T.unroll(HELD):
            j = T.meta_var(part * HELD + m)
            k = T.meta_var(j * 32 + self.lane)
            if k < words:
                if g.per_word == 2:
                    T.ptx["shf.r.wrap.b32"](
                        self.word, self.held[m * 2], self.held[m * 2 + 1], self.shift)
                    if self.beside or self.filled > 0:
                        self.word = T.bitwise_and(self.word, self.mask(j, k, copy))
                else:
                    self.word = rounded(self.held[m])
                if self.above:
                    self.word = T.bitwise_and(self.word, self.kept)
                self.ring.data[to + j * 32] = self.word
                if g.mirrored > 0:
                    if mirrored:
                        self.ring.data[to + j * 32 + g.ring_rows * g.pitch] = self.word

    @T.inline
    def run_all(self, stages):
        """Fill this warp's of so many stages, as fast as the ring is read."""
        g = T.meta_var(self.geometry)
        # Warps begin at different stages, some of them perhaps in a later turn.
        self.at.stage = self.warp % self.ring.stages
        self.at.turn = self.warp // self.ring.stages % 2
        self.stage = self.warp
        self.turn = 0
        if self.stage < stages:
            self.ask(self.stage)
        while self.stage < stages:
            # The rows have arrived, and the stage was read.
            T.cuda.mbarrier_wait(self.slots.full.ptr_to([self.warp]), self.turn)
            # What single lanes wrote at the tensor's ends is there too.
            T.cuda.warp_sync()
            self.ring.wait_read(self.at)
            for i in T.unroll(g.config.rows):
                self.write(i)
            # All lanes have written the stage, and have read the slots.
            self.ring.written(self.at, self.lane)
            self.turn = self.turn ^ 1
            self.stage = self.stage + g.copiers
            if self.stage < stages:
                self.ask(self.stage)
            self.at.skip(g.copiers)
