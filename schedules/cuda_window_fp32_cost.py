"""Which configurations of `cuda_window_fp32` are worth a try, and what each should cost."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from ..problem import ConvProblem
from ..target import CudaTarget
from .cuda_window_cost import _evenly, _moved, _tiles, _together, clusters
from .cuda_window_fp32_tiles import Config, SplitGeometry
from .cuda_window_tiles import BLOCK_BYTES
from .hopper import WGMMA_K_BYTES, WGMMA_M

# Warpgroups that multiply: along channels, along pixels.
_CREWS = ((2, 1), (1, 2), (1, 1))
_SPLITS = (1, 2, 3, 4, 6, 8)
_PIXEL_STAGES = (2, 3, 4, 6)
_MOST_PIXELS = 160


def candidates(problem: ConvProblem) -> Iterator[Config]:
    """Configurations for a problem as the kernel walks through it; some are not valid."""
    taps = ["window"]
    if problem.kernel_size[1] > 1:
        taps.append("row")
    if max(problem.kernel_size) > 1:
        taps.append("tap")
    denses = (False, True) if 1 < max(problem.stride) <= min(problem.kernel_size) else (False,)
    per_group = problem.out_channels // problem.groups
    tiles = [*_tiles(problem), *_of_24_images(problem)]
    for (n, h, w, images), (m, p), served, dense in itertools.product(tiles, _CREWS, taps, denses):
        if n * h * w > _MOST_PIXELS or (m > 1 and per_group <= 64 * (m - 1)):
            continue
        if dense and (served == "tap" or (images and n > 8)):
            continue
        # A long row of pixels may be that of several images: see the schedule.
        one_row = problem.kernel_size == (1, 1) and problem.input_size[0] == 1
        block = "patch" if n <= (32 if images else 1) and not one_row else "pixel"
        config = Config(n, h, w, images, m, p, False, served, dense, 2, 2, block=block)
        yield from _staged(SplitGeometry(problem, config))


def _of_24_images(problem: ConvProblem) -> Iterator[tuple[int, int, int, bool]]:
    """Tiles between those of 16 and of 32 images, where twice the registers of a sum are taken."""
    if problem.channels_last and problem.batch > 16:
        for w in range(1, min(problem.output_size[1], _MOST_PIXELS // 24) + 1):
            if _evenly(problem.output_size[1], w):
                yield 24, 1, w, True


def _staged(g: SplitGeometry) -> Iterator[Config]:
    """A configuration with as many stages as there is room for, divided in some ways."""
    c = g.config
    tile = g.filter_bytes + g.weight_bytes
    patch = g.stage_bytes + 4 * g.scale_floats
    for stages in _PIXEL_STAGES:
        left = BLOCK_BYTES - 512 - stages * patch
        if left < 2 * tile:
            return
        if g.filter_tiles * tile <= left and g.tiles > 132:
            yield replace(c, pixel_stages=stages, filter_stages=0)
        for split in _SPLITS if g.tiles < 300 else (1,):
            if split <= g.copies:
                filters = min(12, left // tile)
                yield replace(c, pixel_stages=stages, filter_stages=filters, split=split)


# Fitted to 58 measurements on an H100, four of them with a scale a pixel; cycles at CLOCK GHz. Of
# one multiprocessor: of a wgmma beside its pixels, the bytes a cycle that shared memory gives it,
# and what a wgmma more on other sums takes; of a tap, of promoting a pixel, of one beside which
# nobody multiplies; of splitting a row; of storing 64 x 8 outputs; of a launch. From the L2 cache:
# bytes a cycle, how much longer a copy in steps takes than what it brings, cycles from asking for a
# patch, or for a tile of the filter, to having it (as in `cuda_window_cost`, like those of a
# cluster).
CLOCK = 1.65
_WGMMA, _SHARED, _PIECE = 4.6, 128, 5.5
_TAP, _PROMOTE, _ALONE = 103.0, {"patch": 0.0, "pixel": 0.53}, 0.13
_ROW = {"patch": 4.5, "pixel": 5.3}
_STORE, _LAUNCH = 65.0, 6800.0
_ARRIVING, _STEPPED = 44.0, 1.4
_PATCH, _FILTER = 1730.0, 1025.0
_CLUSTER, _CLUSTER_PIXEL = 4900.0, 8.2
# Times as long as storing long runs.
_SHORT = 10.0
# Bytes a cycle of DRAM, of all multiprocessors.
_DRAM = 2700.0 / CLOCK


def cycles(g: SplitGeometry, grid: int, target: CudaTarget) -> float:
    """Of the busiest multiprocessor: what goes through the tensor cores and shared memory adds up,
    copies from elsewhere go on beside it."""
    c = g.config
    steps = (2 * (g.channel_rows - 1) + g.last_steps) / g.channel_rows
    wgmma = max(c.piece_n / 2 + _WGMMA, (WGMMA_M + c.piece_n) * WGMMA_K_BYTES / _SHARED)
    wgmmas = 3 * steps * (c.pieces * wgmma + (c.pieces - 1) * _PIECE)
    promote = _PROMOTE[c.block] + (_ALONE if c.consumers == 1 else 0)
    tap = c.consumers * (wgmmas + promote * c.pixels) + _TAP
    taps, patches = g.filter_tiles / c.split, g.copies / c.split
    patch = g.patch_bytes * (_STEPPED if g.class_w > 1 else 1) / _ARRIVING
    split = _ROW[c.block] * g.patch_rows
    weights = (g.filter_bytes + g.weight_bytes) / _ARRIVING if c.filter_stages else 0
    # A stage is taken from when its copy is asked for until its last tap.
    held = _PATCH + 0.5 * patch + split + taps / patches * tap
    held_weights = _FILTER + tap if c.filter_stages else 0
    product = _together(
        taps * tap + patches * split,
        patches * patch + taps * weights,
        patches * held / c.pixel_stages,
        taps * held_weights / g.filter_stages,
    )
    # In NCHW a row of eight columns is a short run of memory.
    short = not g.problem.channels_last and c.tile_h > 1 and g.columns > 8
    store = c.pixels / 8 * c.consumers * _STORE * (_SHORT if short else 1)
    if c.split > 1:
        store += _CLUSTER + _CLUSTER_PIXEL * c.pixels * c.consumers
    waves = -(-g.tiles // (clusters(c.split, target) if c.split > 1 else grid))
    busy = _LAUNCH + waves * (product + store)
    return _together(busy, _moved(g) / _DRAM + _LAUNCH)
