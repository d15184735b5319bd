"""CUDA cores, asynchronous copies: the in-kernel im2win product of `cuda_simt`, by hand in TIRx.

One block computes `block_m` channels by `block_p` output pixels over K in steps of `block_k`. What
the schedule of `cuda_simt` cannot say, and this kernel can (sm_80 and later):

* cp.async copies straight from global to shared memory, several tiles ahead, through no register.
  A ring of `stages` tiles needs one barrier a tile.
* A pixel is decoded once a block, into the offset of its window. The window's elements lie at
  constant distances from there: over blocks of channels of one tap they advance by additions;
  otherwise the distances wait in a table in shared memory.
* `split` blocks of a cluster (sm_90) share the K of one tile and add their sums through each
  other's shared memory: a small output fills the multiprocessors, without a workspace.

Float32 in and out. A warp's threads form a rectangle, so that its reads of shared memory are
whole rows of 128 bytes or broadcasts, and its stores to the output are whole sectors.
"""

import itertools
import math
from dataclasses import replace

from tvm.ir import IRModule

from ..expr import gemm_sizes
from ..problem import ConvProblem
from ..target import CudaTarget
from .base import CONV, PREPARE, TRANSFORM, Schedule
from .cuda_elementwise import im2win_elements, write_im2win
from .cuda_simt_async_cost import (
    CLOCK,
    LAUNCH,
    estimated_cycles,
    registers,
    resident_blocks,
    resident_warps,
)
from .cuda_simt_async_kernel import convolve, prepare
from .cuda_simt_async_tiles import (
    MAX_TABLE_SIZE,
    VECTOR,
    WARP,
    Config,
    k_tiles,
    lanes_of_m,
    packed_elements,
    shared_words,
)

# Offsets are 32 bits wide, and a few tiles beyond the last pixel have to fit as well; TVM's
# simplifier multiplies pixels by the words of a vector.
MAX_ELEMENTS, MAX_PIXELS = 2**31, 2**29
# CUDA C++ Programming Guide, cluster size that every device takes.
MAX_SPLIT = 8
# Outputs of a thread that are worth trying: the larger, the fewer words each of them takes; the
# smaller, the more threads share a small problem.
OUTPUTS = ((4, 4), (4, 8), (8, 4), (8, 8), (8, 12), (12, 8), (4, 16), (8, 16), (16, 8))

_SIZES = ("block_m", "block_p", "block_k", "thread_m", "thread_p")


