"""Float32 on the tensor cores of Hopper: halves with scales in the windows of `cuda_window`.

x = s (high + low): two float16 of a block's numbers and a power of two for the block, and likewise
the filter. A product of float32 becomes three of float16, which the tensor cores make at sixteen
times the rate of float32's units.

* The walk, the copies and the views of a window are those of `cuda_window`: see there. A patch
  lands as float32, 32 channels of a pixel in a row of 128 bytes.
* A warpgroup splits it where it is: a row becomes 32 high and 32 low halves. All taps read them:
  an element is split once a patch, not once a tap. What has one scale is one image's part of a
  patch, for which a thread reads a patch twice; or a pixel, whose scale every sum then needs.
* The filter is split ahead of time; blocks are 32 input channels of a tap and an output channel.
* The tensor cores truncate as they add. So they add up one tap over 32 channels, small products
  first, and a float32 fma that rounds takes the result to the sum, times both scales.

The errors are those of the class fp32: `docs/accuracy.md` says how far, and where not.
"""

import math

from tvm.ir import IRModule

from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, TRANSFORM, Schedule
from .cuda_channels_last import copy_channels_last, is_needed, shape
from .cuda_window import (
    LEAST_CHANNELS,
    MAX_ELEMENTS,
    folded,
    grid,
    reason_of_fields,
    reason_of_split,
)
from .cuda_window_fp32_cost import CLOCK, candidates, cycles
from .cuda_window_fp32_filter import packed_shape, prepare
from .cuda_window_fp32_kernel import convolve
from .cuda_window_fp32_tiles import Config, SplitGeometry, registers
from .cuda_window_tiles import BLOCK_BYTES

# Registers of a multiplying thread beside its sums and their parts, and those of each scale that it
# holds: what nvcc 13.0 needs without spilling. Those that one wgmma needs beside its sums; ptxas
# counts them among those of the launch.
OTHER_REGISTERS, HELD_REGISTERS, WGMMA_REGISTERS = 34, 3, 28
# Products of an output: with fewer, a chain of fma has the smaller errors (docs/accuracy.md).
LEAST_K = 96
# Images of which a thread holds the scales.
MOST_IMAGES = 32
_LEAST = dict(tile_n=1, tile_h=1, tile_w=1, along_m=1, along_p=1, pixel_stages=2, filter_stages=0,
              split=1)  # fmt: skip
SMALLEST = Config(1, 1, 8, taps="tap", filter_stages=2, block="pixel")


class CudaWindowFp32(Schedule):
    name = "cuda_window_fp32"
    clock = CLOCK
    kind = "cuda"

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype != "float32":
            reason = f"dtype={problem.dtype}: {self.name} takes float32"
        if reason is None and target.arch != "sm_90a":
            reason = f"arch={target.arch}: {self.name} takes sm_90a"
        channels = problem.in_channels // problem.groups
        if reason is None and channels < LEAST_CHANNELS:
            reason = (
                f"in_channels={problem.in_channels}, groups={problem.groups}: {self.name} takes "
                f"{LEAST_CHANNELS} channels a group or more (cuda_simt_async takes any)"
            )
        if reason is None and problem.k < LEAST_K:
            reason = (
                f"k={problem.k}: {self.name} takes {LEAST_K} or more products an output, where its "
                "errors are no larger than those of a chain of fma (cuda_simt_async takes any)"
            )
        if reason is None and math.prod(shape(problem)) >= MAX_ELEMENTS:
            reason = f"input_shape={problem.input_shape}: in whole vectors 2**31 elements or more"
        return reason or self.check(SMALLEST, problem, target)

    def is_strict(self, problem):
        return False

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        reason = reason_of_fields(c, ("images", "dense"), _LEAST)
        if reason is not None:
            return reason
        if c.turns is not False or c.blocks != 1:
            return f"turns={c.turns!r}, blocks={c.blocks!r}: {self.name} takes False and 1"
        if c.block not in ("patch", "pixel"):
            return f"block={c.block!r}: allowed are 'patch' and 'pixel'"
        if c.block == "patch" and (c.tile_n > MOST_IMAGES if c.images else c.tile_n > 1):
            return (
                f"tile_n={c.tile_n}: with block='patch' 1, or with images=True up to "
                f"{MOST_IMAGES}; block='pixel' takes any"
            )
        if c.block == "patch" and problem.batch > 1 and folded(problem) != problem:
            return (
                "block='patch': of 1x1 convolutions all images are one long row, so that a patch "
                "has pixels of several; block='pixel' takes them"
            )
        if c.piece_n > 256:
            return (
                f"tile_n={c.tile_n}, tile_h={c.tile_h}, tile_w={c.tile_w}: more than 256 a matrix"
            )
        if c.consumers > 2:
            return f"along_m={c.along_m}, along_p={c.along_p}: more than 2 warpgroups"
        g = SplitGeometry(folded(problem), c)
        given = registers(c.consumers)
        other = OTHER_REGISTERS + HELD_REGISTERS * g.held
        room = min((given.consumer - other) // 2, given.launched - WGMMA_REGISTERS)
        if c.sums > room:
            return (
                f"tile_n={c.tile_n}, tile_h={c.tile_h}, tile_w={c.tile_w}: {c.sums} sums a "
                f"thread, twice; there is room for {room}"
            )
        reason = g.tensor_map.reason()
        if reason is not None:
            return f"stride={problem.stride}, tile: {reason}"
        reason = reason_of_split(c, g)
        if reason is not None:
            return reason
        if g.shared_bytes > BLOCK_BYTES:
            return (
                f"pixel_stages={c.pixel_stages}, filter_stages={c.filter_stages}: "
                f"{g.shared_bytes} bytes of {BLOCK_BYTES}, shared memory"
            )
        tiles, words = packed_shape(g)
        if tiles * words >= MAX_ELEMENTS:
            return f"along_m={c.along_m}: in whole tiles the filter has 2**31 words or more"
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        for config in candidates(folded(problem)):
            if self.check(config, problem, target) is None:
                yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        costs = {c: self.estimate(problem, c, target) for c in candidates(folded(problem))}
        # Most are valid, and a check takes longer than an estimate.
        ranked = sorted(costs, key=costs.__getitem__)
        return next((c for c in ranked if self.check(c, problem, target) is None), SMALLEST)

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        walked = folded(problem)
        return cycles(SplitGeometry(walked, config), grid(walked, config, target), target)

    def schedule(self, problem, config, target, epilogue):
        walked = folded(problem)
        module = {PREPARE: prepare(walked, config)}
        if is_needed(problem):
            module[TRANSFORM] = copy_channels_last(problem)
        module[CONV] = convolve(walked, config, epilogue, problem, grid(walked, config, target))
        return IRModule(module)


SCHEDULE = CudaWindowFp32()
