"""A configuration of `cuda_depthwise_mma`, and what it amounts to on a problem."""

from dataclasses import dataclass
from math import gcd, prod

from ..problem import ConvProblem

WARP = 32
# mma.m16n8k16 and .m16n8k8: rows of the result are columns of the output, columns of it are rows of
# the output, and K is a piece of a row of the input, in eights.
COLUMNS, LINES, CHUNK = 16, 8, 8
# Bytes of the widest access.
WIDE = 16
# What mma calls the types that it multiplies.
MULTIPLICANDS = {"float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Config:
    """What a block has: channels, one for each warp; images; lines, eights of output rows.

    With fewer lines than the output has, its rows are divided into bands. blocks: blocks a
    multiprocessor has to have registers for.
    """

    channels: int
    images: int
    lines: int
    blocks: int = 1

    @property
    def threads(self) -> int:
        return self.channels * WARP


class Geometry:
    """Sizes that follow from a problem and a configuration."""

    def __init__(self, problem: ConvProblem, config: Config):
        p, c = problem, config
        self.problem, self.config = p, c
        self.batch, self.channels = p.batch, p.in_channels
        (self.height, self.width), (self.rows, self.columns) = p.input_size, p.output_size
        self.taps_h, self.taps_w = p.kernel_size
        (self.top, _), (self.left, _) = p.padding
        self.inputs, self.outputs = prod(p.input_shape), prod(p.output_shape)
        # Pieces of an input row; tiles of an output row.
        self.pieces = -(-self.width // CHUNK)
        self.tiles = -(-self.columns // COLUMNS)
        # A row of the Toeplitz matrix is the one above, shifted: an 8x8 part of it depends on the
        # difference of its column and row alone, in eights. These are the parts that are not zero.
        self.first_part = -((self.left + CHUNK - 1) // CHUNK)
        self.last_part = (self.taps_w - 1 - self.left + CHUNK - 1) // CHUNK
        self.parts = self.last_part - self.first_part + 1
        # Pairs of pieces that are multiplied together begin at odd ones.
        self.odd = self.first_part % 2
        # Loads of four pieces for a row.
        self.loads = -(-(self.pieces + self.odd) // 4)
        # Of the packed filter of a channel: a part is 64 elements; and what marks it (see prepare).
        self.filter = self.taps_h * self.parts * 2 * WARP
        self.packed = self.filter + CHUNK
        # Bands of rows.
        self.band = min(c.lines * LINES, self.rows)
        self.bands = -(-self.rows // self.band)
        self.lines = -(-self.band // LINES)
        self.patch_rows = min(self.height, self.lines * LINES + self.taps_h - 1)
        # An odd number of 16-byte pieces: eight rows begin in eight different groups of banks.
        self.pitch = (self.pieces | 1) * CHUNK
        self.plane = self.patch_rows * self.pitch
        self.channel_blocks = -(-self.channels // c.channels)
        self.blocks = self.channel_blocks * self.bands * -(-self.batch // c.images)
        # Outputs of a block, as they leave: runs of memory (NCHW), or planes (NHWC).
        whole = self.bands == 1 and not p.channels_last
        self.runs = c.images * (1 if whole else c.channels)
        self.run = self.band * self.columns * (c.channels if whole else 1)
        self.run_vectors = (self.run + 2 * CHUNK - 2) // CHUNK
        self.run_pitch = self.run if p.channels_last else self.run_vectors * CHUNK
        patch = c.images * c.channels * self.plane
        # The patch, later the outputs; then a piece of zeros.
        self.zeros = -(-max(patch, self.runs * self.run_pitch) // CHUNK) * CHUNK
        self.shared_bytes = (self.zeros + CHUNK) * p.itemsize
        # Elements of one copy of a piece of a row (NCHW).
        self.copy = gcd(self.width, CHUNK)

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.config.images * self.lines * self.tiles * 4
