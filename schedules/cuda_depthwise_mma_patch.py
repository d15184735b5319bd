"""The input of a block of `cuda_depthwise_mma` in shared memory: planes of rows.

Whatever the layout of x, a channel of an image is a plane, its rows an odd number of 16-byte pieces
apart, so that eight rows begin in eight different groups of banks. Behind the end of a row there
are zeros, up to a whole piece; beyond the first and the last row there is nothing: who reads there
takes the piece of zeros at the end of all.
"""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from .cuda_depthwise_mma_tiles import CHUNK, LINES, Geometry


@T.meta_class
class Patch:
    """Rows of some channels of some images, from `first_in` on."""

    def __init__(self, geometry: Geometry, x, memory, corner):
        """x, memory: flat; corner: first image, channel and row of the input."""
        g = self.geometry = geometry
        self.x, self.memory = x, memory
        self.image, self.channel, self.row = corner
        self.channels, self.threads = g.config.channels, g.config.threads
        # Elements of one copy, copies of a row (NHWC: of all channels), and of the patch.
        self.each = CHUNK if g.problem.channels_last else g.copy
        if g.problem.channels_last:
            self.row_copies = g.pieces * self.channels
        else:
            self.row_copies = self.channels * g.pieces * CHUNK // self.each
        self.copies = g.config.images * g.patch_rows * self.row_copies

    def zero(self):
        return T.Cast(self.geometry.problem.dtype, T.float32(0))

    def holds(self, image, channel, row):
        """Whether x has it."""
        g = self.geometry
        return T.And(
            T.And(image < g.config.images, self.image + image < g.batch),
            T.And(self.row + row < g.height, self.channel + channel < g.channels),
        )

    def at(self, image, channel, row):
        """Where a row begins in shared memory."""
        g = self.geometry
        return (image * self.channels + channel) * g.plane + row * g.pitch

    def source(self, image, channel, row, column):
        """Of an element in x."""
        g = self.geometry
        image, channel, row = self.image + image, self.channel + channel, self.row + row
        if g.problem.channels_last:
            return ((image * g.height + row) * g.width + column) * g.channels + channel
        return ((image * g.channels + channel) * g.height + row) * g.width + column

    @T.inline
    def load(self, thread):
        """All threads of the block; they have to meet before they read."""
        g = T.meta_var(self.geometry)
        if thread < CHUNK:
            self.memory[g.zeros + thread] = self.zero()
        for k in T.serial(-(-self.copies // self.threads)):
            at: T.let = k * self.threads + thread
            row: T.let = at // self.row_copies % g.patch_rows
            image: T.let = at // (self.row_copies * g.patch_rows)
            if g.problem.channels_last:
                self.turn(image, at % (self.channels // CHUNK) * CHUNK, row,
                          at % self.row_copies // (self.channels // CHUNK))
            else:
                pieces = T.meta_var(self.row_copies // self.channels)
                # Neighbouring threads have neighbouring pieces, then rows, then channels.
                within: T.let = at % (self.row_copies * g.patch_rows)
                self.copy(image, within // (pieces * g.patch_rows), within // pieces % g.patch_rows,
                          within % pieces * self.each)
        T.ptx["cp.async.commit_group"]()
        T.ptx["cp.async.wait_group"](0)

    @T.inline
    def copy(self, image, channel, row, column):
        """Neighbours of a row, by an asynchronous copy where it can be as short."""
        g = T.meta_var(self.geometry)
        if self.holds(image, channel, row):
            into: T.let = self.at(image, channel, row) + column
            source: T.let = self.source(image, channel, row, column)
            if self.each == 1:
                self.memory[into] = T.if_then_else(column < g.width, self.x[source], self.zero())
            else:
                T.ptx["cp.async.cg.shared.global" if self.each == CHUNK
                      else "cp.async.ca.shared.global"](
                    self.memory.ptr_to([into]), self.x.ptr_to([source]), self.each * 2,
                    T.if_then_else(column < g.width, T.uint32(self.each * 2), T.uint32(0)))

    @T.inline
    def turn(self, image, channel, row, column):
        """Eight channels of a pixel, one to each of eight planes."""
        g = T.meta_var(self.geometry)
        vector = T.alloc_local((CHUNK,), g.problem.dtype)
        if self.holds(image, channel, row):
            for e in T.unroll(CHUNK):
                vector[e] = self.zero()
            if column < g.width:
                source: T.let = self.source(image, channel, row, column) // CHUNK
                for e in T.vectorized(CHUNK):
                    vector[e] = self.x[source * CHUNK + e]
            for e in T.unroll(CHUNK):
                self.memory[self.at(image, channel + e, row) + column] = vector[e]

    @T.inline
    def read(self, pieces, image, channel, row, lane):
        """Pieces of eight rows, from `row` on, of which lane 4 r + t gets two elements of row r.

        pieces: registers, of all pieces of a row behind `odd` of them that hold nothing of use.
        """
        g = T.meta_var(self.geometry)
        mine = T.meta_var(row + lane % LINES)
        inside: T.let = T.And(T.And(mine >= 0, mine < g.height), self.image + image < g.batch)
        line: T.let = T.if_then_else(inside, self.at(image, channel, mine - self.row), g.zeros)
        for i in T.unroll(g.loads):
            piece = T.meta_var(T.max(T.min(i * 4 + lane // LINES - g.odd, g.pieces - 1), 0))
            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                pieces[i * 4], pieces[i * 4 + 1], pieces[i * 4 + 2], pieces[i * 4 + 3],
                self.memory.ptr_to([line + T.if_then_else(inside, piece * CHUNK, 0)]))
