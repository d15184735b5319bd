"""Tensor cores of Hopper on windows in shared memory: the implicit im2win product for sm_90a.

D[channel, pixel] = F[channel, k] * W[pixel, k], and W is never written anywhere:

* The copy engine brings a patch of the input: a box of pixels by one row of channels (128 bytes).
  Zeros beyond the input are padding, steps between pixels are the stride.
* wgmma reads a matrix of pixels from any row of shared memory on, eights of them at any distance.
  So every tap of the window is the same patch seen from another row: a patch of 18 x 10 pixels
  serves nine taps of 16 x 8 outputs, and no element is copied twice.
* The filter is the other operand, packed in the order and swizzle in which it is read. A matrix of
  pixels is the wide one of the product: 8 to 256 of them, so that tiles can fit the device.
* One warpgroup copies, others multiply: mbarriers say which stage is full and which is read. Blocks
  stay, and take one tile after another.

float16, bfloat16 or tf32 in, the input's type out, float32 sums.
"""

import math

from tvm.ir import IRModule

from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, TRANSFORM, Schedule
from .cuda_channels_last import VECTOR_BYTES, copy_channels_last, is_needed, shape
from .cuda_window_cost import CLOCK, candidates, cycles
from .cuda_window_filter import prepare
from .cuda_window_kernel import convolve
from .cuda_window_tiles import (
    BLOCK_BYTES,
    MULTIPROCESSOR_BYTES,
    SYSTEM_BYTES,
    Config,
    Geometry,
)
from .hopper import ATOM_ROWS, WARPGROUP, registers

# Offsets are 32 bits wide.
MAX_ELEMENTS = 2**31
# Fewer are mostly zeros in a row of 128 bytes, and a filter's tile mostly zeros for 64 outputs.
LEAST_CHANNELS = 16
# Blocks of a cluster that every device takes (CUDA C++ Programming Guide, thread block clusters).
MAX_CLUSTER = 8
# Registers of a consuming thread beside its sums: what nvcc 13.0 needs without spilling.
OTHER_REGISTERS = 56
# Those that one wgmma needs beside its sums; ptxas counts them among those of the launch.
WGMMA_REGISTERS = 28
_LEAST = dict(
    tile_n=1, tile_h=1, tile_w=1, along_m=1, along_p=1, pixel_stages=2, filter_stages=0, split=1,
    blocks=1,
)  # fmt: skip
SMALLEST = Config(1, 1, 8, taps="tap", filter_stages=2)


