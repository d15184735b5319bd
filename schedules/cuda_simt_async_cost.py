"""What a configuration of `cuda_simt_async` costs: registers, blocks that fit, time.

The numbers of the model were fitted to 1139 measurements of the paper's layers at batch 128 on an
H100. What it ranks first of those takes 2 % longer than the fastest of them in the geometric mean,
and at most 7 %.
"""

import math

from ..expr import gemm_sizes
from ..problem import ConvProblem
from ..target import CudaTarget
from .cuda_simt_async_tiles import VECTOR, WARP, Config, k_tiles, pixel_steps, shared_words

# Registers of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
REGISTERS = 65536
# Part of the multiprocessors that clusters of 1, 2, ... 8 blocks can occupy at the same time: a
# cluster stays within one group of multiprocessors (cudaOccupancyMaxActiveClusters on an H100). An
# H200 computes fewer of six blocks that have a multiprocessor each: see `cuda_window_cost`.
CLUSTERED = tuple(n / 132 for n in (132, 132, 122, 124, 117, 118, 121, 124))
# Instructions of one tile that the instruction cache holds without loss, by the same fit.
CACHED_INSTRUCTIONS = 1100

# GHz, by the records of the paper's layers at batch 128, which it fits within 5 % (one sigma); and
# cycles from one event to another beside those of the busiest multiprocessor.
CLOCK, LAUNCH = 2.09, 8300.0
# Cycles until blocks of a cluster have started together, waited for each other and added up, by 314
# measurements of splits at batch 1 on an H200, where all clusters are there at once.
CLUSTER = 3800.0


def registers(c: Config, problem: ConvProblem) -> int:
    """Registers of a thread, about, as ptxas hands them out: in eights, at most 255.

    Sums, some of them twice while they are in flight, fragments, one address for every pixel that
    is copied from, and the rest: fitted to what nvcc 13.0 takes on sm_90 where nothing bounds it.
    """
    needed = 1.2 * c.thread_m * c.thread_p + c.thread_m + c.thread_p + 28 + pixel_steps(c, problem)
    return min(math.ceil(needed / 8) * 8, 255)


def resident_warps(c: Config, problem: ConvProblem) -> int:
    """Warps of a multiprocessor that its registers suffice for; its four parts get as many each."""
    return REGISTERS // (WARP * registers(c, problem)) // 4 * 4


def resident_blocks(c: Config, problem: ConvProblem, target: CudaTarget, padded: bool) -> int:
    """Blocks that fit on a multiprocessor, at least 1: by registers and shared memory."""
    taken = 4 * sum(shared_words(c, problem, padded)) + 1024
    return max(
        1,
        min(
            resident_warps(c, problem) * WARP // c.threads,
            target.shared_bytes_per_multiprocessor // taken,
            target.threads_per_multiprocessor // c.threads,
        ),
    )


def estimated_cycles(c: Config, problem: ConvProblem, target: CudaTarget) -> float:
    """A model of the time on the busiest multiprocessor; it ranks configurations.

    Issue slots of what a thread executes, for all warps that share a scheduler, block after block.
    """
    sizes = gemm_sizes(problem)
    warps = c.threads // WARP
    # One tile of K: sums, 128-bit loads of their operands, copies for a later tile.
    sums = c.block_k * c.thread_m * c.thread_p
    loads = c.block_k * (c.thread_m + c.thread_p) / VECTOR
    copies = c.block_k * (c.block_m / VECTOR + c.block_p) / c.threads
    tile = sums + 2.6 * loads + 4.8 * copies
    tile *= 1 + 0.03 * max(0.0, (sums + loads) / CACHED_INSTRUCTIONS - 1)
    tile *= 1.02 if warps % 2 else 1  # the four schedulers cannot get as many each
    steps = -(-k_tiles(problem, c) // c.split)
    outputs = c.thread_m * c.thread_p * (1 if c.split == 1 else 2)
    slots = steps * (tile + 40) + 12 * outputs + 150
    blocks = -(-sizes.m // c.block_m) * -(-sizes.p // c.block_p) * sizes.groups * c.split
    usable = target.multiprocessors * CLUSTERED[c.split - 1]
    turns, left = divmod(math.ceil(blocks / usable), c.blocks)

    def cycles(resident: int) -> float:
        # A scheduler wastes some slots, and most of them where it has one warp alone. At a barrier
        # a block waits for its slowest warp, unless another block has work.
        scheduled = max(resident * warps / 4, 1)
        return slots * (scheduled + 0.4) + steps * 210 / resident + 180

    busy = turns * cycles(c.blocks) + (cycles(left) if left else 0.0)
    return busy + (CLUSTER if c.split > 1 else 0.0)
