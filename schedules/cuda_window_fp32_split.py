"""Float32 as two halves and a scale: x = scale (high + low), for patches in shared memory.

A block is 32 channels of one pixel, or of one image's part of a patch. Its scale is the power of
two that brings the largest finite one to [2^14, 2^15), the greatest room that float16 has; high is
x / scale rounded to float16, low is the rest, rounded too: 22 bits and two signs, so that
|x - scale (high + low)| is at most 2^-23 |x|, or 2^-39 of the block's largest where that is more.
See `docs/accuracy.md`.
"""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from .cuda_window_fp32_tiles import ROW_CHANNELS, SplitGeometry
from .hopper import WARPGROUP, Ring

# Of float32: bits of an infinity, and those of the fraction; the exponent that brings a number to
# [2^14, 2^15) and that of its reciprocal add up to this. Smaller exponents than _LEAST have
# reciprocals beyond float32.
_INFINITY, _FRACTION, _SUM, _LEAST = 0x7F800000, 23, 254, 15
_TOP = 14
# Of float16: a magnitude's bits, infinity, one.
_MAGNITUDE, _INFINITE_HALF, _ONE_HALF = 0x7FFF, 0x7C00, 0x3C00
CHUNK = 8  # halves of 16 bytes


def magnitude(value):
    """The bits of |value|, which order as the magnitudes do; NaN is above infinity."""
    return T.bitwise_and(T.reinterpret("uint32", value), T.uint32(0x7FFFFFFF))


def exponent(bits):
    """That of a block whose largest has these bits, as one from which scales can be made."""
    return T.max(T.shift_right(bits, T.uint32(_FRACTION)), T.uint32(_LEAST))


def scale(exponent):
    """What is to be multiplied with the halves: a power of two, 2^-126 at least."""
    return T.reinterpret("float32", T.shift_left(exponent - T.uint32(_TOP), T.uint32(_FRACTION)))


def inverse(exponent):
    """What brings the block's largest to [2^14, 2^15), or as far as 2^126 does."""
    return T.reinterpret(
        "float32", T.shift_left(T.uint32(_SUM + _TOP) - exponent, T.uint32(_FRACTION))
    )


@T.meta_class
class Halves:
    """Two neighbours of a block as words of two halves each."""

    def __init__(self):
        for name in ("high", "low"):
            setattr(self, name, T.local_scalar("uint32"))
        self.parts = T.alloc_local((2,), "float32")

    @T.inline
    def split(self, first, second):
        """Of values that were brought into range; Inf and NaN give NaN in `low`."""
        T.ptx["cvt.rn.f16x2.f32"](self.high, second, first)
        self.parts[0] = first - self.value(0)
        self.parts[1] = second - self.value(1)
        T.ptx["cvt.rn.f16x2.f32"](self.low, self.parts[1], self.parts[0])

    def value(self, which):
        """A high half as float32."""
        bits = T.bitwise_and(T.shift_right(self.high, T.uint32(16 * which)), T.uint32(0xFFFF))
        return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


@T.inline
def mend(halves, high, low):
    """Make an infinity of a block come out as in a plain product: high 1, low infinite.

    high, low: places of the two halves. An infinity as it was rounded, Inf and Inf - Inf, would be
    NaN times the low half of any weight. As it is now, it meets in low the weight's high half, and
    in high finite numbers only: the sum of the three products is Inf of the right sign, and NaN
    where the weight is zero.
    """
    if T.bitwise_and(halves[high], T.uint16(_MAGNITUDE)) == T.uint16(_INFINITE_HALF):
        halves[low] = halves[high]
        halves[high] = T.bitwise_xor(halves[high], T.uint16(_INFINITE_HALF ^ _ONE_HALF))


def chunk_at(first, row, chunk):
    """The first word of a chunk of a row that begins at word `first`, as it was swizzled.

    Rows begin at multiples of 32 words: exchanging chunks is exclusive or of the place itself.
    """
    return T.bitwise_xor(first + row % 8 * 4, chunk * 4)


