"""A configuration of `cuda_window`, and what it amounts to on a problem."""

from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod

from ..problem import ConvProblem
from .cuda_channels_last import padded_channels
from .hopper import ATOM_BYTES, ATOM_ROWS, ROW_BYTES, WARPGROUP, WGMMA_K_BYTES, WGMMA_M, TensorMap

# Pixels that a warpgroup turns from sums into outputs at a time, in its part of shared memory.
STAGED_PIXELS = 32
# Shared memory that a block may take, and a multiprocessor's for all its blocks, each of which
# takes 1 KiB more (CUDA C++ Programming Guide, compute capability 9.0).
BLOCK_BYTES, MULTIPROCESSOR_BYTES, SYSTEM_BYTES = 227 * 1024, 228 * 1024, 1024


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Config:
    """Tiles of warpgroups, and how they are fed.

    tile_n, tile_h, tile_w: images, rows and columns of the outputs of one warpgroup, times 64
    channels. images: in shared memory the images of a tile are neighbours; without, its columns
    are. Eights of neighbours make a matrix: of images, or of columns, all of them in one row or
    eight a row. along_m, along_p: warpgroups side by side, along channels and along rows (or along
    columns if tile_h is 1 and columns are neighbours). turns: the two warpgroups do not share a
    tile but take turns, one multiplies while the other stores. taps: those that one copy of the
    input serves: "window" all, "row" those of a row of the window, "tap" one. dense: with a stride,
    copies bring what lies between its steps too, and serve taps of all classes (see Geometry);
    columns of a tile are apart then, so that its matrices are of eight images. pixel_stages,
    filter_stages: copies of the input, and tiles of the filter, in their rings; filter_stages 0
    keeps the whole filter of 64 * along_m channels. split: blocks of a cluster that divide K.
    blocks: blocks that share a multiprocessor.
    """

    tile_n: int
    tile_h: int
    tile_w: int
    images: bool = False
    along_m: int = 1
    along_p: int = 1
    turns: bool = False
    taps: str = "window"
    dense: bool = False
    pixel_stages: int = 2
    filter_stages: int = 4
    split: int = 1
    blocks: int = 1

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 2 if self.turns else self.along_m * self.along_p

    @property
    def threads(self) -> int:
        """A producing warpgroup and the consuming ones."""
        return WARPGROUP * (1 + self.consumers)

    @property
    def block_m(self) -> int:
        """Channels of a tile of the filter."""
        return WGMMA_M * self.along_m

    @property
    def pieces(self) -> int:
        """Matrices of a warpgroup, one product each: their rows do not lie at equal distances."""
        return self.tile_h if self.images else self.tile_n

    @property
    def piece_n(self) -> int:
        """Pixels of such a matrix."""
        return self.tile_n * self.tile_w if self.images else self.tile_h * self.tile_w

    @property
    def pixels(self) -> int:
        """Of a warpgroup."""
        return self.pieces * self.piece_n

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.pixels * WGMMA_M // WARPGROUP

    @property
    def columns_apart(self) -> bool:
        """Whether warpgroups are side by side along columns."""
        return not self.images and self.tile_h == 1