class CudaWindow(Schedule):
    name = "cuda_window"
    kind = "cuda"
    clock = CLOCK
    dtypes = ("float16", "bfloat16")

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype not in self.dtypes:
            reason = f"dtype={problem.dtype}: {self.name} takes {' and '.join(self.dtypes)}"
        if reason is None and target.arch != "sm_90a":
            reason = f"arch={target.arch}: {self.name} takes sm_90a"
        channels = problem.in_channels // problem.groups
        if reason is None and problem.groups > 1 and channels < LEAST_CHANNELS:
            reason = (
                f"groups={problem.groups}: {self.name} takes groups of {LEAST_CHANNELS} channels "
                f"or more, these have {channels} (cuda_depthwise takes them)"
            )
        if reason is None and math.prod(shape(walk(problem))) >= MAX_ELEMENTS:
            reason = f"input_shape={problem.input_shape}: in whole vectors 2**31 elements or more"
        return reason or self.check(SMALLEST, problem, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        reason = reason_of_fields(c, ("images", "turns", "dense"), _LEAST)
        if reason is not None:
            return reason
        if c.piece_n > 256:
            return (
                f"tile_n={c.tile_n}, tile_h={c.tile_h}, tile_w={c.tile_w}: more than 256 a matrix"
            )
        if c.turns and (c.along_m, c.along_p, c.split) != (1, 1, 1):
            return "turns=True: along_m, along_p and split have to be 1"
        if c.consumers > 4:
            return f"along_m={c.along_m}, along_p={c.along_p}: more than 4 warpgroups"
        if c.blocks * c.threads > target.threads_per_multiprocessor:
            return f"blocks={c.blocks}: {c.blocks * c.threads} threads a multiprocessor"
        given = registers(c.consumers, c.blocks)
        room = min(given.consumer - OTHER_REGISTERS, given.launched - WGMMA_REGISTERS)
        if c.sums > room:
            return f"blocks={c.blocks}: {c.sums} sums a thread, there is room for {room}"
        walked = walk(problem)
        g = Geometry(walked, c)
        reason = g.tensor_map.reason()
        if reason is not None:
            return f"stride={problem.stride}, tile: {reason}"
        reason = reason_of_split(c, g)
        if reason is not None:
            return reason
        # Above the block's own limit even one block is too much.
        taken = c.blocks * (g.shared_bytes + SYSTEM_BYTES)
        if g.shared_bytes > BLOCK_BYTES or taken > MULTIPROCESSOR_BYTES:
            return (
                f"pixel_stages={c.pixel_stages}: {taken} bytes of {MULTIPROCESSOR_BYTES}, "
                "shared memory"
            )
        if g.groups * g.m_tiles * g.filter_tiles * g.filter_bytes >= MAX_ELEMENTS * 2:
            return f"along_m={c.along_m}: in whole tiles the filter has 2**32 bytes or more"
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        for config in candidates(walk(problem)):
            if self.check(config, problem, target) is None:
                yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        walked = walk(problem)
        costs = {c: _cost(walked, c, target) for c in candidates(walked)}
        # Most are valid, and a check takes longer than an estimate.
        ranked = sorted(costs, key=costs.__getitem__)
        return next((c for c in ranked if self.check(c, problem, target) is None), SMALLEST)

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        return _cost(walk(problem), config, target)

    def schedule(self, problem, config, target, epilogue):
        walked = walk(problem)
        module = {PREPARE: prepare(walked, config, problem)}
        if is_needed(walked):
            module[TRANSFORM] = copy_channels_last(problem)
        module[CONV] = convolve(walked, config, epilogue, problem, grid(walked, config, target))
        return IRModule(module)


def reason_of_fields(c: Config, flags: tuple[str, ...], least: dict[str, int]) -> str | None:
    """What is wrong with single fields, and with the shape of a tile; None if nothing is."""
    for field in flags:
        if not isinstance(getattr(c, field), bool):
            return f"{field}={getattr(c, field)!r}: allowed are True and False"
    for field, smallest in least.items():
        value = getattr(c, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            return f"{field}={value!r}: allowed are whole numbers from {smallest}"
    if c.taps not in ("window", "row", "tap"):
        return f"taps={c.taps!r}: allowed are 'window', 'row' and 'tap'"
    if c.filter_stages == 1:
        return "filter_stages=1: allowed are 0, for all of the filter, and 2 or more"
    if c.images and c.tile_n % ATOM_ROWS:
        return f"tile_n={c.tile_n}: with images=True a multiple of {ATOM_ROWS}"
    if not c.images and (c.tile_w % ATOM_ROWS or (c.tile_h > 1 and c.tile_w > ATOM_ROWS)):
        return f"tile_w={c.tile_w}: {ATOM_ROWS}, or in a tile of one row a multiple of it"
    if c.dense and c.images and c.tile_n != ATOM_ROWS:
        return f"tile_n={c.tile_n}: with dense=True and images=True it has to be {ATOM_ROWS}"
    return None


def reason_of_split(c: Config, g: Geometry) -> str | None:
    """What is wrong with a division of K over a cluster, whose sums meet in the rings."""
    if c.split > min(g.copies, MAX_CLUSTER) or (c.split > 1 and c.filter_stages == 0):
        return f"split={c.split}: of {g.copies} copies at most {MAX_CLUSTER}, filter_stages > 0"
    rings = c.pixel_stages * g.stage_bytes + g.filter_stages * g.filter_bytes
    if c.split > 1 and rings < c.consumers * c.sums * WARPGROUP * 4:
        return f"split={c.split}: {rings} bytes of rings do not hold the sums"
    return None


def walk(problem: ConvProblem) -> ConvProblem:
    """The problem as the kernel walks through it: the same numbers in the same places."""
    return patched(problem) or folded(problem)


def patched(problem: ConvProblem) -> ConvProblem | None:
    """Where windows neither overlap nor leave anything out: their columns' channels as channels.

    A row of windows is an image of as many rows as a window has, and a column for each window. None
    where the problem is not like that, or a window's row is no whole vectors.
    """
    p, (rows, columns) = problem, problem.kernel_size
    divided = all(n % k == 0 for n, k in zip(p.input_size, p.kernel_size, strict=True))
    wide = columns * p.in_channels
    if (
        p.kernel_size != p.stride
        or p.dilation != (1, 1)
        or not divided
        or any(map(any, p.padding))
        or columns == 1
        or p.groups > 1
        or not p.channels_last
        or wide * p.itemsize % VECTOR_BYTES
    ):
        return None
    height, width = p.output_size
    return p.replace(
        batch=p.batch * height,
        in_channels=wide,
        input_size=(rows, width),
        kernel_size=(rows, 1),
        stride=1,
        dilation=1,
    )


def folded(problem: ConvProblem) -> ConvProblem:
    """The same outputs in the same order, of one long row of pixels where windows are pixels."""
    pointwise = problem.kernel_size == problem.stride == (1, 1) and not any(
        map(any, problem.padding)
    )
    if not pointwise or not problem.channels_last:
        return problem
    height, width = problem.input_size
    return problem.replace(batch=1, input_size=(1, problem.batch * height * width))


def _cost(walked: ConvProblem, config: Config, target: CudaTarget) -> float:
    return cycles(Geometry(walked, config), grid(walked, config, target), target)


def grid(problem: ConvProblem, config: Config, target: CudaTarget) -> int:
    """Blocks that stay, or with a split K clusters of them: each takes every grid-th tile."""
    g = Geometry(problem, config)
    if config.split > 1:
        return g.tiles
    room = target.multiprocessors * config.blocks
    if config.filter_stages == 0:  # one filter for all tiles of a block
        filters = g.groups * g.m_tiles
        room = max(1, room // filters) * filters
    return min(g.tiles, room)


class CudaWindowTf32(CudaWindow):
    name = "cuda_window_tf32"
    dtypes = ("float32",)

    def accuracy(self, problem):
        return "tf32"


SCHEDULE, TF32 = CudaWindow(), CudaWindowTf32()
