"""Which configurations of `cuda_thin_fp32` are worth a try, and what each should cost."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from ..problem import ConvProblem
from ..target import CudaTarget
from .cuda_thin_cost import (
    _CREWS,
    _DRAM,
    _EACH,
    _ELEMENTS,
    _FILTER,
    _LAUNCH,
    _MORE,
    _ROW,
    _STAGE,
    _TILE,
    _moved,
    _together,
    _widths,
)
from .cuda_thin_fp32_tiles import PRODUCTS, STEP, SplitGeometry
from .cuda_thin_tiles import BLOCK_BYTES, MULTIPROCESSOR_BYTES, SYSTEM_BYTES, Config
from .hopper import WGMMA_M

# Instructions of a warp: for a register of operands, two words that are loaded, scaled and split
# in two or three halves; for a group of steps. Cycles of an instruction of a warpgroup that nobody
# disturbs, and from the last products before sums are promoted to the next ones. None of these was
# fitted: they are counted in the code, and the rest is that of `cuda_thin`.
_SPLIT, _GROUP = {2: 13.0, 3: 19.0}, 12.0
_ALONE, _BETWEEN = 1.5, 100.0
# Beside what `cuda_thin` does for a row: its largest number; for an element three instructions.
_TOP, _FOR_TOP = 8.0, 3.0


def candidates(problem: ConvProblem) -> Iterator[Config]:
    """Configurations for a problem; some are not valid."""
    for block_n in _widths(problem):
        first = SplitGeometry(problem, Config(block_n, 1, problem.in_channels, 1, 2, 1))
        most = min(8, first.most_rows)
        for (warpgroups, blocks), rows, steps, producers, turns in itertools.product(
            _CREWS, sorted({most, -(-most // 2), 1}), (2, 1), (2, 1), (True, False)
        ):
            if turns and (warpgroups == 1 or blocks > 1):
                continue  # nobody to take turns with, or others go on meanwhile
            fields = dict(warpgroups=warpgroups, rows=rows, steps=steps, blocks=blocks)
            fields |= dict(producers=producers, turns=turns)
            config = Config(block_n, channels=problem.in_channels, stages=2, **fields)
            g = SplitGeometry(problem, config)
            if steps > g.k_steps:
                continue
            stage = rows * (g.pitch * 4 + 16)
            room = min(BLOCK_BYTES, MULTIPROCESSOR_BYTES // blocks - SYSTEM_BYTES) - 1024
            room -= g.shared_bytes - 2 * stage
            # As many stages as there is room for, up to what others' tiles can use.
            more = next((m for m in _MORE if (g.fewest_stages + m) * stage <= room), 0)
            yield replace(config, stages=g.fewest_stages + more)


def cycles(g: SplitGeometry, target: CudaTarget) -> float:
    """Of the busiest multiprocessor, as in `cuda_thin_cost`."""
    c, halves = g.config, g.halves
    parts = g.parts(target.multiprocessors)
    blocks = -(-parts * g.n_tiles // target.multiprocessors)
    tiles = -(-g.tiles // parts) * blocks
    products = len(PRODUCTS[halves])
    # A step reads 16 words of 64 pixels, and for every product the filter's columns.
    tensor = products * c.block_n / 2
    step = max(tensor, 2 * STEP + products * c.block_n / 4)
    promotions = -(-g.groups // g.period)
    split = g.k_steps * 4 * _SPLIT[halves]
    promote = g.groups * _GROUP + c.sums * promotions
    other = _TILE + 2 * c.sums
    rows = tiles * WGMMA_M / g.columns * g.next_row + g.window_rows * blocks
    stage = _STAGE + c.rows * (_ROW + _TOP + g.row_loads * (_ELEMENTS + _FOR_TOP))
    producing = rows / c.rows * stage
    together = min(blocks, c.blocks)
    # A warpgroup splits a group of steps while it multiplies another; at times it promotes.
    alone = max(_ALONE * split, g.k_steps * tensor)
    alone += _ALONE * (promote + other) + promotions * _BETWEEN
    busy = _together(
        tiles * g.k_steps * step,
        tiles * (split + promote + other) + producing,
        tiles * alone / (together * c.warpgroups),
        producing * _EACH / c.producers / together,
        _moved(g) / _DRAM,
    )
    return _LAUNCH + _FILTER * g.filter_bytes / 1024 + busy
