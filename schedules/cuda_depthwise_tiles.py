"""A configuration of `cuda_depthwise`, and what it amounts to on a problem."""

from dataclasses import dataclass
from math import gcd, prod
from typing import NamedTuple

from ..problem import ConvProblem

# Bytes of the widest access of a thread, and of a copy to shared memory.
WIDE = 16


@dataclass(frozen=True)
class Config:
    """What a thread computes, and what a block holds.

    rows, columns, vector: outputs of a thread, of as many neighbouring channels (1 with NCHW, where
    neighbours in memory are columns). resident: the thread keeps the filter in registers, and the
    rows of its input are unrolled; otherwise it reads taps as it goes, from the L1 cache. threads:
    of a block. band, groups (NCHW only): the output rows of a block in one group of channels; or,
    with a band of 0, so many groups with all their rows. blocks: blocks a multiprocessor has to
    have registers for.
    """

    rows: int
    columns: int
    vector: int = 1
    resident: bool = True
    threads: int = 128
    band: int = 0
    groups: int = 1
    blocks: int = 1


class Axis(NamedTuple):
    """Outputs of a thread along one axis, as a dense window sees them.

    With a stride s and a dilation d, outputs that are d / gcd(s, d) apart read inputs on one grid
    of step d, where the window is dense and the stride is s / gcd(s, d). So outputs are taken by
    class: those of a thread are neighbours in their class.

    outputs: of the axis. inputs: its size. taps: of the window. classes: of outputs, which is also
    the distance of neighbours in one. step: from input to input of the grid. stride: on the grid.
    first_step: from window to window, in inputs. before: padding. each: outputs of a thread.
    reads: inputs of the grid that they read.
    """

    outputs: int
    inputs: int
    taps: int
    classes: int
    step: int
    stride: int
    first_step: int
    before: int
    each: int

    @property
    def reads(self) -> int:
        return (self.each - 1) * self.stride + self.taps

    def tiles(self, outputs: int | None = None) -> int:
        """Threads for so many outputs, all of the axis by default."""
        outputs = self.outputs if outputs is None else outputs
        neighbours = -(-outputs // self.classes)
        return self.classes * -(-neighbours // self.each)

    def first(self, tile):
        """The first output of a tile; the next are `classes` apart."""
        if self.classes == 1:
            return tile * self.each
        return tile // self.classes * (self.each * self.classes) + tile % self.classes

    def input_of(self, output):
        """The first input that the window of an output reads."""
        return output * self.first_step - self.before


def axis(problem: ConvProblem, which: int, each: int) -> Axis:
    """Axis 0 or 1 of the problem; `each`: outputs of a thread."""
    taps, outputs = problem.kernel_size[which], problem.output_size[which]
    # Steps that are never taken count as 1: they may be too long for 32 bits.
    stride = problem.stride[which] if outputs > 1 else 1
    # A window of one tap is dense on any grid, best on that of the outputs.
    step = problem.dilation[which] if taps > 1 else stride
    shared = gcd(stride, step)
    return Axis(
        outputs, problem.input_size[which], taps, step // shared, step, stride // shared, stride,
        problem.padding[which][0], each,
    )  # fmt: skip


class Geometry:
    """Sizes that follow from a problem and a configuration."""

    def __init__(self, problem: ConvProblem, config: Config):
        p, c = problem, config
        self.problem, self.config = p, c
        self.batch, self.groups = p.batch, p.groups
        self.in_channels, self.out_channels = p.in_channels, p.out_channels
        self.inputs, self.outputs = prod(p.input_shape), prod(p.output_shape)
        # Channels of a group.
        self.group_in, self.group_out = p.in_channels // p.groups, p.out_channels // p.groups
        self.taps = prod(p.kernel_size)
        self.h, self.w = axis(p, 0, c.rows), axis(p, 1, c.columns)
        # Output channel and input channel are one: a thread's vector of outputs reads one of x.
        self.depthwise = self.group_in == self.group_out == 1
        # Elements of a wide access.
        self.wide = WIDE // p.itemsize

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.config.rows * self.config.columns * self.config.vector


class Bands:
    """NCHW: what a block holds, as runs of memory (see `cuda_depthwise_nchw`).

    rows: of outputs, in a block. reach: rows of the input that their windows span. runs_in,
    runs_out: planes of a band, or one run of whole planes. vectors_in, vectors_out: of each run, at
    most.
    """

    def __init__(self, g: Geometry):
        c, h, w = g.config, g.h, g.w
        self.banded = c.band > 0
        self.rows = c.band if self.banded else h.outputs
        self.groups = 1 if self.banded else c.groups
        self.bands = -(-h.outputs // self.rows)
        self.blocks = -(-g.batch * g.groups // self.groups) * self.bands
        span = (h.taps - 1) * g.problem.dilation[0] + 1
        self.reach = (self.rows - 1) * h.first_step + span
        if self.banded:
            self.runs_in, self.runs_out = g.group_in, g.group_out
            run_in, run_out = min(self.reach, h.inputs) * w.inputs, self.rows * w.outputs
        else:
            self.runs_in = self.runs_out = 1
            run_in = self.groups * g.group_in * h.inputs * w.inputs
            run_out = self.groups * g.group_out * h.outputs * w.outputs
        # A run may begin with the last element of a vector.
        self.vectors_in, self.vectors_out = (
            (run + 2 * g.wide - 2) // g.wide for run in (run_in, run_out)
        )
        vectors = self.runs_in * self.vectors_in + self.runs_out * self.vectors_out
        self.shared_bytes = WIDE * vectors
