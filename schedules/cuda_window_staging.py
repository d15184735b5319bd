"""Shared memory in which a warpgroup of `cuda_window` turns its outputs round.

The sums of a warpgroup are 64 channels by some pixels, in pieces of 8 x 8 over the lanes of a warp.
stmatrix writes such a piece as eight rows of 16 bytes: of pixels, with eight channels each, for
NHWC; of channels, with eight pixels each, for NCHW. Threads then take runs out of it that are runs
in memory too.
"""

from math import gcd

from tvm.script import tirx as T

from .cuda_window_tiles import STAGED_PIXELS, Geometry
from .hopper import WARPGROUP, WGMMA_M

# Elements of 16 bits in a row of a piece.
PIECE = 8


@T.meta_class
class Staging:
    """Two buffers of STAGED_PIXELS by 64 channels; `width` elements are moved at a time."""

    def __init__(self, geometry: Geometry, memory, warpgroup):
        self.memory, self.warpgroup = memory, warpgroup
        self.by_pixel = geometry.problem.channels_last
        # A row of y in NCHW may begin anywhere.
        self.width = PIECE if self.by_pixel else gcd(PIECE, geometry.columns)
        self.transposed = ".trans" if self.by_pixel else ""

    def first(self, buffer):
        """Element of a buffer."""
        return (self.warpgroup * 2 + buffer) * (STAGED_PIXELS * WGMMA_M)

    def place(self, buffer, column, channel):
        """Of a pixel's channel, the first of a run of either within its eight.

        Pieces of a row are exchanged by the number of the row, so that neither those who write
        matrices nor those who take runs out meet in a bank.
        """
        if self.by_pixel:
            piece = T.bitwise_xor(channel // PIECE, column % 8)
            return self.first(buffer) + column * WGMMA_M + piece * PIECE + channel % PIECE
        # Two rows of 32 pixels are one row of banks.
        piece = T.bitwise_xor(column // PIECE, channel // 2 % (STAGED_PIXELS // PIECE))
        return self.first(buffer) + channel * STAGED_PIXELS + piece * PIECE + column % PIECE

    def matrices(self, buffer, eight, warp, lane):
        """Address that a lane gives of two pieces: of an eight of pixels, and 16 channels of it."""
        row, second = lane % 8, lane // 8 % 2
        if self.by_pixel:
            at = self.place(buffer, eight * 8 + row, warp * 16 + second * 8)
        else:
            at = self.place(buffer, eight * 8, warp * 16 + second * 8 + row)
        return self.memory.ptr_to([at])

    def turns(self, eights: int) -> int:
        """In which a warpgroup's threads move so many eights of pixels."""
        return -(-eights * 8 * WGMMA_M // (self.width * WARPGROUP))

    def run_of(self, thread, turn, eights: int):
        """Pixel and channel at which a thread's run begins in a turn, and whether it has one."""
        number = turn * WARPGROUP + thread
        if self.by_pixel:
            runs = WGMMA_M // self.width
            return number // runs, number % runs * self.width, number < eights * 8 * runs
        runs = eights * 8 // self.width
        return number % runs * self.width, number // runs, number < WGMMA_M * runs
