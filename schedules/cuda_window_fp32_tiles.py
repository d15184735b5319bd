"""What `cuda_window_fp32` adds to the geometry of `cuda_window`: halves, and their scales.

A row of 128 bytes is a pixel's 32 channels of float32, and after it was split the same pixel's 32
high halves and 32 low halves of 16 bits. So patches and tiles of the filter keep their sizes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..problem import ConvProblem
from .cuda_window_tiles import Config as WindowConfig
from .cuda_window_tiles import Geometry
from .hopper import ATOM_ROWS, ROW_BYTES, WARPGROUP

# Channels of a row, and those that one wgmma on halves takes.
ROW_CHANNELS, STEP_CHANNELS = ROW_BYTES // 4, 16
# From the high halves of a row to the low ones, and from one wgmma's to the next one's, as
# descriptors count: in 16 bytes.
LOW, STEP = ROW_CHANNELS * 2 // 16, STEP_CHANNELS * 2 // 16
# Registers of a multiprocessor; of a thread that copies, of one that splits, and the most.
_REGISTERS, _PRODUCER, _SPLITTER, _MOST = 65536, 32, 72, 240


@dataclass(frozen=True)
class Config(WindowConfig):
    """That of `cuda_window`, and what has a scale of its own.

    block: "patch", one image's part of a copy of 32 channels; or "pixel", 32 channels of a pixel.
    """

    block: str = "patch"


class Registers(NamedTuple):
    """Of a thread: at the launch, and of copying, splitting and multiplying ones (setmaxnreg)."""

    launched: int
    producer: int
    splitter: int
    consumer: int


def registers(consumers: int) -> Registers:
    """What threads get in a block of a copying, a splitting and some multiplying warpgroups."""
    warpgroups = consumers + 2
    launched = _REGISTERS // (warpgroups * WARPGROUP) // 8 * 8
    left = launched * warpgroups - _PRODUCER - _SPLITTER
    return Registers(launched, _PRODUCER, _SPLITTER, min(left // consumers // 8 * 8, _MOST))


class SplitGeometry(Geometry):
    """Sizes of patches that are split, and of the scales beside them."""

    def __init__(self, problem: ConvProblem, config: Config):
        super().__init__(problem, config)
        # A multiple of 16 channels is what a product takes.
        last = self.channels - (self.channel_rows - 1) * ROW_CHANNELS
        self.last_steps = -(-last // STEP_CHANNELS)
        self.patch_rows = self.patch_bytes // ROW_BYTES
        # A scale of each row of a tile of the filter, in bytes.
        self.weight_bytes = config.block_m * 4

    @property
    def threads(self) -> int:
        """A copying warpgroup, a splitting one, and those that multiply."""
        return WARPGROUP * (2 + self.config.consumers)

    @property
    def period(self) -> int:
        """Images of a patch that is split as a whole: pixels of one are so many rows apart."""
        return self.config.tile_n if self.config.images else 1

    @property
    def places(self) -> int:
        """For the largest numbers that threads have found: of each, or of each warp if all of a
        patch has one scale."""
        if self.config.block == "pixel":
            return 1
        return WARPGROUP // 32 if self.period == 1 else WARPGROUP // self.period * self.period

    @property
    def held(self) -> int:
        """Scales that a thread needs at a time: of two images in every eight, or of two pixels."""
        if self.config.block == "pixel":
            return 2
        return 2 * self.period // ATOM_ROWS if self.config.images else 1

    @property
    def scale_floats(self) -> int:
        """Of a stage: of each image, or of each pixel with its right neighbour's beside it."""
        return self.period if self.config.block == "patch" else 2 * self.patch_rows

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        pixels, filters = self.config.pixel_stages, self.filter_stages
        barriers = 24 * pixels + 16 * filters + 64
        each = self.stage_bytes + 4 * self.scale_floats
        tiles = filters * (self.filter_bytes + self.weight_bytes)
        return pixels * each + tiles + 8 * self.places + barriers
