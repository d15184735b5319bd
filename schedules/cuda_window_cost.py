"""Which configurations of `cuda_window` are worth a try, and what each should cost."""

import itertools
from collections.abc import Iterator

from ..problem import ConvProblem
from ..target import CudaTarget
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
    for n in (8, 16, 32, 64, 128):
        if n > max(8, problem.batch):
            break
        for w, h in itertools.product(range(1, min(columns, 256 // n) + 1), range(1, min(rows, 4) + 1)):
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


# Of one multiprocessor, fitted to measurements on an H100: bytes a cycle from the L2 cache, and how
# many times as long a copy in steps takes; cycles from asking for a patch, or for a tile of the
# filter, to having it; cycles of storing 64 x 8 outputs, of a tile, of a tap, of adding up over a
# cluster, and of a launch.
_ARRIVING, _STEPPED = 30.0, 1.5
_PATCH, _FILTER = 1150.0, 1100.0
_STORE, _TILE, _TAP, _CLUSTER, _LAUNCH = 100.0, 1000.0, 10.0, 6000.0, 5000.0
# Bytes a cycle that wgmma reads from shared memory, and those of DRAM for each multiprocessor.
_READ, _DRAM = 128.0, 12.0


def cycles(g: Geometry, grid: int, target: CudaTarget) -> float:
    """Of the busiest multiprocessor: products, copies, and stores that nothing hides."""
    c = g.config
    share = 1 / c.split
    steps = (g.channel_rows - 1) * (ROW_BYTES // WGMMA_K_BYTES) + g.last_steps
    product = max(c.piece_n / 2, (64 + c.piece_n) * WGMMA_K_BYTES / _READ)
    taps = len(g.order)
    together = 1 if c.turns else c.consumers  # warpgroups at work on a tile
    tensor = taps * (c.pieces * steps * product * together + g.channel_rows * _TAP) * share
    patches = g.copies * share
    filters = g.filter_tiles * share if c.filter_stages else 0
    stepped = _STEPPED if max(g.class_h, g.class_w) > 1 else 1
    arriving = (patches * g.patch_bytes * stepped + filters * g.filter_bytes) / _ARRIVING
    waiting = max(
        patches * _PATCH / (c.pixel_stages - 1), filters * _FILTER / max(1, g.filter_stages - 1)
    )
    store = c.pixels / 8 * _STORE + _TILE + (_CLUSTER if c.split > 1 else 0)
    if c.turns:
        each = max(tensor, arriving, waiting, (tensor + store) / 2)
    elif c.blocks > 1:
        each = max(c.blocks * tensor, c.blocks * arriving, waiting, tensor + store)
    else:
        each = max(tensor, arriving, waiting) + store
    each += 0.05 * waiting  # of two that are equal, the one with more under way
    waves = -(-g.tiles // grid)
    if c.split > 1:
        waves = -(-g.tiles // max(1, target.multiprocessors * c.blocks // c.split))
    hidden = store if c.turns or c.blocks > 1 else 0
    moved = g.problem.min_bytes / target.multiprocessors / _DRAM
    return _LAUNCH + max(waves * each + hidden, moved)
