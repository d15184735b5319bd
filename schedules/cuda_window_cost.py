"""Which configurations of `cuda_window` are worth a try, and what each should cost."""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from math import prod

from ..problem import ConvProblem
from ..target import CudaTarget
from .cuda_channels_last import is_needed, shape
from .cuda_window_tiles import BLOCK_BYTES, MULTIPROCESSOR_BYTES, SYSTEM_BYTES, Config, Geometry
from .hopper import ROW_BYTES, WGMMA_K_BYTES

# Warpgroups of a block: along channels, along pixels, by turns; and blocks of a multiprocessor.
_CREWS = (
    (1, 1, True, 1),
    (2, 1, False, 1),
    (1, 2, False, 1),
    (1, 1, False, 2),
    (1, 1, False, 1),
    (2, 2, False, 1),
    (3, 1, False, 1),
    (1, 3, False, 1),
    (4, 1, False, 1),
    (1, 1, False, 3),
)
_SPLITS = (1, 2, 3, 4, 6, 8)
_PIXEL_STAGES = (2, 3, 4, 6, 8)


def _evenly(extent: int, size: int) -> bool:
    """Whether no smaller tile does with as many of them."""
    return -(-extent // -(-extent // size)) == size


def _tiles(problem: ConvProblem) -> Iterator[tuple[int, int, int, bool]]:
    """(tile_n, tile_h, tile_w, images) of up to 256 pixels of which few lie outside."""
    rows, columns = problem.output_size
    eights = -(-columns // 8)
    images = range(1, min(problem.batch, 4) + 1) if rows * columns <= 256 else (1,)
    for h, n in itertools.product(range(2, min(rows, 32) + 1), images):
        if 8 * h * n <= 256 and _evenly(rows, h):
            yield n, h, 8, False
    for eight in range(1, min(eights, 32) + 1):
        if _evenly(eights, eight) or eight in (8, 16, 24, 32):
            yield 1, 1, eight * 8, False
    # In NCHW the outputs of neighbouring images lie far apart.
    for n in (8, 16, 32, 64, 128) if problem.channels_last else ():
        if n > max(8, problem.batch):
            break
        for w, h in itertools.product(
            range(1, min(columns, 256 // n) + 1), range(1, min(rows, 4) + 1)
        ):
            if n * w * h <= 256 and _evenly(columns, w):
                yield n, h, w, True


def candidates(problem: ConvProblem) -> Iterator[Config]:
    """Configurations for a problem as the kernel walks through it; some are not valid."""
    taps = ["window"]
    if problem.kernel_size[1] > 1:
        taps.append("row")
    if max(problem.kernel_size) > 1:
        taps.append("tap")
    denses = (False, True) if 1 < max(problem.stride) <= min(problem.kernel_size) else (False,)
    per_group = problem.out_channels // problem.groups
    for (n, h, w, images), (m, p, turns, blocks), served, dense in itertools.product(
        _tiles(problem), _CREWS, taps, denses
    ):
        if m > 1 and per_group <= 64 * (m - 1):
            continue
        if dense and (served == "tap" or (images and n > 8)):
            continue
        yield from _staged(
            Geometry(problem, Config(n, h, w, images, m, p, turns, served, dense, 2, 2, 1, blocks))
        )


def _staged(g: Geometry) -> Iterator[Config]:
    """A configuration with as many stages as there is room for, divided in some ways."""
    c = g.config
    room = min(BLOCK_BYTES, MULTIPROCESSOR_BYTES // c.blocks - SYSTEM_BYTES)
    room -= g.shared_bytes - 2 * g.stage_bytes - 2 * g.filter_bytes + 512
    for stages in _PIXEL_STAGES:
        left = room - stages * g.stage_bytes
        if left < 2 * g.filter_bytes:
            return
        fields = vars(c) | dict(pixel_stages=stages)
        if g.filter_tiles * g.filter_bytes <= left and g.tiles > 132 * c.blocks:
            yield Config(**fields | dict(filter_stages=0))
        filters = min(12, left // g.filter_bytes)
        for split in _SPLITS if g.tiles < 300 and not c.turns else (1,):
            if split <= g.copies:
                yield Config(**fields | dict(filter_stages=filters, split=split))


# Fitted to 736 measurements on an H100, cycles at CLOCK GHz. Of one multiprocessor: bytes a cycle
# from the L2 cache, and how much longer a copy in steps takes than what it brings; cycles from
# asking for a patch, or for a tile of the filter, to having it; of storing 64 x 8 outputs, of a
# tile, of a launch; of adding up over a cluster, and of each pixel of it; of a wgmma beside its
# pixels, and the least of a tap.
_ARRIVING, _STEPPED = 44.0, 1.4
_PATCH, _FILTER = 1730.0, 1025.0
_STORE, _TILE, _LAUNCH = 51.0, 280.0, 8300.0
_CLUSTER, _CLUSTER_PIXEL = 4900.0, 8.2
# By a cluster's blocks how many clusters compute at a time, by 692 measurements on H200s: where
# there are more tiles, their time doubles. Larger ones leave multiprocessors without work.
_CLUSTERS = {2: 66, 3: 39, 4: 30, 6: 16, 8: 15}
# Times as long as storing long runs; from three layers.
_SHORT = 10.0
_WGMMA, _TAP = 4.6, 195.0
CLOCK = 1.72
# Bytes a cycle of DRAM, of all multiprocessors.
_DRAM = 2700.0 / CLOCK
# Of the copy that brings channels to the end, or fills them up: from four layers, and two.
_FILLED, _TRANSPOSED, _COPY_LAUNCH = 410.0, 1200.0, 3000.0
# Of things that go on side by side the longest counts, and the others a little.
_NORM = 5.6


def cycles(g: Geometry, grid: int, target: CudaTarget) -> float:
    """Of the busiest multiprocessor: products, copies, and stores that nothing hides."""
    c = g.config
    k_rows = g.channel_rows
    steps = k_rows - 1 + g.last_steps / (ROW_BYTES // WGMMA_K_BYTES)
    steps *= ROW_BYTES // WGMMA_K_BYTES / k_rows  # of a tap, over a row of channels
    together = 1 if c.turns else c.consumers  # warpgroups at work on a tile
    alone = max(c.pieces * steps * (c.piece_n / 2 + _WGMMA) * together, _TAP)
    tap = alone * c.blocks
    taps, patches = g.filter_tiles / c.split, g.copies / c.split
    patch = g.patch_bytes * (_STEPPED if g.class_w > 1 else 1) * c.blocks / _ARRIVING
    weights = g.filter_bytes * c.blocks / _ARRIVING if c.filter_stages else 0
    # A stage is taken from when its copy is asked for until one tap after its last.
    held = _PATCH + 0.5 * patch + (taps / patches + 1) * tap
    held_weights = _FILTER + 2 * tap if c.filter_stages else 0
    product = _together(
        taps * tap,
        patches * patch + taps * weights,
        patches * held / c.pixel_stages,
        taps * held_weights / g.filter_stages,
    )
    # In NCHW a row of eight columns is a short run of memory.
    short = not g.problem.channels_last and c.tile_h > 1 and g.columns > 8
    store = c.pixels / 8 * _STORE * (_SHORT if short else 1) + _TILE
    if c.split > 1:
        store += _CLUSTER + _CLUSTER_PIXEL * c.pixels * c.consumers
    hidden = c.turns or c.blocks > 1
    if hidden:
        each = max(product, (taps * alone + store) / (2 if c.turns else 1))
    else:
        each = product + store
    waves = -(-g.tiles // (clusters(c.split, target) * c.blocks if c.split > 1 else grid))
    busy = _LAUNCH + waves * each + (store if hidden else 0)
    return _together(busy, _moved(g) / _DRAM + _LAUNCH) + _copied(g.problem)


def clusters(split: int, target: CudaTarget) -> int:
    """Clusters of so many blocks that a GPU computes at a time, if a block has a multiprocessor."""
    counted = next(count for size, count in _CLUSTERS.items() if size >= split)
    return max(1, counted * target.multiprocessors // 132)


@lru_cache(maxsize=256)
def _copied(problem: ConvProblem) -> float:
    """Of the copy before, if there is one."""
    if not is_needed(problem):
        return 0.0
    elements = prod(problem.input_shape) + prod(shape(problem))
    rate = _FILLED if problem.channels_last else _TRANSPOSED
    return elements * problem.itemsize / rate + _COPY_LAUNCH


def _together(*parts: float) -> float:
    return sum(part**_NORM for part in parts) ** (1 / _NORM)


def _moved(g: Geometry) -> float:
    """Bytes that have to be moved; a stride may leave out pixels of the input."""
    p = g.problem
    read = min(1, g.taps_h / g.stride_h) * min(1, g.taps_w / g.stride_w)
    return p.min_bytes - (1 - read) * prod(p.input_shape) * p.itemsize
