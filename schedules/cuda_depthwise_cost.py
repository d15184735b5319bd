"""What a configuration of `cuda_depthwise` costs: registers, and a model of its time.

The numbers of the model were fitted to 372 measurements on an H100, of layers of MobileNetV2,
ConvNeXt-T, RepLKNet and ResNeXt at batches of 1, 32 and 128. What it ranks first of those takes 2 %
longer than the fastest of them in the geometric mean; its times are off by 14 % (root mean square).
"""

from math import ceil

from ..target import CudaTarget
from .cuda_depthwise_tiles import Bands, Geometry

# GHz, at which the model counts cycles.
CLOCK = 1.7
WARP = 32
# Registers of a multiprocessor (CUDA C++ Programming Guide, compute capabilities), and what a
# thread takes beside sums, filter and input.
REGISTERS, OTHERS = 65536, 28
# Blocks of a multiprocessor (same source), and cycles that each of them costs to launch.
MAX_BLOCKS, BLOCK = 32, 103
# Bytes a cycle of a multiprocessor's share of device memory.
DEVICE_BYTES = 12.7
# Cycles of a call that does nothing, and of a thread's loads until the first of them is there.
LAUNCH, LATENCY = 5200, 930


def registers(g: Geometry) -> int:
    """Of a thread, about: in eights, at most 255."""
    channels = g.config.vector if g.depthwise else 1
    line = g.w.reads * channels
    held = line * g.problem.itemsize / 4 * (min(g.h.reads, 4) if g.config.resident else 1)
    taps = g.config.vector * (g.taps if g.config.resident else 1)
    return min(255, ceil((g.sums + held + taps + OTHERS) / 8) * 8)


def instructions(g: Geometry) -> float:
    """Issue slots of a thread, from the first load to the last store."""
    c = g.config
    channels = c.vector if g.depthwise else 1
    reads = g.h.reads * g.w.reads
    loads = reads * (3.6 if g.problem.channels_last else 2.0)
    conversions = 2.45 * reads * channels if g.problem.itemsize == 2 else 0.0
    taps = 3.24 * g.taps * (1 if c.resident else c.rows) * max(1.0, c.vector / 2)
    return g.group_in * (g.taps * g.sums + loads + conversions + taps) + 60


def estimated_cycles(g: Geometry, target: CudaTarget) -> float:
    """Of a call on the target."""
    c, p = g.config, g.problem
    if p.channels_last:
        units = g.batch * g.h.tiles() * g.w.tiles() * (g.out_channels // c.vector)
        blocks, turns, shared, latency = ceil(units / c.threads), 1, 0, LATENCY
    else:
        b = Bands(g)
        held = b.groups * g.group_out * g.h.tiles(b.rows) * g.w.tiles()
        blocks, turns, latency = b.blocks, ceil(held / c.threads), 1.5 * LATENCY
        units, shared = blocks * held, b.shared_bytes + 1024
    resident = min(
        MAX_BLOCKS,
        target.threads_per_multiprocessor // c.threads,
        REGISTERS // (registers(g) * c.threads),
        target.shared_bytes_per_multiprocessor // shared if shared else MAX_BLOCKS,
    )
    if resident < 1:
        return float("inf")
    work = instructions(g)
    share = blocks / target.multiprocessors
    waves = ceil(share / resident)
    share = ceil(share) if share < 4 else share
    # Slots of four schedulers; few warps leave some of them empty.
    warps = min(resident, share) * c.threads / WARP / 4
    slots = share * (units / blocks / WARP) * work / 4
    issue = slots * (1 + 0.24 / max(warps, 0.5)) + share * BLOCK
    memory = p.min_bytes / target.multiprocessors / DEVICE_BYTES
    turn = latency + 0.73 * work * turns
    busy = max(issue, memory, turn * waves + share * BLOCK)
    # What is computed while nothing is copied, the less the more blocks there are.
    alone = 0.5 * min(issue, memory) / max(1.0, min(warps, 4.0))
    return LAUNCH + busy + alone + 1.4 * turn
