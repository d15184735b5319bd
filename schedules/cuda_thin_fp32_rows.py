"""Rows of `cuda_thin_fp32`: as they are in the ring, and beside it the largest numbers of each.

A window's numbers have one scale: that of the largest finite number in the rows of its taps. Who
brings a row has it in registers and finds its largest; who reads a window looks at a few of these.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .cuda_thin_fp32_tiles import WARPS, SplitGeometry
from .cuda_thin_loads import Elements
from .cuda_thin_window import first_word, ring_slot
from .cuda_window_fp32_split import apart, exponent, inverse

# Added to the bits of a magnitude this makes numbers above zero of the finite ones, and negative
# ones of infinities and NaN.
_LEAST = 0x00800000
# The bits of a power of two and of its reciprocal add up to this.
_OPPOSITE = 254 << 23


@T.meta_class
class MeasuredElements(Elements):
    """A thread's elements of rows, and the largest of those that are finite, of its warp.

    tops: bits of magnitudes, of each row of the ring and each warp.
    """

    def __init__(self, geometry: SplitGeometry, ring, x, thread, tops):
        super().__init__(geometry, ring, x, thread)
        self.tops = tops
        self.top = T.local_scalar("int32")

    @T.inline
    def store(self, buffer, i, part, slot):
        """What was loaded of row i, into a row of the ring; after its last part, its largest."""
        Elements.store(self, buffer, i, part, slot)
        if part == 0:
            self.top = T.int32(_LEAST)
        for j in T.unroll(self.count):
            bits = T.meta_var(self.held[buffer * self.each + i * self.count + j])
            magnitude = T.meta_var(T.bitwise_and(bits, T.uint32(0x7FFFFFFF)))
            self.top = T.max(self.top, T.reinterpret("int32", magnitude + T.uint32(_LEAST)))
        if part == self.parts - 1:
            T.ptx["redux_sync.max.s32"](self.top, self.top, T.uint32(0xFFFFFFFF))
            if self.thread % 32 == 0:
                self.tops[slot * WARPS + self.thread // 32] = T.Cast("uint32", self.top - _LEAST)


@T.meta_class
class Pixels:
    """A thread's two pixels: where their windows are, and what brings their numbers into range."""

    def __init__(self, geometry: SplitGeometry, tops):
        self.geometry, self.tops = geometry, tops
        self.word = T.alloc_local((2,), "int32")  # the window's first, in the ring
        self.into = T.alloc_local((2,), "float32")
        self.top = T.local_scalar("uint32")

    @T.inline
    def find(self, half, pixel, first_row, t):
        """The rows of a window are in the ring. Its four threads look at their tops by turns."""
        g = T.meta_var(self.geometry)
        slot: T.let = ring_slot(g, pixel, first_row)
        self.word[half] = first_word(g, pixel, slot)
        self.top = T.uint32(0)
        for turn in T.unroll((g.taps_h + 3) // 4):
            # Beyond the last row: that one once more.
            row: T.let = slot + T.min(turn * 4 + t, g.taps_h - 1) * g.step_h
            place: T.let = T.if_then_else(row < g.ring_rows, row, row - g.ring_rows)
            for warp in T.unroll(WARPS):
                self.top = T.max(self.top, self.tops[place * WARPS + warp])
        for bit in T.unroll(2):
            self.top = T.max(self.top, apart(self.top, T.shift_left(1, bit)))
        self.into[half] = inverse(exponent(self.top))

    def back(self, half):
        """What undoes it: the power of two with the opposite exponent."""
        bits = T.reinterpret("uint32", self.into[half])
        return T.reinterpret("float32", T.uint32(_OPPOSITE) - bits)
