"""From the sums of a warpgroup to outputs in memory: the last step of `cuda_window`.

A thread holds, of every eight pixels (columns of the product), two neighbouring ones in each of two
channels (rows). Outputs of 16 bits go through shared memory, which turns them round (Staging), and
leave in long runs; others go straight from registers.
"""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish
from .cuda_window_staging import PIECE, Staging
from .cuda_window_tiles import STAGED_PIXELS, Geometry
from .hopper import WARPGROUP

# Eights of pixels that are staged at a time.
EACH = STAGED_PIXELS // 8


class _At:
    """One element of an array as an array of one, for `finish`."""

    def __init__(self, array, index):
        self._array, self._index = array, index

    def __getitem__(self, _index):
        return self._array[self._index]


@T.meta_class
class Store:
    """Bias, residual, activation, rounding, and the way to y, of one warpgroup."""

    def __init__(self, geometry: Geometry, epilogue: Epilogue, staging, warpgroup, arrays):
        self.geometry, self.epilogue, self.staged = geometry, epilogue, geometry.staged
        problem = geometry.problem
        self.per_group, self.channels = geometry.per_group, problem.out_channels
        self.plane = geometry.rows * geometry.columns
        # Sums, bias and residual are added in float32, and rounded once.
        self.sum_problem = problem.replace(dtype="float32")
        self.bias, self.residual, self.y = arrays
        self.warpgroup = warpgroup
        self.bias_of = T.alloc_local((2,), problem.dtype)
        self.pack = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}.get(
            problem.dtype
        )
        if self.staged:
            self.words = T.alloc_local((4,), "uint32")
            self.extra = T.alloc_local((4,), "uint32")
            self.run_of = T.alloc_local((PIECE,), problem.dtype)
            self.staging = Staging(geometry, staging, warpgroup)

    def place(self, tile, column):
        """Image, row and output column of a pixel of the warpgroup, and whether they are inside."""
        g, c = self.geometry, self.geometry.config
        piece, within = column // c.piece_n, column % c.piece_n
        if c.images:
            n, h, w = tile.n + within % c.tile_n, tile.h + piece, tile.w + within // c.tile_n
        else:
            n, h, w = tile.n + piece, tile.h + within // c.tile_w, tile.w + within % c.tile_w
        inside = T.And(T.And(n < g.batch, h < g.rows), w < g.columns)
        return n, h * g.columns + w, inside

    def index(self, n, pixel, channel):
        """Of an output in y."""
        if self.geometry.problem.channels_last:
            return (n * self.plane + pixel) * self.channels + channel
        return (n * self.channels + channel) * self.plane + pixel

    def finished(self, total, half, extra):
        """The float32 output of a sum in the thread's row `half`."""
        return finish(
            total, half, [0], self.sum_problem, self.epilogue, self.bias_of, extra
        )

    @T.inline
    def load_bias(self, tile, thread):
        """The bias of this thread's two rows."""
        if self.epilogue.bias:
            for half in T.unroll(2):
                m: T.let = tile.m + self.channel_of(thread, half)
                self.bias_of[half] = self.bias[tile.group * self.per_group
                                               + T.min(m, self.per_group - 1)]

    def channel_of(self, thread, half):
        """Of the thread's row `half` among the warpgroup's 64."""
        warp, lane_row = thread // 32, thread % 32 // 4
        if self.staged:
            return warp * 16 + half * 8 + lane_row
        return warp * 16 + lane_row * 2 + half

    @T.inline
    def direct(self, tile, thread, sums, first, groups):
        """Eights of pixels from `first` on, straight from registers, two outputs at a time."""
        out = T.alloc_local((2,), self.geometry.problem.dtype)
        extra = T.alloc_local((2,), self.geometry.problem.dtype)
        self.load_bias(tile, thread)
        m: T.let = tile.m + self.channel_of(thread, 0)
        channel: T.let = tile.group * self.per_group + m
        apart = T.meta_var(1 if self.geometry.problem.channels_last else self.plane)
        for j in T.unroll(groups):
            if self.geometry.pairs == "channels":
                for e in T.unroll(2):
                    column = T.meta_var((first + j) * 8 + thread % 4 * 2 + e)
                    n, pixel, inside = T.meta_var(self.place(tile, column))
                    if T.And(T.And(inside, m < self.per_group),
                             column < self.geometry.config.pixels):
                        at: T.let = self.index(n, pixel, channel) // 2
                        self.pair(out, extra, at, [sums[j * 4 + e], sums[j * 4 + 2 + e]], [0, 1])
            elif self.geometry.pairs == "pixels":
                column = T.meta_var((first + j) * 8 + thread % 4 * 2)
                n, pixel, inside = T.meta_var(self.place(tile, column))
                for half in T.unroll(2):
                    if T.And(T.And(inside, m + half < self.per_group),
                             column < self.geometry.config.pixels):
                        at: T.let = self.index(n, pixel, channel + half) // 2
                        self.pair(out, extra, at,
                                  [sums[j * 4 + half * 2], sums[j * 4 + half * 2 + 1]],
                                  [half, half])
            else:
                for e in T.unroll(2):
                    column = T.meta_var((first + j) * 8 + thread % 4 * 2 + e)
                    n, pixel, inside = T.meta_var(self.place(tile, column))
                    for half in T.unroll(2):
                        if T.And(inside, T.And(m + half < self.per_group,
                                               column < self.geometry.config.pixels)):
                            into: T.let = self.index(n, pixel, channel) + half * apart
                            if self.epilogue.residual:
                                extra[0] = self.residual[into]
                            self.y[into] = T.Cast(
                                self.geometry.problem.dtype,
                                self.finished(sums[j * 4 + half * 2 + e], half, extra))

    @T.inline
    def pair(self, out, extra, at, totals, halves):
        """Two neighbours of y, from its element 2 at on; the sums, and the row of each."""
        if self.epilogue.residual:
            for i in T.vectorized(2):
                extra[i] = self.residual[at * 2 + i]
        out[0] = T.Cast(self.geometry.problem.dtype,
                        self.finished(totals[0], halves[0], _At(extra, 0)))
        out[1] = T.Cast(self.geometry.problem.dtype,
                        self.finished(totals[1], halves[1], _At(extra, 1)))
        for i in T.vectorized(2):
            self.y[at * 2 + i] = out[i]

    @T.inline
    def run(self, tile, thread, sums, first, groups):
        """Store the eights of pixels from `first` on; `sums` begins with theirs."""
        if self.staged:
            self.exchange(tile, thread, sums, first, groups)
        else:
            self.direct(tile, thread, sums, first, groups)

    @T.inline
    def exchange(self, tile, thread, sums, first, groups):
        """Eights of pixels from `first` on, STAGED_PIXELS at a time, through shared memory."""
        self.load_bias(tile, thread)
        # Those who still read the last tile's outputs come first.
        self.meet()
        for part in T.unroll(groups // EACH):
            self.exchange_part(tile, thread, sums, first, part, EACH)
        if groups % EACH > 0:
            self.exchange_part(tile, thread, sums, first, groups // EACH, groups % EACH)

    @T.inline
    def meet(self):
        """The threads of this warpgroup wait for each other."""
        T.ptx.bar.sync(T.Cast("uint32", self.warpgroup + 1), T.uint32(WARPGROUP))

    @T.inline
    def exchange_part(self, tile, thread, sums, first, part, groups):
        warp: T.let = thread // 32
        lane: T.let = thread % 32
        buffer = T.meta_var(part % 2)
        staging = T.meta_var(self.staging)
        if self.epilogue.residual:
            # The residual takes the way of the outputs backwards.
            for i in T.unroll(staging.turns(groups)):
                self.fetch(tile, thread, buffer, first + part * EACH, groups, i)
            self.meet()
        for j in T.unroll(groups):
            at = T.meta_var(staging.matrices(buffer, j, warp, lane))
            sum_at = T.meta_var((part * EACH + j) * 4)
            if self.epilogue.residual:
                T.ptx["ldmatrix.sync.aligned.m8n8.x2" + staging.transposed + ".shared.b16"](
                    self.extra[0], self.extra[1], at)
                # What the lanes have read is theirs to overwrite together.
                T.cuda.warp_sync()
            for half in T.unroll(2):
                T.ptx[self.pack](
                    self.words[half],
                    self.finished(sums[sum_at + half * 2 + 1], half, self.residual_of(half, 1)),
                    self.finished(sums[sum_at + half * 2], half, self.residual_of(half, 0)))
            T.ptx["stmatrix.sync.aligned.m8n8.x2" + staging.transposed + ".shared.b16"](
                at, self.words[0], self.words[1])
        # Everybody's outputs are there; with two buffers the next ones need not wait.
        self.meet()
        for i in T.unroll(staging.turns(groups)):
            self.put(tile, thread, buffer, first + part * EACH, groups, i)

    def residual_of(self, half, e):
        """One element of what ldmatrix brought, as an array of one."""
        if not self.epilogue.residual:
            return None
        pair = T.shift_right(self.extra[half], T.uint32(16 * e))
        bits = T.Cast("uint16", T.bitwise_and(pair, T.uint32(0xFFFF)))
        return _At([T.reinterpret(self.geometry.problem.dtype, bits)], 0)

    def run_at(self, tile, thread, group, groups, turn):
        """A thread's run in a turn: pixel, channel, place in y in runs, has it one, has y it."""
        column, channel, mine = self.staging.run_of(thread, turn, groups)
        n, pixel, inside = self.place(tile, group * 8 + column)
        m = tile.m + channel
        # In runs, so that the compiler sees the alignment.
        at = self.index(n, pixel, tile.group * self.per_group + m) // self.staging.width
        inside = T.And(T.And(inside, m < self.per_group),
                       group * 8 + column < self.geometry.config.pixels)
        return column, channel, at, mine, inside

    @T.inline
    def fetch(self, tile, thread, buffer, group, groups, turn):
        """A run of this thread from the residual to staging; zeros from outside."""
        width = T.meta_var(self.staging.width)
        column, channel, at, mine, inside = T.meta_var(
            self.run_at(tile, thread, group, groups, turn))
        if mine:
            for e in T.vectorized(width):
                self.run_of[e] = T.Cast(self.geometry.problem.dtype, T.float32(0))
            if inside:
                run: T.let = at
                for e in T.vectorized(width):
                    self.run_of[e] = self.residual[run * width + e]
            for e in T.vectorized(width):
                self.staging.memory[self.staging.place(buffer, column, channel) + e] = (
                    self.run_of[e])

    @T.inline
    def put(self, tile, thread, buffer, group, groups, turn):
        """A run of this thread from staging to y."""
        width = T.meta_var(self.staging.width)
        column, channel, at, mine, inside = T.meta_var(
            self.run_at(tile, thread, group, groups, turn))
        if T.And(mine, inside):
            run: T.let = at
            for e in T.vectorized(width):
                self.y[run * width + e] = self.staging.memory[
                    self.staging.place(buffer, column, channel) + e]
