"""What `cuda_thin_fp32` adds to the geometry of `cuda_thin`: halves of float32, and their scales.

A word of the ring is a float32. K goes to the tensor cores in steps of 16, each of four fours of
words: a register of an operand holds the thread's words of two of these fours, as halves.
"""

from ..problem import ConvProblem
from .cuda_thin_tiles import Config, Geometry
from .hopper import ROW_BYTES, WARPGROUP

# Products of an output from which two halves of a number will do; see `docs/accuracy.md`.
LEAST_K = 96
# Of K: words of a step, and halves of a row of the filter in shared memory.
STEP, ROW_HALVES = 16, ROW_BYTES // 2
# Products of an output from which on so many steps, one after the other, may be added up by the
# tensor cores, which truncate; of two steps whose small products come first: always.
_MOST_ADDED = ((320, 3), (128, 2), (0, 1))
# Which halves of an input meet which of the filter, small products first; 0 is the highest.
PRODUCTS = {
    2: ((1, 0), (0, 1), (0, 0)),
    3: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
}
WARPS = WARPGROUP // 32


class SplitGeometry(Geometry):
    """Sizes of a filter that is split, and of what the scales are made of."""

    copies_rows = False  # threads look at what they bring

    def __init__(self, problem: ConvProblem, config: Config):
        super().__init__(problem, config)
        self.rounded = False
        # Beside two images of the filter no row is twice in the ring.
        self.wraps = True
        self.halves = 2 if problem.k >= LEAST_K else 3
        self.k_steps = -(-self.k_words // STEP)
        self.k_chunks = -(-self.k_words // ROW_HALVES)
        # Groups of steps, and those that the tensor cores add up before a sum takes the result.
        self.groups = -(-self.k_steps // config.steps)
        most = next(most for least, most in _MOST_ADDED if problem.k >= least)
        self.period = max(1, most // config.steps) if self.halves == 2 else self.groups
        # An image of the filter for each of its halves, then a scale for each of its columns.
        self.image_bytes = self.k_chunks * config.block_n * ROW_BYTES
        self.filter_bytes = self.halves * self.image_bytes + 4 * config.block_n

    @property
    def held(self) -> int:
        """Registers of a thread's operands: two groups of steps, four words each of every half."""
        return 2 * self.config.steps * 4 * self.halves

    @property
    def tops(self) -> int:
        """Numbers beside the ring: of each row the largest that each producing warp has brought."""
        return self.ring_rows * WARPS

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return super().shared_bytes + 4 * self.tops


def word_of(position):
    """The word of K that is at a position among the filter's halves.

    Of a step a thread t has word t of each four; in an operand's registers they are halves 2 t and
    2 t + 1 of the first eight, and of the second.
    """
    step, within = position // STEP, position % STEP
    four = within // 8 * 2 + within % 2
    return step * STEP + four * 4 + within % 8 // 2
