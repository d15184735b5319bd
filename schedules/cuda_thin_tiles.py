"""A configuration of `cuda_thin`, and what it amounts to on a problem."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from tvm.script import tirx as T

from ..problem import ConvProblem
from .hopper import ROW_BYTES, WARPGROUP, WGMMA_K_BYTES, WGMMA_M

# Shared memory that a block may take, and a multiprocessor's for all its blocks, each of which
# takes 1 KiB more; registers of a multiprocessor, and the most of a thread in eights (CUDA C++
# Programming Guide, compute capability 9.0).
BLOCK_BYTES, MULTIPROCESSOR_BYTES, SYSTEM_BYTES = 227 * 1024, 228 * 1024, 1024
REGISTERS, MOST_REGISTERS = 65536, 248
# Of a producing thread, whose loads are kept in them: by what a thread is launched with.
PRODUCER_REGISTERS = {104: 80, 80: 64, 0: 56}
# Loads of a producing thread for one of its two buffers of registers.
LOADS = 12
# Bytes that copies come in, and the most that wait on their way to the ring.
CHUNK, SLOTS_BYTES = 16, 48 * 1024
LANES = 32
# Words of a row of A that one wgmma takes, and of a row of B in shared memory.
STEP_WORDS, ROW_WORDS = WGMMA_K_BYTES // 4, ROW_BYTES // 4
BANKS = 32
# Outputs in NCHW are turned round so many channels at a time, in rows of so many words: four
# channels apart they are a quarter of the banks apart.
STAGED_CHANNELS, STAGED_PITCH = 16, WGMMA_M + 4


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Config:
    """Who does how much of what.

    block_n: output channels of a block, whose filter stays in shared memory; a multiple of 8.
    warpgroups: those that multiply, 64 output pixels each at a time.
    channels: of a pixel in shared memory: the problem's, or one more, zero, so that pixels of two
    bytes a channel are whole words. rows: of the input in a stage of the ring. stages: of the ring.
    steps: of K for which a warpgroup loads operands ahead of the tensor cores. blocks: that share a
    multiprocessor. producers: warpgroups that bring input rows. turns: whether warpgroups begin to
    multiply one after the other. pairs: whether a thread's two pixels lie one above the other, so
    that a word which is in both windows is loaded once. by_copies: whether rows that lie together
    in memory are brought by the copy engine, which takes slots in shared memory; else by threads.
    """

    block_n: int
    warpgroups: int
    channels: int
    rows: int
    stages: int
    steps: int = 4
    blocks: int = 1
    producers: int = 1
    turns: bool = False
    pairs: bool = False
    by_copies: bool = True

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.warpgroups + self.producers)

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.block_n * WGMMA_M // WARPGROUP


class Registers(NamedTuple):
    """Of a thread: at the launch, and of producing and consuming ones afterwards (setmaxnreg)."""

    launched: int
    producer: int
    consumer: int


def registers(config: Config) -> Registers:
    """setmaxnreg takes from no other source than what the block was launched with."""
    warpgroups = config.warpgroups + config.producers
    launched = min(MOST_REGISTERS, REGISTERS // (config.blocks * config.threads) // 8 * 8)
    producer = next(given for least, given in PRODUCER_REGISTERS.items() if launched >= least)
    left = launched * warpgroups - producer * config.producers
    consumer = left // config.warpgroups // 8 * 8
    return Registers(launched, producer, min(consumer, MOST_REGISTERS))


class Geometry:
    """Sizes that follow from a problem and a configuration.

    Input rows are numbered as the ring takes them: of every image those that its outputs read,
    padding included, one image after the other. Outputs are numbered by places, through all images
    too: a place is a pixel, or with `pairs` two in a column, of which the lower one may lie beyond
    the image.
    """

    copies_rows = True  # where rows lie together in memory

    def __init__(self, problem: ConvProblem, config: Config):
        p, c = problem, config
        self.problem, self.config = p, c
        self.batch, (self.height, self.width) = p.batch, p.input_size
        self.in_channels, self.out_channels = p.in_channels, p.out_channels
        self.rows, self.columns = p.output_size
        self.taps_h, self.taps_w = p.kernel_size
        # Steps that are never taken count as 1: they may be too long for 32 bits.
        self.stride_h, self.stride_w = (
            s if n > 1 else 1 for s, n in zip(p.stride, p.output_size, strict=True)
        )
        self.step_h, self.step_w = (
            d if n > 1 else 1 for d, n in zip(p.dilation, p.kernel_size, strict=True)
        )
        (self.top, _), (self.left, _) = p.padding
        self.per_word = 4 // p.itemsize  # elements
        self.rounded = p.dtype == "float32"  # to tf32, on the way to shared memory

        # Input rows: of a window, from output row to output row, of a place, from place to place
        # below, of an image.
        self.pair = 2 if c.pairs else 1  # output rows of a place
        place_rows = _ceil(self.rows, self.pair)
        self.window_rows = (self.taps_h - 1) * self.step_h + 1
        self.next_row = min(self.stride_h, self.window_rows)
        self.read_rows = (self.pair - 1) * self.next_row + self.window_rows
        self.next_place = self.pair * self.next_row
        self.image_rows = (place_rows - 1) * self.next_place + self.read_rows
        # Columns: as many as outputs read, and those of them that are the input's.
        self.read_columns = (self.columns - 1) * self.stride_w + (self.taps_w - 1) * self.step_w + 1
        self.input_columns = max(0, min(self.width, self.read_columns - self.left))

        # A row in shared memory: with dilation, columns by their number modulo it, so that taps
        # are neighbours. Windows begin at whole words: those that do not have a second copy of the
        # row, one element further.
        self.classes = self.step_w
        self.class_columns = _ceil(self.read_columns, self.classes)
        elements = self.class_columns * c.channels
        self.class_words = _ceil(elements, self.per_word)
        odd = self.per_word == 2 and c.channels % 2 == 1
        starts = (w * self.stride_w // self.classes for w in range(self.columns))
        self.copies = 2 if odd and any(start % 2 for start in starts) else 1
        self.copy_words = self.classes * (self.class_words + self.copies - 1)

        # K in words: rows of a window one after the other, each in whole words. With pairs the
        # fours that are whole ones of a row, then words beyond these, four rows at a time.
        window = self.taps_w * c.channels
        self.row_words = _ceil(window, self.per_word)
        self.odd = window % self.per_word == 1  # half of a row's last word is beyond the window
        self.row_fours, self.row_rest = divmod(self.row_words, 4)
        self.k_words = self.taps_h * self.row_words
        if c.pairs:
            late = _ceil(self.taps_h, 4) * self.row_rest
            self.k_words = 4 * (self.taps_h * self.row_fours + late)
        self.k_steps = _ceil(self.k_words, STEP_WORDS)
        self.k_chunks = _ceil(self.k_words, ROW_WORDS)
        self.filter_bytes = self.k_chunks * c.block_n * ROW_BYTES

        layout = _layout(
            self.columns, place_rows, self.stride_w, self.next_place, c.channels, self.per_word,
            self.classes, self.class_words, self.copies, self.copy_words,
        )  # fmt: skip
        self.pitch, self.interleaved = layout
        self.ring_rows = c.rows * c.stages

        # Rows that lie together in memory are copied, a stage's by one warp: slots for them, with
        # a chunk before and one behind. Else threads load elements, so many of a row.
        elements = self.input_columns * self.in_channels
        self.copiers = c.producers * (WARPGROUP // 32)
        self.slot_bytes = CHUNK * (_ceil((elements - 1) * p.itemsize, CHUNK) + 3)
        # A warp's words of a row are to be at constant distances: whole pixels, if filled up.
        even = c.channels == p.in_channels or 32 % (c.channels // 2) == 0
        most = SLOTS_BYTES // (self.copiers * self.slot_bytes)  # rows of a stage
        lie_together = p.channels_last and self.classes == 1 and even and most > 0
        self.by_copies = c.by_copies and self.copies_rows and lie_together
        self.slots_bytes = self.copiers * c.rows * self.slot_bytes if self.by_copies else 0
        if p.channels_last:
            self.row_loads = max(1, _ceil(elements, WARPGROUP))
        else:
            self.row_loads = self.in_channels * max(1, _ceil(self.input_columns, WARPGROUP))
        self.most_rows = min(most, LANES) if self.by_copies else max(1, LOADS // self.row_loads)

        self.image_pixels = self.rows * self.columns
        self.pixels = self.batch * self.image_pixels
        self.image_places = place_rows * self.columns
        self.places = self.batch * self.image_places
        self.tile_places = WGMMA_M // self.pair
        self.tiles = _ceil(self.places, self.tile_places)
        self.n_tiles = _ceil(self.out_channels, c.block_n)
        # The ring's first rows stand behind its last ones once more, so that no window wraps round.
        # With pairs a row's words are found together, and may as well be at the other end; and
        # beside a large filter there may be no room.
        self.wraps = False
        self.wraps = c.pairs or not self.fits

    @property
    def mirrored(self) -> int:
        """Rows of the ring that are there twice."""
        return 0 if self.wraps else self.read_rows - 1

    @property
    def ring_bytes(self) -> int:
        return (self.ring_rows + self.mirrored) * self.pitch * 4

    @property
    def fits(self) -> bool:
        """Whether there is shared memory for all of it."""
        taken = self.config.blocks * (self.shared_bytes + SYSTEM_BYTES)
        return self.shared_bytes <= BLOCK_BYTES and taken <= MULTIPROCESSOR_BYTES

    @property
    def tile_rows(self) -> int:
        """Rows of the ring that a tile may need at once."""
        place_rows = self.places // self.columns
        crossed = min((self.tile_places - 2) // self.columns + 1, place_rows - 1)
        images = min((self.tile_places - 2) // self.image_places + 1, self.batch - 1)
        further = self.read_rows - self.next_place
        return crossed * self.next_place + self.read_rows + images * further

    @property
    def fewest_stages(self) -> int:
        """Of a ring that holds a tile's rows, wherever in a stage they begin.

        Warps that copy are not to be a turn of the ring ahead of each other: a barrier's parity
        does not tell a turn from the one after the next.
        """
        return max(2, _ceil(self.tile_rows + self.config.rows - 1, self.config.rows),
                   _ceil(self.mirrored, self.config.rows),
                   self.copiers if self.by_copies else 0)  # fmt: skip

    @property
    def loads(self) -> int:
        """Words of shared memory that a thread loads for the operands of a tile."""
        if not self.config.pairs:
            return 4 * self.k_steps
        whole = (self.taps_h + self.next_row) * self.row_fours
        return whole + 2 * _ceil(self.taps_h, 4) * self.row_rest

    @property
    def held(self) -> int:
        """Registers of a thread's operands: two groups of steps; with pairs also the words of the
        upper window that the lower one's rows will need."""
        if not self.config.pairs:
            return 8 * self.config.steps
        return self.next_row * self.row_fours + 6 * self.config.steps + 4

    @property
    def vector(self) -> int:
        """Outputs that a thread stores together: channels in NHWC, up to 16 bytes, aligned; in NCHW
        two pixels, if that is aligned in every image and channel."""
        if not self.problem.channels_last:
            return 1 if self.image_pixels % 2 else 2
        vector = 16 // self.problem.itemsize
        while self.out_channels % vector:
            vector //= 2
        return vector

    @property
    def staging_bytes(self) -> int:
        """Of a warpgroup's outputs on their way in NCHW: two buffers of float32."""
        return 0 if self.problem.channels_last else 2 * STAGED_CHANNELS * STAGED_PITCH * 4

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        c = self.config
        barriers = 16 * (c.stages + 1) + 8 * self.copiers + 256
        staging = c.warpgroups * self.staging_bytes + 4 * c.block_n
        return self.filter_bytes + self.ring_bytes + self.slots_bytes + staging + barriers

    def parts(self, multiprocessors: int) -> int:
        """Blocks that divide the pixels among them, for each tile of output channels."""
        return min(self.tiles, max(1, multiprocessors * self.config.blocks // self.n_tiles))


def overlap(problem: ConvProblem) -> bool:
    """Whether windows of two output rows have words in common, as `Config.pairs` wants them."""
    taps, stride = problem.kernel_size[0], problem.stride[0]
    fits = stride < taps and problem.dilation[0] == 1 and problem.output_size[0] > 1
    return fits and problem.channels_last


def split(value, by: int):
    """Quotient and remainder of what is not negative, which unsigned division need not ask."""
    value, by = T.Cast("uint32", value), T.uint32(by)
    return T.Cast("int32", value // by), T.Cast("int32", value % by)


@functools.cache
def _layout(
    columns, rows, stride_w, next_row, channels, per_word, classes, class_words, copies, copy_words
):  # fmt: skip
    """Words from row to row, and which places are the rows of a fragment: those with the fewest
    bank conflicts.

    A warp loads of eight places four words each. interleaved: rows g and g + 8 of a fragment (with
    pairs, rows g of a warp's and of the next one's) are places 2 g and 2 g + 1, else g and g + 8.
    """
    least = copies * copy_words
    best = None
    for pitch in range(least, least + BANKS):
        for interleaved in (False, True):
            total = 0
            for first in range(0, min(4 * WGMMA_M, rows * columns), 16):
                for half in range(2):
                    words = set()
                    for g in range(8):
                        m = first + (2 * g + half if interleaved else g + 8 * half)
                        column = m % columns * stride_w
                        at = column // classes * channels
                        odd = at % 2 if copies == 2 else 0
                        word = (
                            m // columns * next_row * pitch + odd * copy_words
                            + column % classes * (class_words + copies - 1)
                            + (at + odd) // per_word
                        )  # fmt: skip
                        words.update(range(word, word + 4))
                    banks = [0] * BANKS
                    for word in words:
                        banks[word % BANKS] += 1
                    total += max(banks)
            cost = (total, interleaved, pitch)
            if best is None or cost < best:
                best = cost
    return best[2], best[1]
