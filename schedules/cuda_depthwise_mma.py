"""Tensor cores on depthwise convolutions with large filters, by mma.sync.

Depthwise means a filter for every channel and no sum over channels: nothing that is a product of
matrices by itself. But a row of the filter, moved along a row of the input, is one: outputs are the
product of a banded Toeplitz matrix, which has the filter's row in every row, one element further
each time, with pieces of the input's row. Of 16 outputs the pieces are the same contiguous run, and
an 8x8 part of the matrix depends on how far it is from the diagonal alone: three parts make up a
row of seven taps, five one of 31, whatever the width of the image.

* Columns of the product are rows of the output: the eight rows that ldmatrix takes are eight
  neighbouring lines of a plane in shared memory, and each tap of a column of the window reads them
  one line further down. Nothing is copied twice.
* A warp has a channel, and all sums of its share in registers: a part of the filter is loaded once.
* Parts beyond the input's columns are left out: they are zeros of the padding.
* Zeros of the matrix meet inputs that no window of an output holds. Where one of those is infinite
  or NaN the sum is NaN: outputs that are NaN are computed again on CUDA cores.

float16 or bfloat16 in and out, float32 sums. No workspace.
"""

import itertools
import math

from tvm.ir import IRModule

from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, Schedule
from .cuda_depthwise_mma_cost import CLOCK, estimated_cycles, registers
from .cuda_depthwise_mma_kernel import convolve, prepare
from .cuda_depthwise_mma_tiles import CHUNK, LINES, MULTIPLICANDS, WARP, Config, Geometry

# Offsets are 32 bits wide.
MAX_ELEMENTS = 2**31
# With fewer taps CUDA cores are as fast as memory.
LEAST_TAPS = 25
# Sums of a thread: with more there are too few registers for what goes with them.
MAX_SUMS = 128
# Registers of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
REGISTERS = 65536
_FIELDS = ("channels", "images", "lines", "blocks")


class CudaDepthwiseMma(Schedule):
    name = "cuda_depthwise_mma"
    kind = "cuda"
    clock = CLOCK

    def supports(self, problem, target):
        p, reason = problem, super().supports(problem, target)
        other = "(cuda_depthwise takes any)"
        if reason is None and p.dtype not in MULTIPLICANDS:
            reason = f"dtype={p.dtype}: {self.name} takes {' and '.join(MULTIPLICANDS)}"
        if reason is None and target.capability < 80:
            reason = f"arch={target.arch}: {self.name} takes sm_80 and later"
        if reason is None and not p.groups == p.in_channels == p.out_channels:
            reason = f"groups={p.groups}: {self.name} takes one channel a group, in and out {other}"
        if reason is None and p.groups == 1:
            reason = f"groups=1: {self.name} takes two or more (cuda_simt takes any)"
        for field, extent in (("stride", p.output_size), ("dilation", p.kernel_size)):
            steps = getattr(p, field)
            if reason is None and any(s > 1 and n > 1 for s, n in zip(steps, extent, strict=True)):
                reason = f"{field}={steps}: {self.name} takes 1 {other}"
        if reason is None and p.channels_last and p.in_channels % CHUNK:
            reason = (
                f"in_channels={p.in_channels}: with NHWC {self.name} takes multiples of {CHUNK} "
                f"{other}"
            )
        taps = math.prod(p.kernel_size)
        if reason is None and taps < LEAST_TAPS:
            reason = (
                f"kernel_size={p.kernel_size}: {self.name} takes windows of {LEAST_TAPS} taps or "
                f"more {other}"
            )
        if reason is None and _padded_elements(p) >= MAX_ELEMENTS:
            reason = f"padding={p.padding}: with it the input has 2**31 elements or more"
        return reason or self.check(_smallest(p), p, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field in _FIELDS:
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return f"{field}={value!r}: allowed are whole numbers from 1"
        if problem.channels_last and c.channels % CHUNK:
            return f"channels={c.channels}: with NHWC a multiple of {CHUNK}"
        if c.threads > 1024:
            return f"channels={c.channels}: {c.threads} threads, above 1024"
        if c.blocks * c.threads > target.threads_per_multiprocessor:
            return (
                f"blocks={c.blocks}: a multiprocessor takes {target.threads_per_multiprocessor} "
                "threads"
            )
        g = Geometry(problem, c)
        if g.sums > MAX_SUMS:
            return (
                f"images={c.images}, lines={c.lines}: {g.sums} sums a thread for rows of "
                f"{g.columns} outputs; up to {MAX_SUMS} are allowed"
            )
        if c.blocks * c.threads * registers(g) > REGISTERS:
            return (
                f"blocks={c.blocks}: {c.blocks} times {c.threads} threads of some {registers(g)} "
                f"registers; a multiprocessor has {REGISTERS}"
            )
        taken = c.blocks * (g.shared_bytes + 1024)
        if taken > target.shared_bytes_per_multiprocessor:
            return (
                f"channels={c.channels}, images={c.images}, lines={c.lines}: {taken} bytes of "
                f"{target.shared_bytes_per_multiprocessor}, shared memory"
            )
        if g.channels * g.packed >= MAX_ELEMENTS:
            return (
                f"kernel_size={problem.kernel_size}: the packed filter has 2**31 elements or more"
            )
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        height = -(-problem.output_size[0] // LINES)
        channels = (8,) if problem.channels_last else (2, 4, 8)
        for c, images, lines in itertools.product(channels, (1, 2, 4, 8, 16), range(1, height + 1)):
            # Bands as equal as they can be.
            if lines > 8 or -(-height // -(-height // lines)) != lines:
                continue
            # Several images only with all their rows.
            if images > 1 and (lines < height or images >= 2 * problem.batch):
                continue
            g = Geometry(problem, Config(c, images, lines))
            if g.sums > MAX_SUMS:
                continue
            # Where ptxas gets much less than it asks for, it spills rather than loads later.
            wanted = registers(g) + (56 if g.sums < 96 else 8)
            room = REGISTERS // (wanted * c * WARP)
            held = target.shared_bytes_per_multiprocessor // (g.shared_bytes + 1024)
            blocks = min(room, held, target.threads_per_multiprocessor // (c * WARP))
            config = Config(c, images, lines, max(1, blocks))
            if self.check(config, problem, target) is None:
                yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        return min(
            self.configs(problem, target),
            key=lambda config: self.estimate(problem, config, target),
            default=_smallest(problem),
        )

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        return estimated_cycles(Geometry(problem, config), target)

    def schedule(self, problem, config, target, epilogue):
        return IRModule(
            {PREPARE: prepare(problem, config), CONV: convolve(problem, config, epilogue)}
        )


def _padded_elements(problem: ConvProblem) -> int:
    padded = (n + sum(pads) for n, pads in zip(problem.input_size, problem.padding, strict=True))
    return problem.batch * problem.in_channels * math.prod(padded)


def _smallest(problem: ConvProblem) -> Config:
    return Config(CHUNK if problem.channels_last else 1, 1, 1)


SCHEDULE = CudaDepthwiseMma()