class CudaSimtAsync(Schedule):
    kind = "cuda"

    def __init__(self, name: str, explicit: bool):
        self.name = name
        self.explicit = explicit

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        if reason is None and problem.dtype != "float32":
            reason = f"dtype={problem.dtype}: {self.name} takes float32"
        if reason is None and target.capability < 80:
            reason = f"arch={target.arch}: {self.name} takes sm_80 and later, for cp.async"
        if reason is None and self.explicit and im2win_elements(problem) >= MAX_ELEMENTS:
            reason = f"input_shape={problem.input_shape}: I' has 2**31 elements or more"
        if reason is None and _padded_elements(problem) >= MAX_ELEMENTS:
            reason = f"padding={problem.padding}: with it the input has 2**31 elements or more"
        if reason is None and gemm_sizes(problem).p >= MAX_PIXELS:
            reason = f"output_shape={problem.output_shape}: {self.name} takes below 2**29 pixels"
        smallest = _smallest(problem)
        table = 4 * shared_words(smallest, problem, self._padded(problem))[1]
        if reason is None and table > target.shared_bytes_per_multiprocessor // 2:
            reason = (
                f"in_channels/groups={problem.in_channels // problem.groups}: a table of "
                f"{problem.k} window elements is beyond shared memory; multiples of 8 need none"
            )
        return reason or self.check(smallest, problem, target)

    def check(self, config: Config, problem: ConvProblem, target: CudaTarget) -> str | None:
        c = config
        for field in (*_SIZES, "stages", "split", "blocks"):
            value = getattr(c, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                return f"{field}={value!r}: allowed are whole numbers from 1"
        if not isinstance(c.taps, bool):
            return f"taps={c.taps!r}: allowed are True and False"
        for block, thread in (("block_m", "thread_m"), ("block_p", "thread_p")):
            if getattr(c, thread) % VECTOR:
                return f"{thread}={getattr(c, thread)}: allowed are multiples of {VECTOR}"
            if getattr(c, block) % getattr(c, thread):
                return f"{thread}={getattr(c, thread)}: a divisor of {block}={getattr(c, block)}"
        if c.thread_m * c.thread_p > 128:
            return f"thread_m={c.thread_m}, thread_p={c.thread_p}: more than 128 accumulators"
        if c.threads > 1024 or lanes_of_m(c, problem) is None:
            return (
                f"block_m={c.block_m}, block_p={c.block_p}, thread_m={c.thread_m}, "
                f"thread_p={c.thread_p}: {c.threads} threads; allowed are up to 1024, in "
                f"rectangles of {WARP}"
            )
        if not 2 <= c.stages <= 8:
            return f"stages={c.stages}: allowed are 2 to 8"
        channels = problem.in_channels // problem.groups
        if c.taps and channels % c.block_k:
            return f"taps=True: in_channels/groups={channels} is no multiple of block_k={c.block_k}"
        if not c.taps and self._padded(problem):
            if max(problem.input_size) + max(map(sum, problem.padding)) >= MAX_TABLE_SIZE:
                return (
                    f"taps=False: input_size={problem.input_size} with its padding is beyond "
                    f"{MAX_TABLE_SIZE}"
                )
        if c.split > 1 and target.capability < 90:
            return f"split={c.split}: clusters need sm_90, the target is {target.arch}"
        if c.split > min(MAX_SPLIT, k_tiles(problem, c)):
            return f"split={c.split}: allowed are 1 to {min(MAX_SPLIT, k_tiles(problem, c))}"
        allowed = target.threads_per_multiprocessor
        if c.blocks * c.threads > allowed:
            return f"blocks={c.blocks}: a multiprocessor takes {allowed} threads"
        warps = resident_warps(c, problem)
        if c.blocks * c.threads > warps * WARP:
            return (
                f"blocks={c.blocks}: {c.blocks} times {c.threads} threads of some "
                f"{registers(c, problem)} registers; a multiprocessor has them for {warps * WARP}"
            )
        taken = 4 * sum(shared_words(c, problem, self._padded(problem)))
        if c.blocks * (taken + 1024) > target.shared_bytes_per_multiprocessor:
            allowed = target.shared_bytes_per_multiprocessor
            return f"stages={c.stages}: {c.blocks} times {taken} bytes of {allowed}, shared memory"
        if packed_elements(problem, c) >= MAX_ELEMENTS:
            return f"block_m={c.block_m}: in whole tiles the filter has 2**31 elements or more"
        return None

    def configs(self, problem: ConvProblem, target: CudaTarget):
        return self._configs(problem, target, (2, 3, 4), (True, False))

    def _configs(self, problem, target, stages, taps):
        splits = range(1, MAX_SPLIT + 1) if target.capability >= 90 else (1,)
        # A short K that is rounded up to whole tiles is work on zeros: some tile divides it.
        divisors = {k for k in range(8, 33) if problem.k % k == 0}
        for (tm, tp), rows, columns, count, split, tap in itertools.product(
            OUTPUTS, (2, 4, 8, 12, 16, 32), (4, 8, 12, 16, 18, 24, 32), stages, splits, taps
        ):
            if not 64 <= rows * columns <= 512:
                continue
            for k in sorted({8, 16, 24, 32} | (set() if tap else divisors)):
                config = Config(tm * rows, tp * columns, k, tm, tp, count, split, tap)
                blocks = resident_blocks(config, problem, target, self._padded(problem))
                config = replace(config, blocks=blocks)
                if self.check(config, problem, target) is None:
                    yield config

    def default(self, problem: ConvProblem, target: CudaTarget) -> Config:
        channels = problem.in_channels // problem.groups
        return min(
            self._configs(problem, target, (3, 2), (channels % 8 == 0,)),
            key=lambda config: self.estimate(problem, config, target),
            default=_smallest(problem),
        )

    def estimate(self, problem: ConvProblem, config: Config, target: CudaTarget) -> float:
        return estimated_cycles(config, problem, target)

    def microseconds(self, problem: ConvProblem, config: Config, target: CudaTarget):
        if self.explicit:
            return None  # the transform is not in the model
        return (self.estimate(problem, config, target) + LAUNCH) / (1e3 * CLOCK)

    def _padded(self, problem: ConvProblem) -> bool:
        """Whether windows reach beyond what the kernel reads."""
        return not self.explicit and any(map(any, problem.padding))

    def schedule(self, problem, config, target, epilogue):
        module = {PREPARE: prepare(problem, config, self.explicit)}
        if self.explicit:
            module[TRANSFORM] = write_im2win(problem)
        module[CONV] = convolve(problem, config, epilogue, self.explicit)
        return IRModule(module)


def _padded_elements(problem: ConvProblem) -> int:
    padded = (n + sum(pads) for n, pads in zip(problem.input_size, problem.padding, strict=True))
    return problem.batch * problem.in_channels * math.prod(padded)


def _smallest(problem: ConvProblem) -> Config:
    taps = problem.in_channels // problem.groups % 8 == 0
    return Config(16, 32, 8, 4, 4, stages=2, taps=taps)


IMPLICIT = CudaSimtAsync("cuda_simt_async", explicit=False)
EXPLICIT = CudaSimtAsync("cuda_simt_async_explicit", explicit=True)
