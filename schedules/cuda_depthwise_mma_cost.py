"""What a configuration of `cuda_depthwise_mma` costs: registers, and a model of its time.

The numbers of the model were fitted to 118 measurements on an H100, of layers of ConvNeXt-T and
RepLKNet at batches of 1, 32 and 128. What it ranks first of those takes 2 % longer than the fastest
of them in the geometric mean; its times are off by 12 % (root mean square).
"""

from math import ceil

from ..target import CudaTarget
from .cuda_depthwise_mma_tiles import WARP, Geometry

# GHz, at which the model counts cycles.
CLOCK = 1.7
# Registers of a multiprocessor (CUDA C++ Programming Guide, compute capabilities).
REGISTERS = 65536
# Bytes a cycle of a multiprocessor's share of device memory: a block copies, computes and stores by
# turns.
DEVICE_BYTES = 7.8
# Cycles of a call that does nothing, of a block's launch, and of a row of the filter until its
# first product, where no other warp has work.
LAUNCH, BLOCK, ROW = 5400, 56, 340


def registers(g: Geometry) -> int:
    """Of a thread, about, in eights: sums, pieces of a row, parts of the filter, and the rest."""
    pairs = (g.parts + 2) // 2
    return min(255, ceil((g.sums + g.loads * 4 + g.parts + pairs * 4 + 28) / 8) * 8)


def products(g: Geometry) -> int:
    """Of a row of the filter with eight rows of outputs."""
    total = 0
    for tile in range(g.tiles):
        first = max(tile * 2 + g.first_part, 0)
        last = min(tile * 2 + g.last_part + 1, g.pieces - 1)
        if first <= last:
            single = (first - g.first_part) % 2
            total += single + (last - first + 2 - single) // 2
    return total


def estimated_cycles(g: Geometry, target: CudaTarget) -> float:
    """Of a call on the target."""
    c, p = g.config, g.problem
    resident = max(1, min(
        c.blocks,
        REGISTERS // (registers(g) * c.threads),
        target.shared_bytes_per_multiprocessor // (g.shared_bytes + 1024),
        target.threads_per_multiprocessor // c.threads,
    ))  # fmt: skip
    # Slots of a warp: products, operands, parts of the filter, outputs.
    line = 3.1 * products(g) + 4.5 * g.loads + 10
    work = g.taps_h * (c.images * g.lines * line + 0.7 * g.parts + 14) + 25 * g.sums
    # Slots of a block for copies from memory and back.
    elements = c.images * c.channels / WARP
    each, slots = (8, 54) if p.channels_last else (g.copy, 45)
    moves = elements * g.patch_rows * g.pieces * 8 / each * slots
    if p.channels_last:
        moves += elements * g.band * g.columns / 8 * 329
    share = g.blocks / target.multiprocessors
    waves = ceil(share / resident)
    share = ceil(share) if share < 4 else share
    warps = min(resident, share) * c.channels / 4
    compute = share * (c.channels * work + moves) / 4 * (1 + 0.39 / max(warps, 0.25))
    compute += share * BLOCK
    halo = g.patch_rows / min(g.band, g.height) if g.bands > 1 else 1.0
    memory = p.min_bytes / target.multiprocessors / DEVICE_BYTES * (0.6 + 0.4 * halo)
    turn = g.taps_h * ROW + 1.26 * work + 4.1 * moves / c.channels
    return LAUNCH + max(compute, memory, turn * waves) + 0.36 * turn