class Geometry:
    """Sizes that follow from a problem and a configuration.

    The input is copied in steps of the stride: with a stride of s, taps u and u + s of the window
    read neighbours of one grid, taps u and u + 1 read different grids. So taps are taken by class,
    u modulo s, and one copy brings what several taps of a class read. Along an axis where outputs
    may lie apart in shared memory a dense copy brings all grids, and there is one class.
    """

    def __init__(self, problem: ConvProblem, config: Config):
        p, c = problem, config
        self.problem, self.config = p, c
        self.batch, (self.height, self.width) = p.batch, p.input_size
        self.rows, self.columns = p.output_size
        self.taps_h, self.taps_w = p.kernel_size
        # Steps that are never taken count as 1: they may be longer than a copy can take.
        self.stride_h, self.stride_w = (
            s if n > 1 else 1 for s, n in zip(p.stride, p.output_size, strict=True)
        )
        self.step_h, self.step_w = (
            d if n > 1 else 1 for d, n in zip(p.dilation, p.kernel_size, strict=True)
        )
        # From output to output in the patch; from tap to tap of a class, and so from row to row or
        # column to column of what is copied.
        self.dense_h = c.dense and c.taps == "window" and self.stride_h > 1
        self.dense_w = c.dense and c.taps != "tap" and c.images and self.stride_w > 1
        self.spread_h, self.class_h = (self.stride_h, 1) if self.dense_h else (1, self.stride_h)
        self.spread_w, self.class_w = (self.stride_w, 1) if self.dense_w else (1, self.stride_w)
        self.classes_h = min(self.class_h, self.taps_h)
        self.classes_w = min(self.class_w, self.taps_w)
        # Taps of the largest class, and of a copy.
        self.most_h, self.most_w = (
            _ceil(self.taps_h, self.class_h),
            _ceil(self.taps_w, self.class_w),
        )
        self.copy_h = self.most_h if c.taps == "window" else 1
        self.copy_w = 1 if c.taps == "tap" else self.most_w

        # A block's tile, and the patch of the input behind it.
        self.block_n = c.tile_n
        self.block_h = c.tile_h * (1 if c.columns_apart else c.along_p)
        self.block_w = c.tile_w * (c.along_p if c.columns_apart else 1)
        self.patch_h = (self.block_h - 1) * self.spread_h + (self.copy_h - 1) * self.step_h + 1
        self.patch_w = (self.block_w - 1) * self.spread_w + (self.copy_w - 1) * self.step_w + 1
        self.patch_bytes = self.block_n * self.patch_h * self.patch_w * ROW_BYTES

        # Rows of shared memory from one thing to the next.
        column, row = (c.tile_n, c.tile_n * self.patch_w) if c.images else (1, self.patch_w)
        self.tap_row, self.tap_column = self.step_h * row, self.step_w * column
        self.piece_rows = row * self.spread_h if c.images else self.patch_h * self.patch_w
        if c.images:
            self.group_rows = ATOM_ROWS * self.spread_w
        else:
            self.group_rows = row * self.spread_h if c.tile_h > 1 else ATOM_ROWS
        self.warpgroup_rows = c.tile_w if c.columns_apart else c.tile_h * row * self.spread_h

        # Channels: of the input in rows of 128 bytes, of the output in tiles of the block.
        self.groups = p.groups
        self.channels = padded_channels(p)
        self.per_group = p.out_channels // p.groups
        self.row_channels = ROW_BYTES // p.itemsize
        self.channel_rows = _ceil(self.channels, self.row_channels)
        last = self.channels - (self.channel_rows - 1) * self.row_channels
        self.last_steps = _ceil(last * p.itemsize, WGMMA_K_BYTES)
        self.m_tiles = _ceil(self.per_group, c.block_m)
        self.n_tiles = _ceil(self.batch, self.block_n)
        self.h_tiles = _ceil(self.rows, self.block_h)
        self.w_tiles = _ceil(self.columns, self.block_w)
        self.tiles = p.groups * self.m_tiles * self.n_tiles * self.h_tiles * self.w_tiles
        self.filter_bytes = c.block_m * ROW_BYTES

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """The taps (u, v) of a row of channels as the kernel takes them: by class."""
        sh, sw = self.class_h, self.class_w
        taps = [(u, v) for u in range(self.taps_h) for v in range(self.taps_w)]
        return sorted(taps, key=lambda t: (t[0] % sh, t[1] % sw, t[0] // sh, t[1] // sw))

    @property
    def copies(self) -> int:
        """Of the input, for one tile of outputs."""
        by_class = [
            sum(_ceil(_ceil(taps - r, every), each) for r in range(min(every, taps)))
            for taps, every, each in (
                (self.taps_h, self.class_h, self.copy_h),
                (self.taps_w, self.class_w, self.copy_w),
            )
        ]
        return self.channel_rows * prod(by_class)

    @property
    def filter_tiles(self) -> int:
        """Of a tile of output channels: a row of channels of a tap each."""
        return self.channel_rows * len(self.order)

    @property
    def filter_stages(self) -> int:
        """Of the ring, or of the whole filter."""
        return self.config.filter_stages or self.filter_tiles

    @property
    def stage_bytes(self) -> int:
        """Of a copy of the input, in whole atoms."""
        return _ceil(self.patch_bytes, ATOM_BYTES) * ATOM_BYTES

    @property
    def staged(self) -> bool:
        """Whether outputs go through shared memory: of 16 bits, in runs that y has as well."""
        p = self.problem
        runs = self.per_group % 8 == 0 if p.channels_last else not self.config.images
        return p.itemsize == 2 and runs

    @property
    def pairs(self) -> str | None:
        """Of what a thread holds two that are neighbours in y, and aligned: or None."""
        if self.problem.channels_last:
            return "channels" if self.per_group % 2 == 0 else None
        columns = not self.config.images and self.columns % 2 == 0
        return "pixels" if columns else None

    @property
    def alignment(self) -> int:
        """Of y and the residual, in bytes."""
        size = self.problem.itemsize
        if self.staged:
            return 16 if self.problem.channels_last else size * gcd(8, self.columns)
        return 2 * size if self.pairs else size

    @property
    def staging_bytes(self) -> int:
        """Of a warpgroup's outputs on their way: two buffers."""
        return 2 * STAGED_PIXELS * WGMMA_M * self.problem.itemsize if self.staged else 0

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        c = self.config
        barriers = 16 * (c.pixel_stages + self.filter_stages) + 64
        rings = c.pixel_stages * self.stage_bytes + self.filter_stages * self.filter_bytes
        return rings + c.consumers * self.staging_bytes + barriers

    @property
    def tensor_map(self) -> TensorMap:
        """Of x: channels of a group, groups, and then images or columns first."""
        size = self.problem.itemsize
        pixel = self.groups * self.channels * size
        image = (self.batch, self.height * self.width * pixel, self.block_n, 1)
        row = (self.height, self.width * pixel, self.patch_h, self.class_h)
        column = (self.width, pixel, self.patch_w, self.class_w)
        outer = (image, column, row) if self.config.images else (column, row, image)
        group = (self.groups, self.channels * size, 1, 1)
        axes = [(self.channels, size, self.row_channels, 1), group]
        sizes, strides, box, steps = zip(*axes, *outer, strict=True)
        return TensorMap(sizes, strides[1:], box, steps)
