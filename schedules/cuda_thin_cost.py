"""Which configurations of `cuda_thin` are worth a try, and what each should cost."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from ..problem import ConvProblem
from ..target import CudaTarget
from .cuda_thin_tiles import (
    BLOCK_BYTES,
    LANES,
    MULTIPROCESSOR_BYTES,
    SYSTEM_BYTES,
    Config,
    Geometry,
    overlap,
    registers,
)
from .hopper import WARPGROUP, WGMMA_M

# Multiplying warpgroups of a block, and blocks of a multiprocessor.
_CREWS = ((4, 1), (3, 1), (2, 1), (1, 1), (2, 2), (1, 2), (1, 3), (1, 4))
# Rows of a stage that a warp copies, at most.
_COPIED = 4
# Stages more than a tile needs: room for other warpgroups' tiles, and for the producer's lead.
_MORE = (8, 4, 2, 1)
# Bytes of a stage's two mbarriers.
_BARRIERS = 16
# Registers of a thread beside sums and operands that no epilogue spills with, by nvcc 13.0.
_EPILOGUE = 40


def candidates(problem: ConvProblem) -> Iterator[Config]:
    """Configurations for a problem; some are not valid."""
    for block_n, channels, pairs in itertools.product(
        _widths(problem), _channels(problem), _pairs(problem)
    ):
        first = Config(block_n, 1, channels, 1, 2, pairs=pairs)
        crowded = _crowded(problem, first)
        g = Geometry(problem, replace(first, by_copies=not crowded))
        most = min(_COPIED if g.by_copies else 8, g.most_rows)
        # Elements keep two warpgroups busy; warps that copy wait most of the time.
        producers = (1,) if g.by_copies else (1, 2)
        some = sorted({most, -(-most // 2)})
        for (warpgroups, blocks), rows, steps, producing, turns in itertools.product(
            _CREWS, some, (4, 3, 2), producers, (True, False)
        ):
            if turns and (warpgroups == 1 or blocks > 1):
                continue  # nobody to take turns with, or others go on meanwhile
            fields = dict(warpgroups=warpgroups, rows=rows, steps=steps, blocks=blocks)
            fields |= dict(producers=producing, turns=turns, pairs=pairs, by_copies=not crowded)
            g = Geometry(problem, Config(block_n, channels=channels, stages=2, **fields))
            held = g.config.sums + g.held
            if steps > max(2, g.k_steps) or held > registers(g.config).consumer - _EPILOGUE:
                continue
            # As many stages as there is room for, up to what others' tiles can use.
            stage, fewest = rows * g.pitch * 4, g.fewest_stages
            room = min(BLOCK_BYTES, MULTIPROCESSOR_BYTES // blocks - SYSTEM_BYTES)
            room -= g.shared_bytes - g.ring_bytes
            if crowded:
                room -= _BARRIERS * (fewest + max(_MORE))
            else:
                room -= 1024 + g.mirrored * g.pitch * 4
            more = next((m for m in _MORE if (fewest + m) * stage <= room), 0)
            config = Config(block_n, channels=channels, stages=fewest + more, **fields)
            if more > 0 or crowded or pairs or not Geometry(problem, config).wraps:
                yield config


def _crowded(problem: ConvProblem, config: Config) -> bool:
    """Whether the filter leaves no room for slots of copies beside a ring whose first rows are
    there twice, where that is wanted, in NHWC.

    Then threads bring elements: rows in the ring are worth more than slots (3x11x11 in TF32 on an
    H200: 104 us with 30 rows, 114 with 26 and slots; 143 with half of the channels at a time).
    """
    config = replace(config, stages=Geometry(problem, config).fewest_stages)
    g = Geometry(problem, config)
    return problem.channels_last and (not g.fits or (g.wraps and not config.pairs))


def _widths(problem: ConvProblem) -> list[int]:
    """All output channels, if a tile can have so many, or equal parts of them in eights."""
    eights = -(-problem.out_channels // 8)
    fewest = -(-eights // 32)
    parts = sorted({-(-eights // n) for n in (*(n * fewest for n in (1, 2, 4, 6, 8)), fewest + 1)})
    return [8 * part for part in parts]


def _pairs(problem: ConvProblem) -> tuple[bool, ...]:
    """Whether words of a window may be held for the one below."""
    return (False, True) if overlap(problem) else (False,)


def _channels(problem: ConvProblem) -> list[int]:
    odd = problem.itemsize == 2 and problem.in_channels % 2
    return [problem.in_channels, *([problem.in_channels + 1] if odd else [])]


# Fitted to 103 measurements on an H100 (rms 8 %) and 78 on an H200, whose faster memory it does not
# know: there it says 17 % too much. Of 24 problems what it ranks first took 0.9 % longer than the
# fastest measured, geometric mean, and 6.5 % at most. Cycles at CLOCK GHz. Instructions of a warp
# for a tile, and for a step of K; of a producing warp for a stage, a row, a load of an element, and
# the cycles from one of these to the next; of a warpgroup that nobody disturbs the cycles from
# group to group of steps beside those of the products, and for a tile's outputs; of shared memory
# for a word of each thread; of a launch with the first rows, and of each KiB of a filter, which
# every block reads for itself.
_TILE, _STEP = 145.0, 2.45
_STAGE, _ROW, _ELEMENTS, _EACH = 17.0, 12.6, 5.9, 6.5
_GROUP, _OUTPUTS, _WORD = 135.0, 273.0, 6.6
_LAUNCH, _FILTER = 8750.0, 81.0
CLOCK = 1.7
# Of a warp that copies, for a stage, a row, and a word of a lane.
_COPIED_STAGE, _COPIED_ROW, _COPIED_WORD = 163.0, 8.2, 4.0
# Bytes a cycle of DRAM, of all multiprocessors; how much more outputs count where warpgroups store
# their tiles at the same time (the median of 8 pairs of measurements).
_DRAM, _AT_ONCE = 2750.0 / CLOCK, 1.0125
# How often outputs in NCHW count once more where rows of a tile do not begin at sectors of 32
# bytes, which are then written in parts: where neighbouring tiles are stored one soon after the
# other, and where they are stored at the same time.
_SECTOR, _IN_ORDER, _SIDE_BY_SIDE = 32, 0.65, 1.8
# Of things that go on side by side the longest counts, and the others too.
_NORM = 2.5


def cycles(g: Geometry, target: CudaTarget) -> float:
    """Of the busiest multiprocessor: products, instructions, rows that are brought, memory."""
    c = g.config
    parts = g.parts(target.multiprocessors)
    blocks = -(-parts * g.n_tiles // target.multiprocessors)  # one after the other or together
    tiles = -(-g.tiles // parts) * blocks
    # The filter's columns are read from shared memory, as a step's four words a lane are.
    step = max(c.block_n / 2, _WORD * g.loads / g.k_steps + c.block_n / 4)
    rows = tiles * WGMMA_M / g.columns * g.next_row + g.window_rows * blocks
    producing, waiting = _producing(g, rows)
    together = min(blocks, c.blocks)
    alone = -(-g.k_steps // c.steps) * _GROUP + g.k_steps * c.block_n / 2 + _OUTPUTS
    busy = _together(
        tiles * g.k_steps * step,
        tiles * (_TILE + _STEP * g.k_steps) + producing,
        tiles * alone / (together * c.warpgroups),
        waiting / together,
        _moved(g) / _DRAM,
    )
    return _LAUNCH + _FILTER * g.filter_bytes / 1024 * together + busy


def _producing(g: Geometry, rows: float) -> tuple[float, float]:
    """Instructions of a scheduler for so many rows of the ring, and cycles if it had no others."""
    c = g.config
    if not g.by_copies:
        load = g.row_loads * _ELEMENTS * g.copies
        instructions = rows / c.rows * (_STAGE + c.rows * (_ROW + load))
        return instructions, instructions * _EACH / c.producers
    # A stage is one warp's, and a scheduler's share of them that of one of its warps.
    words = -(-g.class_words // LANES) * g.copies
    stage = _COPIED_STAGE + c.rows * (_COPIED_ROW + words * _COPIED_WORD)
    instructions = rows / c.rows * stage / (WARPGROUP // LANES)
    return instructions, instructions * _EACH / c.producers


def _moved(g: Geometry) -> float:
    """Bytes, in whole sectors."""
    p = g.problem
    in_order = g.config.turns or g.config.warpgroups == 1
    more = 0 if in_order else _AT_ONCE - 1
    if not p.channels_last and g.image_pixels * p.itemsize % _SECTOR:
        more = _IN_ORDER if in_order else _SIDE_BY_SIDE
    return p.min_bytes + more * prod(p.output_shape) * p.itemsize


def _together(*parts: float) -> float:
    return sum(part**_NORM for part in parts) ** (1 / _NORM)
