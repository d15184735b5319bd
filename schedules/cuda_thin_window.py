"""The order of K in `cuda_thin`: how a thread finds its words of a window.

The window of a pixel is, row by row, a run of words in shared memory, two elements of two bytes in
each or one of four. K is these words in this order: fours of them go to the four threads of a
pixel, eights of them are a step of wgmma. Fours that cross from a row of the window to the next,
that end in half a word, or after which nothing comes are known when the kernel is compiled; what
they mean for a thread is in a few registers.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .cuda_thin_pairs import PairWindow, word_of_pairs
from .cuda_thin_tiles import STEP_WORDS, Geometry, split


def ring_row(g: Geometry, place):
    """The first row of the window of a place, counted from the first of all."""
    image, within = split(place, g.image_places)
    return image * g.image_rows + split(within, g.columns)[0] * g.next_place


def ring_slot(g: Geometry, place, first_row):
    """Where in the ring the first row of a place's window is; `first_row` is at 0."""
    return split(ring_row(g, place) - first_row, g.ring_rows)[1]


def first_word(g: Geometry, place, slot):
    """Of a place's window in the ring, whose first row is at `slot`."""
    column, of_class = split(split(place, g.columns)[1] * g.stride_w, g.classes)
    at = column * g.config.channels
    odd = at % 2 if g.copies == 2 else 0
    words = g.class_words + g.copies - 1
    return (
        slot * g.pitch
        + odd * g.copy_words
        + of_class * words
        + T.shift_right(at + odd, g.per_word - 1)
    )


@T.meta_class
class Window:
    """Where a thread's words are, from the first word of its pixel's window on.

    steps: of K whose operands are loaded together; those of two groups are held.
    """

    def __init__(self, geometry: Geometry, steps: int = 0):
        g = geometry
        self.steps, self.each = g.k_steps, steps
        self.held = T.alloc_local((max(1, 2 * steps * 4),), "uint32")
        self.row = g.row_words
        self.apart = g.step_h * g.pitch  # words from row to row of the window
        self.odd = g.odd
        self.words, self.rest = g.k_words, g.k_words % 4
        # Fours by where in a row they begin: 0 for most of them, up to 3 that go on in the next
        # row; the last one, when it has fewer words.
        self.kinds = min(4, self.row)
        self.first = max(0, self.row - 4)
        self.at = T.alloc_local((self.kinds + 1,), "int32")
        self.mask = T.alloc_local((self.kinds + 1,), "uint32")

    def place(self, word):
        """Of a word of K."""
        return word // self.row * self.apart + word % self.row

    @T.inline
    def start(self, t):
        """What the t-th thread of a pixel needs."""
        for kind in T.unroll(self.kinds):
            begin = T.meta_var(self.first + kind)
            self.at[kind] = self.place(begin + t) - begin
            self.mask[kind] = self.whole(begin + t)
        begin = T.meta_var(self.words // 4 * 4)
        # Words that are not there: some other one is read and masked.
        self.at[self.kinds] = self.place(
            T.min(begin + t, self.words - 1)) - self.place(begin)
        self.mask[self.kinds] = T.if_then_else(
            begin + t < self.words, self.whole(begin + t), T.uint32(0))

    def whole(self, word):
        """The mask of a word that is there: half of it, or all."""
        if not self.odd:
            return T.uint32(0xFFFFFFFF)
        last = word % self.row == self.row - 1
        return T.if_then_else(last, T.uint32(0xFFFF), T.uint32(0xFFFFFFFF))

    def load(self, words, base, four):
        """This thread's word of a four, of a pixel whose window begins at `base`."""
        begin = four * 4 % self.row
        kind = T.max(begin - self.first, 0)
        masked = begin >= self.first if self.odd else T.bool(False)
        if self.rest:
            last = four == self.words // 4
            kind = T.if_then_else(last, self.kinds, kind)
            masked = T.Or(masked, last)
        value = words[base + self.at[kind] + self.place(four * 4)]
        value = T.if_then_else(masked, T.bitwise_and(value, self.mask[kind]), value)
        return T.if_then_else(four * 4 < self.words, value, T.uint32(0))

    @T.inline
    def fill(self, words, group, low, high):
        """The operands of a group: rows g and g + 8 of A, of a step's two fours of words."""
        for s in T.unroll(self.each):
            if group * self.each + s < self.steps:
                for r in T.unroll(4):
                    self.held[(group % 2 * self.each + s) * 4 + r] = self.load(
                        words, T.if_then_else(r % 2 == 0, low, high),
                        (group * self.each + s) * (STEP_WORDS // 4) + r // 2)

    def operand(self, group, s, r):
        """A register of the s-th step of a group."""
        return self.held[(group % 2 * self.each + s) * 4 + r]


@T.meta_class
class RingWindow(Window):
    """A thread's words of a window that may go on from the ring's last row to its first."""

    def __init__(self, geometry: Geometry, steps: int = 0):
        super().__init__(geometry, steps)
        self.end = geometry.ring_bytes // 4

    def load(self, words, base, four):
        """This thread's word of a four, of a pixel whose window begins at `base`."""
        begin, last = four * 4 % self.row, T.And(four == self.words // 4, self.rest > 0)
        kind = T.if_then_else(last, self.kinds, T.max(begin - self.first, 0))
        place = self.place(four * 4)
        # Of fours that lie in one row the row's first word tells, for all of them.
        crosses = T.Or(begin + 3 >= self.row, last)
        tells = T.if_then_else(crosses, self.at[kind] + place, four * 4 // self.row * self.apart)
        first = base - T.if_then_else(base + tells >= self.end, self.end, 0)
        at = first + self.at[kind] + place
        masked = T.Or(begin >= self.first if self.odd else T.bool(False), last)
        value = T.if_then_else(masked, T.bitwise_and(words[at], self.mask[kind]), words[at])
        return T.if_then_else(four * 4 < self.words, value, T.uint32(0))


def window_of(g: Geometry):
    """Of a thread that multiplies."""
    kind = PairWindow if g.config.pairs else RingWindow if g.wraps else Window
    return kind(g, g.config.steps)


def word_of(g: Geometry, word):
    """Of a word of K the row of the window, and which of its words it is."""
    if g.config.pairs:
        return word_of_pairs(g, word)
    return word // g.row_words, word % g.row_words
