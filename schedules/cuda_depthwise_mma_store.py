"""From the sums of a warp to outputs in memory: the last step of `cuda_depthwise_mma`.

Outputs take the place of the patch in shared memory, as they lie in y (NCHW: whole runs; NHWC:
planes, of which eight are gathered for a vector), and leave in vectors of 16 bytes.
"""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish
from .cuda_depthwise_mma_tiles import CHUNK, COLUMNS, LINES, WARP, Geometry


@T.meta_class
class Store:
    """Bias, residual, activation, rounding, and the way to y, of a block."""

    def __init__(self, geometry: Geometry, epilogue: Epilogue, memory, corner, arrays):
        """corner: first image, channel and row of the outputs. arrays: flat, but for the bias."""
        g = self.geometry = geometry
        self.epilogue, self.memory = epilogue, memory
        self.image, self.channel, self.row = corner
        self.x, self.packed, self.bias, self.residual, self.y = arrays
        self.last, self.channels = g.problem.channels_last, g.config.channels
        self.plane = g.rows * g.columns
        # Runs are whole images' channels, or one channel's rows.
        self.whole = g.bands == 1
        self.again = T.alloc_local((2,), "float32")
        self.found = T.alloc_local((1,), "int32")

    def place(self, image, channel, row, column):
        """Of an output in y."""
        g = self.geometry
        if self.last:
            return ((image * g.rows + row) * g.columns + column) * g.channels + channel
        return (image * g.channels + channel) * self.plane + row * g.columns + column

    def begin(self, image, warp):
        """Where the outputs of an image and a warp's channel begin in shared memory."""
        g = self.geometry
        if self.last:
            return (image * self.channels + warp) * g.run_pitch
        if self.whole:
            first = self.place(self.image + image, self.channel, 0, 0)
            return image * g.run_pitch + warp * self.plane + first % CHUNK
        first = self.place(self.image + image, self.channel + warp, self.row, 0)
        return (image * self.channels + warp) * g.run_pitch + first % CHUNK

    @T.inline
    def leave(self, sums, warp, lane):
        """This warp's outputs, to shared memory that nobody else needs any more.

        A NaN may come of a product of zero with what no window of the output holds. Such outputs
        are computed again, from their own window.
        """
        g = T.meta_var(self.geometry)
        self.found[0] = 0
        for i in T.unroll(g.sums):
            self.put(i, warp, lane, sums[i], True)
            if T.isnan(sums[i]):
                self.found[0] = 1
        if self.found[0] != 0:
            for i in T.serial(g.sums):
                self.put(i, warp, lane, T.float32(0), False)

    @T.inline
    def put(self, i, warp, lane, value, fresh):
        """Sum number i of this thread; if not fresh, again where it is NaN."""
        g = T.meta_var(self.geometry)
        unit, tile, r = T.meta_var((i // (g.tiles * 4), i // 4 % g.tiles, i % 4))
        image = T.meta_var(unit // g.lines)
        row = T.meta_var(unit % g.lines * LINES + lane % 4 * 2 + r % 2)
        column = T.meta_var(tile * COLUMNS + lane // 4 + r // 2 * 8)
        if T.And(T.And(row < g.band, self.row + row < g.rows),
                 T.And(column < g.columns, self.image + image < g.batch)):
            at: T.let = self.place(
                self.image + image, self.channel + warp, self.row + row, column)
            into: T.let = self.begin(image, warp) + row * g.columns + column
            if fresh:
                self.memory[into] = finish(value, self.channel + warp, [at], g.problem,
                                           self.epilogue, self.bias, self.residual)
            else:
                if T.isnan(T.Cast("float32", self.memory[into])):
                    self.compute_again(
                        self.image + image, self.channel + warp, self.row + row, column)
                    self.memory[into] = finish(
                        self.again[0], self.channel + warp, [at], g.problem, self.epilogue,
                        self.bias, self.residual)

    @T.inline
    def compute_again(self, image, channel, row, column):
        """A sum, from x and the filter alone; zeros beyond the input count."""
        g = T.meta_var(self.geometry)
        self.again[0] = T.float32(0)
        for u in T.serial(g.taps_h):
            for v in T.serial(g.taps_w):
                at_row: T.let = row + u - g.top
                at_column: T.let = column + v - g.left
                self.again[1] = T.float32(0)
                if T.And(T.And(at_row >= 0, at_row < g.height),
                         T.And(at_column >= 0, at_column < g.width)):
                    self.again[1] = T.Cast("float32", self.x[
                        ((image * g.height + at_row) * g.width + at_column) * g.channels + channel
                        if self.last else
                        ((image * g.channels + channel) * g.height + at_row) * g.width
                        + at_column])
                # The first row of a part has its taps in lanes 0 to 3.
                tap: T.let = v - g.left - g.first_part * CHUNK
                self.again[0] = self.again[0] + self.again[1] * T.Cast("float32", self.packed[
                    channel * g.packed + (u * g.parts + tap // CHUNK) * (2 * WARP) + tap % CHUNK])

    @T.inline
    def run(self, thread):
        """To y; all threads of the block, after all outputs are there."""
        g = T.meta_var(self.geometry)
        threads = T.meta_var(g.config.threads)
        if self.last:
            stores = T.meta_var(g.config.images * g.band * g.columns * (self.channels // CHUNK))
            for k in T.serial(-(-stores // threads)):
                self.gather(k * threads + thread)
        else:
            for k in T.serial(-(-g.runs * g.run_vectors // threads)):
                self.copy(k * threads + thread)

    @T.inline
    def gather(self, at):
        """Eight channels of a pixel, from eight planes."""
        g = T.meta_var(self.geometry)
        vectors = T.meta_var(self.channels // CHUNK)
        vector = T.alloc_local((CHUNK,), g.problem.dtype)
        channel: T.let = at % vectors * CHUNK
        pixel: T.let = at // vectors % (g.band * g.columns)
        row: T.let = self.row + pixel // g.columns
        image: T.let = at // (vectors * g.band * g.columns)
        if T.And(T.And(image < g.config.images, self.image + image < g.batch),
                 T.And(row < g.rows, self.channel + channel < g.channels)):
            for e in T.unroll(CHUNK):
                vector[e] = self.memory[
                    (image * self.channels + channel + e) * g.run_pitch + pixel]
            target: T.let = self.place(
                self.image + image, self.channel + channel, row, pixel % g.columns) // CHUNK
            for e in T.vectorized(CHUNK):
                self.y[target * CHUNK + e] = vector[e]

    @T.inline
    def copy(self, at):
        """A vector of a run; where runs begin or end within it, element by element."""
        g = T.meta_var(self.geometry)
        run: T.let = at // g.run_vectors
        image: T.let = self.image + run // (1 if self.whole else self.channels)
        channel: T.let = self.channel + (0 if self.whole else run % self.channels)
        if T.And(T.And(run < g.runs, image < g.batch), channel < g.channels):
            start: T.let = self.place(image, channel, self.row, 0)
            end: T.let = start + (
                T.min(self.channels, g.channels - channel) * self.plane if self.whole
                else T.min(g.band, g.rows - self.row) * g.columns)
            target: T.let = start // CHUNK + at % g.run_vectors
            if T.And(target * CHUNK >= start, target * CHUNK + CHUNK <= end):
                for e in T.vectorized(CHUNK):
                    self.y[target * CHUNK + e] = self.memory[at * CHUNK + e]
            else:
                for e in T.unroll(CHUNK):
                    if T.And(target * CHUNK + e >= start, target * CHUNK + e < end):
                        self.y[target * CHUNK + e] = self.memory[at * CHUNK + e]
