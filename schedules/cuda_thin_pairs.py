"""The order of K in `cuda_thin` where a thread's two pixels lie one above the other.

With a vertical stride of s the upper pixel's window has in its row u + s what the lower one's has
in its row u. A thread that has the same words of every row loads such a word once, and holds it for
s rows of the filter. So K is made of fours that lie in one row each, row by row; what a row has
beyond its last whole four comes at the end, a word of four rows at a time.

Reading shared memory is what limits these kernels: wgmma reads the filter from there, too.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .cuda_thin_tiles import Geometry


def word_of_pairs(g: Geometry, word):
    """Of a word of K the row of the window, and which of its words it is.

    A row beyond the window's: there is no such word.
    """
    four, t = word // 4, word % 4
    whole = g.taps_h * g.row_fours
    row, at = four // max(1, g.row_fours), four % max(1, g.row_fours) * 4 + t
    if not g.row_rest:
        return row, at
    beyond = four - whole
    late = four >= whole
    return (
        T.Select(late, beyond // g.row_rest * 4 + t, row),
        T.Select(late, g.row_fours * 4 + beyond % g.row_rest, at),
    )


@T.meta_class
class PairWindow:
    """A thread's words of two windows, from the first word of the upper one on.

    steps: of K whose operands are loaded together.
    """

    def __init__(self, geometry: Geometry, steps: int):
        g = self.geometry = geometry
        self.each, self.lower = steps, g.next_row
        self.fours, self.rest, self.taps = g.row_fours, g.row_rest, g.taps_h
        self.whole = self.taps * self.fours
        self.blocks = -(-self.taps // 4)  # of rows, whose words are a four
        self.end = self.whole + self.blocks * self.rest
        # By row of the upper window, and beyond it of the lower one; by pixel. All have a name
        # and few are alive at a time: the compiler gives them registers.
        self.held = T.alloc_local((max(1, (self.taps + self.lower) * self.fours),), "uint32")
        self.late = T.alloc_local((max(1, 2 * self.blocks * self.rest),), "uint32")
        # Of the rows that are being loaded, this thread's first word.
        self.size = g.ring_rows * g.pitch
        self.upper, self.below = T.local_scalar("int32"), T.local_scalar("int32")
        self.t = T.local_scalar("int32")
        self.row, self.last_row = T.local_scalar("int32"), T.local_scalar("int32")
        self.half, self.mask = T.local_scalar("uint32"), T.local_scalar("uint32")

    @T.inline
    def start(self, t):
        """What the t-th thread of a place needs."""
        g = T.meta_var(self.geometry)
        last = T.meta_var((self.blocks - 1) * 4)
        self.t = t
        self.row = t * g.pitch
        # Rows that are not there: the last one is read, and masked.
        self.last_row = T.min(t, self.taps - 1 - last) * g.pitch
        self.mask = T.if_then_else(last + t < self.taps, T.uint32(0xFFFFFFFF), T.uint32(0))
        # Where rows end in a whole four, half of its last word may be beyond the window.
        self.half = T.if_then_else(t == 3, T.uint32(0xFFFF), T.uint32(0xFFFFFFFF))

    def within(self, word):
        """A word of the ring, which may be given as one beyond its end."""
        return T.if_then_else(word >= self.size, word - self.size, word)

    def word(self, words, row, four):
        """This thread's word of a whole four of a row."""
        value = words[row + four * 4]
        if self.geometry.odd and not self.rest:
            return T.if_then_else(
                four == self.fours - 1, T.bitwise_and(value, self.half), value
            )
        return value

    def late_word(self, words, base, beyond, below):
        """This thread's of the fours at the end; below: rows, of the pixel from the upper one."""
        g = self.geometry
        block, j = beyond // self.rest, beyond % self.rest
        last = block == self.blocks - 1
        of_thread = T.if_then_else(last, self.last_row, self.row)
        row = self.within(base + of_thread + (block * 4 + below) * g.pitch)
        value = words[row + self.fours * 4 + j]
        if g.odd:
            value = T.if_then_else(
                j == self.rest - 1, T.bitwise_and(value, T.uint32(0xFFFF)), value
            )
        if self.taps % 4:
            value = T.if_then_else(last, T.bitwise_and(value, self.mask), value)
        return value

    @T.inline
    def fill(self, words, group, low, high):
        """The operands of a group, as far as they are not held. high: not asked for."""
        pitch = T.meta_var(self.geometry.pitch)
        for s in T.unroll(self.each):
            for i in T.unroll(2):
                four = T.meta_var((group * self.each + s) * 2 + i)
                if self.fours > 0:
                    if four < self.whole:
                        row = T.meta_var(four // self.fours)
                        of_row = T.meta_var(four % self.fours)
                        lower = T.meta_var(row + self.lower)
                        # Rows above the lower window are the upper one's alone.
                        if row < self.lower:
                            if of_row == 0:
                                self.upper = self.within(low + row * pitch) + self.t
                            self.held[row * self.fours + of_row] = self.word(
                                words, self.upper, of_row)
                        if of_row == 0:
                            self.below = self.within(low + lower * pitch) + self.t
                        self.held[lower * self.fours + of_row] = self.word(
                            words, self.below, of_row)
                if self.rest > 0:
                    if T.And(four >= self.whole, four < self.end):
                        beyond = T.meta_var(four - self.whole)
                        for pixel in T.unroll(2):
                            self.late[beyond * 2 + pixel] = self.late_word(
                                words, low, beyond, pixel * self.lower)

    def operand(self, group, s, r):
        """A register of the s-th step of a group: of the upper or the lower pixel, of a four."""
        four, pixel = (group * self.each + s) * 2 + r // 2, r % 2
        value = T.uint32(0)
        if self.rest:
            late = self.late[(four - self.whole) * 2 + pixel]
            value = T.if_then_else(four < self.end, late, value)
        if self.fours:
            at = (four // self.fours + pixel * self.lower) * self.fours + four % self.fours
            value = T.if_then_else(four < self.whole, self.held[at], value)
        return value
