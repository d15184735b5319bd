"""Tensor cores by mma.sync and wgmma: the in-kernel im2win product for sm_80 and later.

One block computes `block_p` output pixels by `block_m` channels over K in steps of `block_k`
channels of one tap:

* cp.async brings a pixel's channels by 128 bits straight into shared memory, several tiles ahead;
  with NHWC a tap of a window is a contiguous run, and zeros beyond the input cost no branch.
* ldmatrix hands a warp its operands; rows of a tile are swizzled, so that neither the copies nor
  it meet a bank conflict. The filter is packed as the fragments themselves: one 128-bit load.
* On sm_90a four warps multiply together by wgmma, which reads the same swizzled tiles by itself and
  runs while the next ones are copied.
* The columns of the product are channels in an order that leaves each thread eight neighbours of
  them: outputs go from registers to memory by 128 bits.

float16 or bfloat16 in and out, float32 sums. An input in NCHW, or with other than eights of
channels in a group, is copied into that form first: a workspace, and part of every call.
"""

import itertools
import math
from dataclasses import replace

from tvm.ir import IRModule

from ..expr import gemm_sizes
from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, TRANSFORM, Schedule
from .cuda_channels_last import copy_channels_last, is_needed, shape
from .cuda_mma_kernel import convolve, prepare
from .cuda_mma_tiles import (
    CHUNK,
    GROUP,
    MMA_P,
    MULTIPLICANDS,
    WARP,
    WARPGROUP,
    Config,
    reduction,
    registers,
    shared_bytes,
)

# Offsets are 32 bits wide, and a few tiles beyond the last pixel have to fit as well.
MAX_ELEMENTS = 2**31
# Registers of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
REGISTERS = 65536
_SIZES = ("block_m", "block_p", "block_k", "warp_m", "warp_p", "stages", "blocks")


