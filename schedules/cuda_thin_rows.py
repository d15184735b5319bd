"""Input rows of `cuda_thin` on their way to shared memory, where windows find them.

Whatever the layout, the padding and the addresses in memory: in the ring a row is its columns with
their channels, zeros where there is padding, beginning at a word. Here a warpgroup reads elements
of the input and writes them where they belong; many loads of each thread are on their way at a
time. `cuda_thin_copies` is faster, where rows lie together in memory. Others read a row as long as
their windows need it.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .cuda_thin_tiles import Geometry, split
from .hopper import WARPGROUP, Position

WARPS = WARPGROUP // 32
LINE = 128  # bytes, of the L2 cache


def source(g: Geometry, row):
    """Where an input row begins in x, and whether it is one and not padding."""
    image, within = split(row, g.image_rows)
    if g.stride_h > g.next_row:  # rows between windows are left out
        window, within = split(within, g.window_rows)
        within = window * g.stride_h + within
    y = within - g.top
    inside = T.And(image < g.batch, T.And(y >= 0, y < g.height))
    if g.problem.channels_last:
        return (image * g.height + y) * (g.width * g.in_channels), inside
    return image * (g.in_channels * g.height * g.width) + y * g.width, inside


@T.meta_class
class Ring:
    """Stages of rows, each with two mbarriers.

    full: `writers` warps have written it. empty: the `readers` warps need it no more.
    """

    def __init__(self, pool, geometry: Geometry, readers: int, writers: int = WARPS):
        self.geometry, self.readers, self.writers = geometry, readers, writers
        self.stages = geometry.config.stages
        self.data = pool.alloc((geometry.ring_bytes // 4,), "uint32", align=16)
        self.full = self.empty = None

    def place_barriers(self, pool):
        """After all that has to be aligned more."""
        self.full = pool.alloc((self.stages,), "uint64", align=8)
        self.empty = pool.alloc((self.stages,), "uint64", align=8)

    @T.inline
    def init(self):
        for i in T.unroll(self.stages):
            T.ptx.mbarrier.init.shared.b64(self.full.ptr_to([i]), T.uint32(self.writers))
            T.ptx.mbarrier.init.shared.b64(self.empty.ptr_to([i]), T.uint32(self.readers))

    @T.inline
    def clear(self, thread, threads):
        """Zeros everywhere: what no row writes over is padding."""
        words = T.meta_var(self.geometry.ring_bytes // 4)
        for i in T.serial((words + threads - 1) // threads):
            if i * threads + thread < words:
                self.data[i * threads + thread] = T.uint32(0)

    @T.inline
    def wait_written(self, at):
        T.cuda.mbarrier_wait(self.full.ptr_to([at.stage]), at.turn)

    @T.inline
    def wait_read(self, at):
        # A stage that nobody wrote yet counts as read: the parity before the first turn's.
        T.cuda.mbarrier_wait(self.empty.ptr_to([at.stage]), at.turn ^ 1)

    @T.inline
    def written(self, at, lane):
        """Say for this warp that its part of the stage is there."""
        T.cuda.warp_sync()
        if lane == 0:
            T.ptx.mbarrier.arrive.shared.b64(self.full.ptr_to([at.stage]), T.uint32(1))

    @T.inline
    def read(self, at, lane):
        """Say for this warp that it needs the stage no more."""
        if lane == 0:
            T.ptx.mbarrier.arrive.shared.b64(self.empty.ptr_to([at.stage]), T.uint32(1))


@T.meta_class
class Producer:
    """A warpgroup that fills the ring from row `first` on: stages by turns, its first `number`.

    loads: what brings a row.
    """

    def __init__(self, geometry: Geometry, ring: Ring, x, thread, first, loads, number=0):
        g = self.geometry = geometry
        self.ring, self.x, self.thread, self.loads = ring, x, thread, loads
        self.first = first + number * g.config.rows
        self.number, self.producers = number, g.config.producers
        self.step = self.producers * g.config.rows  # rows from stage to stage
        # Elements of a row that lie together in memory, and how many such runs it has.
        self.runs = 1 if g.problem.channels_last else g.in_channels
        self.run = g.input_columns * (g.in_channels if self.runs == 1 else 1)
        self.at = Position(ring.stages)

    @T.inline
    def load(self, buffer, piece):
        """The piece of this number, rows of a stage or a part of one, into registers."""
        g, parts = T.meta_var(self.geometry), T.meta_var(self.loads.parts)
        row: T.let = self.first + piece // parts * self.step
        for i in T.unroll(g.config.rows):
            begin, inside = T.meta_var(source(g, row + i))
            start: T.let = begin
            exists: T.let = inside
            self.loads.load(buffer, i, piece % parts, start, exists)

    @T.inline
    def store(self, buffer, piece):
        """What was loaded, into the stage."""
        g, parts = T.meta_var(self.geometry), T.meta_var(self.loads.parts)
        for i in T.unroll(g.config.rows):
            slot: T.let = self.at.stage * g.config.rows + i
            self.loads.store(buffer, i, piece % parts, slot)

    @T.inline
    def ask(self, stage, lane):
        """A stage's rows into the L2 cache, where loads will find them soon. By one warp."""
        g = T.meta_var(self.geometry)
        lines = T.meta_var(self.run * g.problem.itemsize // LINE + 1)
        count = T.meta_var(g.config.rows * self.runs * lines)
        for i in T.unroll((count + 31) // 32):
            number: T.let = i * 32 + lane
            begin, inside = T.meta_var(source(
                g, self.first + stage * self.step + number // (self.runs * lines)))
            within = T.meta_var(T.min(number % lines * (LINE // g.problem.itemsize),
                                      max(self.run - 1, 0)))
            if T.And(inside, number < count):
                at = T.meta_var(
                    begin + number // lines % self.runs * (g.height * g.width) + within)
                T.ptx["prefetch.global.L2"](self.x.ptr_to([at]))

    @T.inline
    def run_all(self, stages, lane):
        """Fill the ring with this warpgroup's of so many stages, as fast as it is read."""
        parts = T.meta_var(self.loads.parts)
        warp: T.let = self.thread // 32
        count: T.let = (stages - self.number + self.producers - 1) // self.producers
        self.at.start()
        self.at.stage = self.number
        # Each warp asks for every fourth of these stages.
        self.ask(warp, lane)
        self.load(0, 0)
        for pair in T.serial((count * parts + 1) // 2):
            for buffer in T.unroll(2):
                piece: T.let = pair * 2 + buffer
                if piece < count * parts:
                    if piece % parts == 0:
                        if piece // parts % WARPS == warp:
                            self.ask(piece // parts + WARPS, lane)
                    # The next one's loads are on their way while this one is stored.
                    if piece + 1 < count * parts:
                        self.load(1 - buffer, piece + 1)
                    if piece % parts == 0:
                        self.ring.wait_read(self.at)
                    self.store(buffer, piece)
                    if piece % parts == parts - 1:
                        self.ring.written(self.at, lane)
                        self.at.skip(self.producers)


@T.meta_class
class Reader:
    """A warp's way through the ring: stages that it waited for, and that it gave back."""

    def __init__(self, ring: Ring, lane):
        self.ring, self.lane = ring, lane
        self.rows = ring.geometry.config.rows
        self.next, self.oldest = Position(ring.stages), Position(ring.stages)
        self.seen = T.local_scalar("int32")
        self.done = T.local_scalar("int32")

    @T.inline
    def start(self):
        self.next.start()
        self.oldest.start()
        self.seen = 0
        self.done = 0

    @T.inline
    def wait(self, stages):
        """Until so many stages, counted from the first, have been written."""
        count: T.let = stages
        while self.seen < count:
            self.ring.wait_written(self.next)
            self.next.advance()
            self.seen = self.seen + 1

    @T.inline
    def give_back(self, stages):
        """So many stages, counted from the first, are needed no more."""
        # All lanes have what they read.
        T.cuda.warp_sync()
        count: T.let = stages
        while self.done < count:
            # What was never needed is still to be waited for: a stage is given back once a turn.
            if self.done == self.seen:
                self.ring.wait_written(self.next)
                self.next.advance()
                self.seen = self.seen + 1
            self.ring.read(self.oldest, self.lane)
            self.oldest.advance()
            self.done = self.done + 1
