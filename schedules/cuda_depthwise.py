"""CUDA cores, windows in registers: depthwise convolution and groups of few channels.

Such a convolution does some ten products for each element that it moves: it is as fast as memory,
if every input comes from there once. A thread computes a tile of outputs. Rows of the input pass
by: a row is brought into registers once, as one contiguous run of the windows' columns, and counts
in all windows of the tile that hold it (`cuda_depthwise_sums`).

* NHWC: a thread has a vector of channels, so that a warp reads and writes whole sectors; what
  neighbours read twice comes from the L1 cache (`cuda_depthwise_nhwc`).
* NCHW: rows are narrow, and rarely begin at a vector. But rows of a plane, and planes, lie one
  after the other: a block copies its share as one run, computes in shared memory, and stores a run
  (`cuda_depthwise_nchw`).

float32, float16 or bfloat16 in and out, float32 sums by FMA in the order of the window. No
workspace. Any stride, padding and dilation, any sizes.
"""

import itertools
import math
from dataclasses import replace

from tvm.ir import IRModule

from ..problem import ConvProblem
from ..target import CudaTarget
from . import cuda_depthwise_nchw as nchw
from . import cuda_depthwise_nhwc as nhwc
from .base import CONV, PREPARE, Schedule
from .cuda_depthwise_cost import CLOCK, estimated_cycles, registers
from .cuda_depthwise_filter import prepare
from .cuda_depthwise_tiles import WIDE, Bands, Config, Geometry

# Offsets are 32 bits wide.
MAX_ELEMENTS = 2**31
# From so many on, the input channels of a group fill the matrices of tensor cores.
MOST_CHANNELS = 16
# Products that are unrolled: more would not stay in the instruction cache.
MAX_UNROLLED = 6000
# Registers that a thread may want, by the estimate.
MAX_REGISTERS = 232
_LEAST = dict(rows=1, columns=1, vector=1, threads=32, band=0, groups=1, blocks=1)


class CudaDepthwise(Schedule):
    name = "cuda_depthwise"
    kind = "cuda"
    clock = CLOCK

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        channels = problem.in_channels // problem.groups
        if reason is None and target.capability < 80:
            reason = f"arch={target.arch}: {self.name} takes sm_80 and later, for cp.async"
        if reason is None and problem.groups == 1:
            reason = f"groups=1: {self.name} takes two or more (cuda_simt takes any)"
        if reason is None and channels >= MOST_CHANNELS:
            reason = (
                f"groups={problem.groups}: {self.name} takes groups of fewer than {MOST_CHANNELS} "
                f"channels, these have {channels} (cuda_simt takes any)"
            )
        if reason is None and _padded_elements(problem) >= MAX_ELEMENTS:
            reason = f"padding={problem.padding}: with it the input has 2**31 elements or more"
        return reason or self.check(_smallest(problem), problem, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field, least in _LEAST.items():
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                return f"{field}={value!r}: allowed are whole numbers from {least}"
        if not isinstance(c.resident, bool):
            return f"resident={c.resident!r}: allowed are True and False"
        if c.threads % 32 or c.threads > 1024:
            return f"threads={c.threads}: allowed are multiples of 32 up to 1024"
        if c.blocks * c.threads > target.threads_per_multiprocessor:
            return (
                f"blocks={c.blocks}: a multiprocessor takes {target.threads_per_multiprocessor} "
                "threads"
            )
        if problem.channels_last:
            if c.band or c.groups > 1:
                return f"band={c.band}, groups={c.groups}: with NHWC they have to be 0 and 1"
            widest = WIDE // problem.itemsize
            if c.vector > widest or c.vector & (c.vector - 1):
                return f"vector={c.vector}: allowed are powers of two up to {widest}"
            g = Geometry(problem, c)
            held = g.out_channels if g.depthwise else g.group_out
            if held % c.vector:
                what = "out_channels" if g.depthwise else "out_channels/groups"
                return f"vector={c.vector}: no divisor of {what}={held}"
        else:
            if c.vector > 1:
                return f"vector={c.vector}: with NCHW it has to be 1"
            if c.band and c.groups > 1:
                return f"groups={c.groups}: with a band of one group's rows it has to be 1"
            g = Geometry(problem, c)
            taken = c.blocks * (Bands(g).shared_bytes + 1024)
            if taken > target.shared_bytes_per_multiprocessor:
                return (
                    f"band={c.band}, groups={c.groups}: {taken} bytes of "
                    f"{target.shared_bytes_per_multiprocessor}, shared memory"
                )
        unrolled = g.sums * (g.taps if c.resident else g.w.taps)
        if unrolled > MAX_UNROLLED:
            return (
                f"rows={c.rows}, columns={c.columns}: {unrolled} products in a row; up to "
                f"{MAX_UNROLLED} are allowed"
            )
        # A tile of one output fits always.
        if g.sums > 1 and registers(g) > MAX_REGISTERS:
            return (
                f"rows={c.rows}, columns={c.columns}, vector={c.vector}: {registers(g)} registers "
                f"or more; up to {MAX_REGISTERS} are allowed"
            )
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        for config in dict.fromkeys(candidates(problem)):
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
        layout = nhwc if problem.channels_last else nchw
        return IRModule(
            {
                PREPARE: prepare(problem),
                CONV: layout.convolve(problem, config, epilogue),
            }
        )


def candidates(problem: ConvProblem):
    """Configurations worth a look, valid or not."""
    height, width = problem.output_size
    taps = math.prod(problem.kernel_size)
    # A small filter stays in registers; one that is too large for a vector of channels may do so
    # for one channel.
    resident = (True,) if taps <= 25 else (False,)
    if 25 < taps <= 49 and not problem.channels_last:
        resident = (True, False)
    # Accesses of 4 and 8 bytes, the less the more registers they take.
    vectors = (1, 2, 4) if problem.itemsize == 2 else (1, 2)
    tiles = [
        (rows, columns)
        for rows, columns in itertools.product((1, 2, 4, 7, 8, 14), (1, 2, 4, 7, 8))
        # No more than the output has, but for the smallest tile that has all of it.
        if (rows // 2 < height or rows == 1) and (columns // 2 < width or columns == 1)
    ]
    for (rows, columns), held in itertools.product(tiles, resident):
        tile = Config(rows, columns, resident=held)
        if problem.channels_last:
            for vector, threads in itertools.product(vectors, (64, 128)):
                yield replace(tile, vector=vector, threads=threads)
        else:
            yield from _bands(problem, tile)


def _bands(problem: ConvProblem, tile: Config):
    """What blocks of NCHW may hold: with a thread for each tile of outputs, or half of them."""
    g = Geometry(problem, tile)
    shares = [dict(groups=n) for n in (1, 2, 4, 8, 16, 32, 64)]
    shares += [dict(band=n * tile.rows) for n in (1, 2, 3, 4, 7, 8) if n * tile.rows < g.h.outputs]
    for share in shares:
        planes, rows = share.get("groups", 1) * g.group_out, share.get("band", g.h.outputs)
        units = planes * g.h.tiles(rows) * g.w.tiles()
        for turns in (1, 2):
            threads = -(-units // turns // 32) * 32
            if 32 <= threads <= 256:
                yield replace(tile, threads=threads, **share)


def _padded_elements(problem: ConvProblem) -> int:
    padded = (n + sum(pads) for n, pads in zip(problem.input_size, problem.padding, strict=True))
    return problem.batch * problem.in_channels * math.prod(padded)


def _smallest(problem: ConvProblem) -> Config:
    return Config(1, 1, resident=False, band=0 if problem.channels_last else 1)


SCHEDULE = CudaDepthwise()
