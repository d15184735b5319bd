"""From the sums of a warpgroup of `cuda_thin` to outputs: 64 pixels by block_n channels.

Of every eight columns of the product a thread holds two neighbours, of two pixels. In NHWC the
filter's order has made a thread's columns a run of channels: they leave straight from registers, up
to 16 bytes at a time. In NCHW sums go through shared memory, and neighbouring threads store
neighbouring pixels of a channel, two each where an image has an even number of them.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from ..epilogue import Epilogue
from ..expr import finish
from .cuda_thin_filter import runs
from .cuda_thin_tiles import STAGED_CHANNELS, STAGED_PITCH, Geometry, split
from .hopper import WARPGROUP, WGMMA_M

WARPS = WARPGROUP // 32
# Channels of a staging buffer that one warp takes.
EACH = STAGED_CHANNELS // WARPS


class _At:
    """One element of an array as an array of one, for `finish`."""

    def __init__(self, array, index):
        self._array, self._index = array, index

    def __getitem__(self, _index):
        return self._array[self._index]


def place_of_row(g: Geometry, thread, half):
    """Of the tile's places the one that is the thread's row `half` of its fragments.

    With pairs it is one place for both halves, and a warp's are eight of two warps' sixteen.
    """
    lane_row, warp = thread % 32 // 4, thread // 32
    if g.config.pairs:
        warp, half = warp // 2, warp % 2
    row = lane_row * 2 + half if g.interleaved else lane_row + half * 8
    return warp * 16 + row


def pixel_of(g: Geometry, place, half):
    """The number of a pixel of a place, and whether there is one."""
    if not g.config.pairs:
        return place, place < g.pixels
    image, within = split(place, g.image_places)
    pair, column = split(within, g.columns)
    row = pair * 2 + half
    there = T.And(place < g.places, row < g.rows) if g.rows % 2 else place < g.places
    return image * g.image_pixels + row * g.columns + column, there


@T.meta_class
class Store:
    """Bias, residual, activation, rounding, and the way to y, of one warpgroup."""

    def __init__(self, geometry: Geometry, epilogue: Epilogue, bias, staging, warpgroup, arrays):
        self.geometry, self.epilogue = geometry, epilogue
        self.bias, self.staging, self.warpgroup = bias, staging, warpgroup
        self.residual, self.y = arrays
        problem = geometry.problem
        self.dtype, self.channels = problem.dtype, problem.out_channels
        # Sums, bias and residual are added in float32, and rounded once.
        self.sum_problem = problem.replace(dtype="float32")
        self.pack = {"float16": "cvt.rn.f16x2.f32", "bfloat16": "cvt.rn.bf16x2.f32"}.get(self.dtype)
        self.vector = geometry.vector
        self.out_words = self.vector * problem.itemsize // 4  # of a store; 0: half a word
        self.values = T.alloc_local((8,), "float32")
        self.words = T.alloc_local((4,), "uint32")
        self.extra = T.alloc_local((max(self.vector, 1),), self.dtype)

    def finished(self, total, channel, extra):
        """The float32 output of a sum; channel: of the block."""
        return finish(
            total, channel, [0], self.sum_problem, self.epilogue, self.bias, extra
        )

    @T.inline
    def run(self, tile, first_channel, thread, sums):
        """Store a tile's outputs, channels from `first_channel` on."""
        if self.geometry.problem.channels_last:
            self.direct(tile, first_channel, thread, sums)
        else:
            self.turned(tile, first_channel, thread, sums)

    # --- NHWC

    @T.inline
    def direct(self, tile, first_channel, thread, sums):
        for half in T.unroll(2):
            place = T.meta_var(
                tile * self.geometry.tile_places + place_of_row(self.geometry, thread, half))
            number, there = T.meta_var(pixel_of(self.geometry, place, half))
            pixel: T.let = number
            if there:
                self.runs(runs(self.geometry), pixel, first_channel, thread % 4, half, sums)

    @T.inline
    def runs(self, some, pixel, first_channel, t, half, sums):
        """The thread's runs of channels, the first of a list and then the others."""
        first, count = T.meta_var(some[0])
        each = T.meta_var(min(self.vector, 2 * count) if 2 * count % self.vector == 0
                          else 2 if self.vector % 2 == 0 else 1)
        self.one_run(first, count, each, pixel, first_channel, t, half, sums)
        if len(some) > 1:
            self.runs(some[1:], pixel, first_channel, t, half, sums)

    @T.inline
    def one_run(self, first, count, each, pixel, first_channel, t, half, sums):
        """A run of 2 * count channels, `each` at a time."""
        for part in T.unroll(2 * count // each):
            channel: T.let = first * 8 + 2 * count * t + part * each
            if first_channel + channel < self.channels:
                # In vectors, so that the compiler sees the alignment.
                at: T.let = (pixel * self.channels + first_channel + channel) // each
                if self.epilogue.residual:
                    for e in T.vectorized(each):
                        self.extra[e] = self.residual[at * each + e]
                for e in T.unroll(each):
                    sum_at = T.meta_var((first + (part * each + e) // 2) * 4 + half * 2
                                        + (part * each + e) % 2)
                    self.values[e] = self.finished(sums[sum_at], channel + e, _At(self.extra, e))
                self.put(at * each, each)

    @T.inline
    def put(self, at, each):
        """`each` values at an element of y."""
        if self.dtype == "float32":
            values = T.meta_var([self.values[e] for e in range(each)])
            vector = T.meta_var("" if each == 1 else f".v{each}")
            T.ptx[f"st.global.L1::no_allocate{vector}.f32"](self.y.ptr_to([at]), *values)
        elif each == 1:
            self.y[at] = T.Cast(self.dtype, self.values[0])
        else:
            for e in T.unroll(each // 2):
                T.ptx[self.pack](self.words[e], self.values[2 * e + 1], self.values[2 * e])
            words = T.meta_var([self.words[e] for e in range(each // 2)])
            vector = T.meta_var("" if each == 2 else f".v{each // 2}")
            T.ptx[f"st.global.L1::no_allocate{vector}.b32"](self.y.ptr_to([at]), *words)

    # --- NCHW

    @T.inline
    def meet(self):
        """The threads of this warpgroup wait for each other."""
        T.ptx.bar.sync(T.Cast("uint32", self.warpgroup + 1), T.uint32(WARPGROUP))

    @T.inline
    def turned(self, tile, first_channel, thread, sums):
        eights = T.meta_var(self.geometry.config.block_n // 8)
        each = T.meta_var(STAGED_CHANNELS // 8)
        # Those who still read the last tile's sums come first.
        self.meet()
        for part in T.unroll((eights + each - 1) // each):
            for j in T.unroll(each):
                for i in T.unroll(4):
                    if part * each + j < eights:
                        pixel = T.meta_var(place_of_row(self.geometry, thread, i // 2))
                        column = T.meta_var(j * 8 + thread % 4 * 2 + i % 2)
                        self.staging[self.place(part, column, pixel)] = (
                            sums[(part * each + j) * 4 + i])
            # Everybody's sums are there; with two buffers the next ones need not wait.
            self.meet()
            self.leave(tile, first_channel, part, thread)

    def place(self, part, channel, pixel):
        """Of a sum in the part's staging buffer."""
        buffer = self.warpgroup * 2 + part % 2
        return (buffer * STAGED_CHANNELS + channel) * STAGED_PITCH + pixel

    @T.inline
    def leave(self, tile, first_channel, part, thread):
        """A part's channels, each by one warp: its 64 pixels in runs of `vector`."""
        g, run = T.meta_var(self.geometry), T.meta_var(self.vector)
        for turn in T.unroll(2 // run):
            within: T.let = (turn * 32 + thread % 32) * run
            pixel: T.let = tile * WGMMA_M + within
            image, pixel_of_image = T.meta_var(split(pixel, g.image_pixels))
            begin: T.let = image * (self.channels * g.image_pixels) + pixel_of_image
            for i in T.unroll(EACH):
                column: T.let = thread // 32 * EACH + i
                channel: T.let = part * STAGED_CHANNELS + column
                if T.And(pixel < g.pixels, T.And(channel < g.config.block_n,
                                                 first_channel + channel < self.channels)):
                    # In vectors, so that the compiler sees the alignment.
                    at: T.let = (begin + (first_channel + channel) * g.image_pixels) // run
                    if self.epilogue.residual:
                        for e in T.vectorized(run):
                            self.extra[e] = self.residual[at * run + e]
                    for e in T.vectorized(run):
                        self.values[e] = self.staging[self.place(part, column, within) + e]
                    for e in T.unroll(run):
                        self.values[e] = self.finished(
                            self.values[e], channel, _At(self.extra, e))
                    self.put(at * run, run)
