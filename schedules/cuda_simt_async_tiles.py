"""A configuration of `cuda_simt_async`, and what it amounts to on a problem."""

from dataclasses import dataclass

from ..expr import KAxes, gemm_sizes, k_axes
from ..problem import ConvProblem

WARP = 32
VECTOR = 4  # words of one 128-bit access
# Words after each row of the window tile where neighbouring lanes write down a column of it:
# 8 rows of 4 words then fall on 32 different banks.
PADDING = 4
# A table entry of a padded problem holds row and column of its tap in 15 bits each.
MAX_TABLE_SIZE = 2**15


@dataclass(frozen=True)
class Config:
    """Tiles and their pipeline.

    block_m, block_p, block_k: output channels, output pixels and window elements of a tile.
    thread_m, thread_p: outputs of a thread, in groups of four. stages: tiles of the ring in
    shared memory, all but one on their way. split: blocks that share the K of a tile. taps: a
    tile of K is `block_k` channels of one tap; otherwise `block_k` neighbours of a window as
    it lies in memory, through the table. blocks: blocks a multiprocessor has to have registers for.
    """

    block_m: int
    block_p: int
    block_k: int
    thread_m: int
    thread_p: int
    stages: int = 3
    split: int = 1
    taps: bool = True
    blocks: int = 1

    @property
    def threads(self) -> int:
        return (self.block_m // self.thread_m) * (self.block_p // self.thread_p)


def reduction(problem: ConvProblem, c: Config, explicit: bool) -> KAxes:
    """The order of K: neighbours in it are neighbours in what the kernel reads."""
    order = "blocks" if c.taps else "window" if explicit else "rows"
    return k_axes(problem, c.block_k, order)


def k_tiles(problem: ConvProblem, c: Config) -> int:
    axes = reduction(problem, c, False)
    return axes.outer * axes.inner // c.block_k


def packed_elements(problem: ConvProblem, c: Config) -> int:
    """Of the filter in whole tiles."""
    sizes = gemm_sizes(problem)
    return sizes.groups * -(-sizes.m // c.block_m) * c.block_m * k_tiles(problem, c) * c.block_k


def shared_words(c: Config, problem: ConvProblem, padded: bool) -> tuple[int, int]:
    """Words of the ring (or, later, of the block's sums), and of the table."""
    pitch = c.block_p + (PADDING if problem.channels_last else 0)
    ring = c.stages * c.block_k * (c.block_m + pitch)
    if c.split > 1:
        ring = max(ring, c.block_m * c.block_p)
    if c.taps:
        return ring, 0
    return ring, k_tiles(problem, c) * c.block_k * (2 if padded else 1)


def lanes_of_m(c: Config, problem: ConvProblem) -> int | None:
    """Lanes of a warp that differ in channels; the others differ in pixels.

    128 bytes of the output are 8 lanes along its innermost axis, and 4 by 8 lanes read the fewest
    words of shared memory. None: the threads do not divide into such rectangles.
    """
    rows, columns = c.block_m // c.thread_m, c.block_p // c.thread_p
    for lanes in (8, 4, 2, 1) if problem.channels_last else (4, 2, 8, 1):
        if rows % lanes == 0 and columns % (WARP // lanes) == 0:
            return lanes
    return None


def pixel_steps(c: Config, problem: ConvProblem) -> int:
    """Pixels whose windows a thread copies from: see the copies of `convolve`."""
    if problem.channels_last:
        return -(-(c.block_p // 4) // (c.threads // WARP))
    return -(-c.block_p // WARP)