class CudaMma(Schedule):
    name = "cuda_mma"
    kind = "cuda"

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype not in MULTIPLICANDS:
            allowed = " and ".join(MULTIPLICANDS)
            reason = f"dtype={problem.dtype}: {self.name} takes {allowed}"
        if reason is None and target.capability < 80:
            reason = f"arch={target.arch}: {self.name} takes sm_80 and later"
        if reason is None and math.prod(shape(problem)) >= MAX_ELEMENTS:
            reason = f"input_shape={problem.input_shape}: in eights of channels 2**31 or more"
        if reason is None and _padded_elements(problem) >= MAX_ELEMENTS:
            reason = f"padding={problem.padding}: with it the input has 2**31 elements or more"
        return reason or self.check(_smallest(), problem, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field in _SIZES:
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return f"{field}={value!r}: allowed are whole numbers from 1"
        if not isinstance(c.wgmma, bool):
            return f"wgmma={c.wgmma!r}: allowed are True and False"
        if c.wgmma and target.arch != "sm_90a":
            return f"wgmma=True: it needs sm_90a, the target is {target.arch}"
        if c.block_k not in ((64,) if c.wgmma else (32, 64)):
            return f"block_k={c.block_k}: allowed are {'64' if c.wgmma else '32 and 64'}"
        if c.wgmma and (c.warp_m != c.block_m or c.block_m > 256):
            return f"warp_m={c.warp_m}: with wgmma all of block_m={c.block_m}, up to 256"
        if c.wgmma and c.threads % (WARPGROUP * WARP):
            return f"warp_p={c.warp_p}: with wgmma a quarter of block_p={c.block_p}, or of a part"
        if c.wgmma and c.stages < 3:
            return f"stages={c.stages}: with wgmma allowed are 3 to 8"
        if c.warp_m % GROUP or c.block_m % c.warp_m:
            return f"warp_m={c.warp_m}: a multiple of {GROUP} that divides block_m={c.block_m}"
        if c.warp_p % MMA_P or c.block_p % c.warp_p:
            return f"warp_p={c.warp_p}: a multiple of {MMA_P} that divides block_p={c.block_p}"
        if c.warp_m * c.warp_p > 128 * WARP:
            return f"warp_m={c.warp_m}, warp_p={c.warp_p}: more than 128 sums a thread"
        if c.threads > 1024:
            return f"block_m={c.block_m}, block_p={c.block_p}: {c.threads} threads, above 1024"
        for field in ("block_m", "block_p"):
            copies = getattr(c, field) * c.block_k // CHUNK
            if copies % c.threads:
                return (
                    f"{field}={getattr(c, field)}: its {copies} copies do not divide among "
                    f"{c.threads} threads"
                )
        if not 2 <= c.stages <= 8:
            return f"stages={c.stages}: allowed are 2 to 8"
        if c.blocks * c.threads > target.threads_per_multiprocessor:
            return (
                f"blocks={c.blocks}: a multiprocessor takes {target.threads_per_multiprocessor} "
                "threads"
            )
        if c.blocks * c.threads * registers(c) > REGISTERS:
            return (
                f"blocks={c.blocks}: {c.blocks} times {c.threads} threads of some {registers(c)} "
                f"registers; a multiprocessor has {REGISTERS}"
            )
        taken = c.blocks * (shared_bytes(c) + 1024)
        if taken > target.shared_bytes_per_multiprocessor:
            return (
                f"stages={c.stages}: {taken} bytes of "
                f"{target.shared_bytes_per_multiprocessor}, shared memory"
            )
        sizes, axes = gemm_sizes(problem), reduction(problem, c)
        packed = sizes.groups * -(-sizes.m // c.block_m) * c.block_m * axes.outer * axes.inner
        if packed >= MAX_ELEMENTS:
            return f"block_m={c.block_m}: in whole tiles the filter has 2**31 elements or more"
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        together = (
            Config(m, wp * ps, 64, m, wp, stages, wgmma=True)
            for m, wp, ps, stages in itertools.product(
                (32, 64, 96, 128, 192, 256), (16, 32), (4, 8, 12), (3, 4, 5, 6)
            )
        )
        alone = (
            Config(wm * ms, wp * ps, k, wm, wp, stages)
            for (wm, wp), ms, ps, k, stages in itertools.product(
                ((32, 16), (32, 32), (32, 64), (64, 32), (64, 64)),
                (1, 2, 4),
                (1, 2, 4, 8),
                (32, 64),
                (2, 3, 4, 5),
            )
        )
        for config in itertools.chain(together, alone):
            if not 64 <= config.threads <= 512:
                continue
            for blocks in (4, 3, 2, 1):
                if self.check(replace(config, blocks=blocks), problem, target) is None:
                    yield replace(config, blocks=blocks)
                    break

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        return min(
            self.configs(problem, target),
            key=lambda config: self.estimate(problem, config, target),
            default=_smallest(),
        )

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        """Matrix products and bytes copied, for the waves of blocks. A guess, fitted to nothing."""
        c, sizes, axes = config, gemm_sizes(problem), reduction(problem, config)
        blocks = -(-sizes.m // c.block_m) * -(-sizes.p // c.block_p) * sizes.groups
        waves = -(-blocks // (target.multiprocessors * c.blocks))
        tile = c.block_k * (c.block_m * c.block_p / 1024 + (c.block_m + c.block_p) / 16)
        fill = 1 + 0.5 / c.stages + 32 / (c.blocks * c.threads)
        # Assumed, not measured: where there are both, wgmma takes 0.6 of the time.
        tile *= 0.6 if c.wgmma else 1
        return waves * c.blocks * (axes.outer * tile * fill + c.block_m * c.block_p / 16 + 1000)

    def schedule(self, problem, config, target, epilogue):
        module = {PREPARE: prepare(problem, config)}
        if is_needed(problem):
            module[TRANSFORM] = copy_channels_last(problem)
        module[CONV] = convolve(problem, config, epilogue)
        return IRModule(module)


def _padded_elements(problem: ConvProblem) -> int:
    padded = (n + sum(pads) for n, pads in zip(problem.input_size, problem.padding, strict=True))
    return problem.batch * shape(problem)[-1] * math.prod(padded)


def _smallest() -> Config:
    return Config(32, 32, 32, 32, 16, stages=2)


SCHEDULE = CudaMma()
