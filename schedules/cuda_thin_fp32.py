"""Float32 of few channels on the tensor cores of Hopper: halves with scales in `cuda_thin`'s rows.

x = s (a + b), or s (a + b + c): float16 numbers and a power of two, and likewise the filter. A
product of float32 becomes three of float16, or six, at sixteen times the rate of float32's units.

* Rows, windows and blocks are those of `cuda_thin`: see there. Rows lie in the ring as float32, and
  beside each are the largest numbers that its warps brought.
* All numbers of a window have one scale, from the rows of its taps. A thread splits its operands as
  it loads them into registers.
* The filter is split ahead of time, and all its halves stay in shared memory. Scales are of output
  channels.
* The tensor cores truncate as they add. From 96 products an output on there are two halves, and
  sums of two steps of K at most, small products first, are added up by float32's units. With fewer
  products there are three halves, and nothing is lost where the large ones are added.

The errors are those of the class fp32: `docs/accuracy.md` says how far, and where not.
"""

from dataclasses import replace

from tvm.ir import IRModule

from .base import CONV, PREPARE
from .cuda_thin import CudaThin
from .cuda_thin_fp32_cost import candidates, cycles
from .cuda_thin_fp32_filter import prepare
from .cuda_thin_fp32_kernel import convolve
from .cuda_thin_fp32_tiles import SplitGeometry
from .cuda_thin_tiles import registers

# Registers of a multiplying thread beside its sums and operands: what nvcc 13.0 needs without
# spilling. Those that wgmma needs beside them; ptxas counts them among those of the launch.
OTHER_REGISTERS, WGMMA_REGISTERS = 44, 24
# Of K, whose products the tensor cores add up: more lose too much.
MOST_STEPS = 2


class CudaThinFp32(CudaThin):
    name = "cuda_thin_fp32"
    dtypes = ("float32",)
    wider = "cuda_simt_async"

    def supports(self, problem, target):
        reason = super().supports(problem, target)
        # What is left to refuse is a ring that is too large.
        ring = reason is not None and reason.startswith("block_n=")
        return f"{reason} ({self.wider} takes any)" if ring else reason

    def is_strict(self, problem):
        return False

    def geometry(self, problem, config):
        return SplitGeometry(problem, config)

    def reason_of_pairs(self, problem, config):
        if config.pairs is not False:
            return f"pairs={config.pairs!r}: allowed is False"
        return None

    def reason_of_registers(self, g):
        c, given = g.config, registers(g.config)
        if c.steps > MOST_STEPS:
            return f"steps={c.steps}: allowed are 1 to {MOST_STEPS}"
        room = min(given.consumer - OTHER_REGISTERS, given.launched - WGMMA_REGISTERS)
        if 2 * c.sums + g.held > room:
            return (
                f"block_n={c.block_n}, steps={c.steps}: {c.sums} sums a thread, twice, and "
                f"{g.held} operands, there is room for {room}"
            )
        return None

    def smallest(self, problem):
        return replace(super().smallest(problem), steps=1)

    def candidates(self, problem):
        return candidates(problem)

    def estimate(self, problem, config, target):
        return cycles(SplitGeometry(problem, config), target)

    def schedule(self, problem, config, target, epilogue):
        parts = SplitGeometry(problem, config).parts(target.multiprocessors)
        return IRModule(
            {
                PREPARE: prepare(problem, config),
                CONV: convolve(problem, config, epilogue, parts),
            }
        )


SCHEDULE = CudaThinFp32()
