"""Where a block of `cuda_window` is: its tile of outputs, and the taps that come next."""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from .cuda_window_tiles import Geometry
from .hopper import WGMMA_M


@T.meta_class
class Tile:
    """Where the outputs of a block, then of a warpgroup, begin."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        for name in ("filter", "group", "m", "n", "h", "w"):
            setattr(self, name, T.local_scalar("int32"))

    @T.inline
    def find(self, number):
        """Tiles that differ in their channels alone are neighbours: they read the same input."""
        g = T.meta_var(self.geometry)
        self.filter = number % (g.groups * g.m_tiles)
        self.group = self.filter // g.m_tiles
        self.m = self.filter % g.m_tiles * g.config.block_m
        rest: T.let = number // (g.groups * g.m_tiles)
        self.w = rest % g.w_tiles * g.block_w
        self.h = rest // g.w_tiles % g.h_tiles * g.block_h
        self.n = rest // (g.w_tiles * g.h_tiles) * g.block_n

    @T.inline
    def narrow(self, along_m, along_p):
        """To the part of one warpgroup."""
        c = T.meta_var(self.geometry.config)
        self.m = self.m + along_m * WGMMA_M
        if c.columns_apart:
            self.w = self.w + along_p * c.tile_w
        else:
            self.h = self.h + along_p * c.tile_h


@T.meta_class
class Taps:
    """The taps that a copy of the input serves, from copy to copy; see Geometry for the classes."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        for name in ("channels", "class_h", "class_w", "first_h", "first_w", "passed"):
            setattr(self, name, T.local_scalar("int32"))

    @T.inline
    def start(self):
        self.channels = 0
        self.class_h = 0
        self.class_w = 0
        self.first_h = 0
        self.first_w = 0
        self.passed = 0

    def _of_class(self, taps, stride, number):
        return (taps - number + stride - 1) // stride

    @property
    def rows(self):
        """Rows of taps that the copy serves."""
        g = self.geometry
        return self._of_class(g.taps_h, g.class_h, self.class_h) if g.copy_h > 1 else 1

    @property
    def columns(self):
        """Columns of taps that the copy serves."""
        g = self.geometry
        return self._of_class(g.taps_w, g.class_w, self.class_w) if g.copy_w > 1 else 1

    @T.inline
    def advance(self):
        g = T.meta_var(self.geometry)
        self.first_w = self.first_w + g.copy_w
        if self.first_w >= self._of_class(g.taps_w, g.class_w, self.class_w):
            self.first_w = 0
            self.first_h = self.first_h + g.copy_h
            if self.first_h >= self._of_class(g.taps_h, g.class_h, self.class_h):
                self.first_h = 0
                self.class_w = self.class_w + 1
                if self.class_w == g.classes_w:
                    self.class_w = 0
                    self.class_h = self.class_h + 1
                    if self.class_h == g.classes_h:
                        self.class_h = 0
                        self.channels = self.channels + 1

    @T.inline
    def take(self, copies):
        """As many taps as so many copies serve, added to `passed`."""
        for _ in T.serial(copies):
            self.passed = self.passed + self.rows * self.columns
            self.advance()

    def box(self, tile):
        """Coordinates of the patch of a tile, innermost axis first; negative ones are padding."""
        g = self.geometry
        (top, _), (left, _) = g.problem.padding
        h = tile.h * g.stride_h + (self.class_h + self.first_h * g.class_h) * g.step_h - top
        w = tile.w * g.stride_w + (self.class_w + self.first_w * g.class_w) * g.step_w - left
        pixel = (tile.n, w, h) if g.config.images else (w, h, tile.n)
        return (self.channels * g.row_channels, tile.group, *pixel)