def apart(value, lanes: int):
    """That of the lane whose number differs by one bit."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, lanes, 32, 32)


@T.meta_class
class Split:
    """What a splitting thread has in registers."""

    def __init__(self):
        self.value = T.alloc_local((ROW_CHANNELS,), "float32")
        self.packed = T.alloc_local((8,), "uint32")
        self.halves = Halves()
        self.top = T.local_scalar("float32")
        self.infinite = T.local_scalar("uint32")  # a bit a turn: whether a row has infinite numbers
        self.buffer = T.local_scalar("int32")


@T.meta_class
class Splitter:
    """A warpgroup that splits patches as they land, in place, a thread a pixel.

    Nobody else touches a row between: the copy engine has written it, and products come after. A
    thread reads a row of 128 bytes, and writes it: eight lanes read the eight chunks of an atom's
    rows that lie in different banks.
    """

    def __init__(self, geometry: SplitGeometry, pixels: Ring, pool):
        g = geometry
        self.pixels, self.rows, self.period = pixels, g.patch_rows, g.period
        # Rows at a time: of whole periods, so that a thread has one image.
        self.each = WARPGROUP // g.period * g.period if g.config.block == "patch" else WARPGROUP
        self.turns = -(-g.patch_rows // self.each)
        self.places = g.places
        self.by_patch = g.config.block == "patch"
        self.stage_floats, self.scale_floats = pixels.stage_bytes // 4, g.scale_floats
        words = pixels.stages * self.stage_floats
        data = pixels.data.data
        self.floats = T.decl_buffer((words,), "float32", data=data)
        self.words = T.decl_buffer((words,), "uint32", data=data)
        self.halves = T.decl_buffer((2 * words,), "uint16", data=data)
        self.scales = pool.alloc((pixels.stages * self.scale_floats,), "float32", align=8)
        self.tops = pool.alloc((2 * self.places,), "float32", align=8)
        self.ready = None

    def place_barriers(self, pool):
        """After all that has to be aligned more."""
        self.ready = pool.alloc((self.pixels.stages,), "uint64", align=8)

    @T.inline
    def init(self):
        for i in T.unroll(self.pixels.stages):
            T.ptx.mbarrier.init.shared.b64(self.ready.ptr_to([i]), T.uint32(WARPGROUP))

    @T.inline
    def wait(self, at):
        """Until the patch of a stage was split."""
        T.cuda.mbarrier_wait(self.ready.ptr_to([at.stage]), at.turn)

    @T.inline
    def run(self, at, thread, mine):
        """Split the patch of a stage, by the threads of a warpgroup; mine: a thread's Split."""
        # The bytes of the patch are there.
        self.pixels.wait(at)
        if self.by_patch:
            self.find_largest(at.stage, thread, mine)
        for turn in T.serial(self.turns):
            row: T.let = turn * self.each + thread
            if T.And(row < self.rows, thread < self.each):
                if not self.by_patch or self.turns > 1:
                    self.load(at.stage, row, mine)
                if not self.by_patch:
                    mine.top = T.float32(0)
                    mine.infinite = T.uint32(0)
                    self.add_row(at.stage, row, 0, mine)
                self.split_row(at.stage, row, turn, mine)
        # What this thread wrote is for wgmma, which sees memory another way; each says so for
        # itself.
        T.ptx.fence.proxy.async_.shared__cta()
        T.ptx.mbarrier.arrive.shared.b64(self.ready.ptr_to([at.stage]), T.uint32(1))

    @T.inline
    def load(self, stage, row, mine):
        first: T.let = stage * self.stage_floats + row * ROW_CHANNELS
        for c in T.unroll(8):
            for e in T.vectorized(4):
                mine.value[c * 4 + e] = self.floats[chunk_at(first, row, c) + e]

    @T.inline
    def add_row(self, stage, row, turn, mine):
        """The largest finite number of a row that is loaded; whether there are infinite ones."""
        largest: T.float32 = T.float32(0)
        for i in T.unroll(ROW_CHANNELS):
            largest = T.max(largest, T.fabs(mine.value[i]))
        if magnitude(largest) >= T.uint32(_INFINITY):
            mine.infinite = T.bitwise_or(
                mine.infinite, T.shift_left(T.uint32(1), T.Cast("uint32", turn))
            )
            largest = T.float32(0)
            first: T.let = stage * self.stage_floats + row * ROW_CHANNELS
            for i in T.serial(ROW_CHANNELS):
                if magnitude(self.floats[first + i]) < T.uint32(_INFINITY):
                    largest = T.max(largest, T.fabs(self.floats[first + i]))
        mine.top = T.max(mine.top, largest)

    @T.inline
    def find_largest(self, stage, thread, mine):
        """`mine.top` becomes the largest of the thread's image, and its scale is put down."""
        period = T.meta_var(self.period)
        mine.top = T.float32(0)
        mine.infinite = T.uint32(0)
        for turn in T.serial(self.turns):
            row: T.let = turn * self.each + thread
            if T.And(row < self.rows, thread < self.each):
                self.load(stage, row, mine)
                self.add_row(stage, row, turn, mine)
        image: T.let = thread % period
        if period == 1:
            for bit in T.unroll(5):
                mine.top = T.max(mine.top, apart(mine.top, T.shift_left(1, bit)))
        if period == 1:
            if thread % 32 == 0:
                self.tops[mine.buffer * self.places + thread // 32] = mine.top
        else:
            if thread < self.each:
                self.tops[mine.buffer * self.places + thread] = mine.top
        # Everybody's largest are there. Who is through goes on to the other buffer, and meets the
        # rest once more before it comes back to this one.
        T.ptx.bar.sync(T.uint32(1), T.uint32(WARPGROUP))
        for other in T.unroll(self.places // period):
            mine.top = T.max(
                mine.top, self.tops[mine.buffer * self.places + image + other * period]
            )
        mine.buffer = mine.buffer ^ 1
        if thread < period:
            self.scales[stage * period + thread] = scale(
                exponent(T.reinterpret("uint32", mine.top))
            )

    @T.inline
    def split_row(self, stage, row, turn, mine):
        first: T.let = stage * self.stage_floats + row * ROW_CHANNELS
        e2: T.let = exponent(T.reinterpret("uint32", mine.top))
        into: T.let = inverse(e2)
        for c in T.unroll(4):
            for j in T.unroll(4):
                mine.halves.split(
                    mine.value[c * 8 + j * 2] * into, mine.value[c * 8 + j * 2 + 1] * into
                )
                mine.packed[j] = mine.halves.high
                mine.packed[4 + j] = mine.halves.low
            for part in T.unroll(2):
                for e in T.vectorized(4):
                    self.words[chunk_at(first, row, c + part * 4) + e] = mine.packed[part * 4 + e]
        if T.bitwise_and(
            T.shift_right(mine.infinite, T.Cast("uint32", turn if self.by_patch else 0)),
            T.uint32(1),
        ) != T.uint32(0):
            for i in T.serial(ROW_CHANNELS):
                mend(
                    self.halves,
                    chunk_at(first, row, i // CHUNK) * 2 + i % CHUNK,
                    chunk_at(first, row, i // CHUNK + 4) * 2 + i % CHUNK,
                )
        if not self.by_patch:
            # Of its own pixel, and for the left neighbour's reader.
            at: T.let = (stage * self.rows + row) * 2
            self.scales[at] = scale(e2)
            if row > 0:
                self.scales[at - 1] = scale(e2)
