"""Samples of MetaSchedule's space that fit a GPU, for its search to begin with.

TVM samples each tile by itself. A convolution of a large batch has so many factors that of five
hundred samples one has threads and shared memory as a GPU has them; to find the fifty that an
evolutionary search wants to begin with takes minutes. Here tiles are drawn with these limits in
sight. The space is TVM's, and its own postprocessing decides what fits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["sampled"]

# Levels of TVM's tiles on a GPU, SSSRRSRS: blocks, virtual threads or more blocks, threads or
# warps, and two in these; of a sum: steps that share a load, and two in a step.
_SPATIAL, _SUMS = 5, 3
# Whole warps, and a block for each multiprocessor of a GPU if there are as many outputs.
_WARP, _BUSY, _BLOCKS = 32, 0.85, 132
_PIPELINE, _TENSORIZE = "software_pipeline_stage", "meta_schedule.auto_tensorize"
# Draws, and among those samples, until what was not found is not there.
_DRAWS, _TRIES = 20_000, 60


@dataclass(frozen=True)
class _Bounds:
    """What fits, for kernels on CUDA cores in elements, for tensor cores in fragments.

    threads: least and most of a block, or its warps. tiles: sums in registers; fewer are short of
    arithmetic, more of registers. virtual, innermost: what TVM takes; tensor cores have no virtual
    threads. step: products of a sum between two loads of shared memory. shared: of both operands,
    in all stages of a pipeline.
    """

    threads: tuple[int, int]
    tiles: tuple[int, int]
    virtual: int | None
    innermost: int
    step: int
    shared: int


# Elements of four bytes: 48 KiB. And fragments, 16x16 of two bytes, half as much: the outputs, of
# four bytes, go through shared memory, too. Sums of a fragment are 8 registers of each thread, so
# that 16 of them are half of the 255 that it has.
_CUDA_CORES = _Bounds((64, 512), (8, 96), 8, 64, 64, 48 * 1024 // 4)
_TENSOR_CORES = _Bounds((2, 16), (2, 16), None, 4, 8, 24 * 1024 // 512)


def sampled(context: Any, count: int, seed: int) -> list[Any]:
    """Up to `count` schedules of a TuneContext's space, after TVM's postprocessing.

    Fewer where tiles that seem to fit are not found, or one of `_TRIES` samples does not.
    """
    chance = random.Random(seed)
    spaces = [schedule.trace for schedule in context.generate_design_space()]
    found: dict[str, Any] = {}
    for _ in range(_TRIES * count):
        if len(found) == count or not spaces:
            break
        space = chance.choice(spaces)
        trace = space
        steps = [step for step in trace.insts if step.kind.name == "SamplePerfectTile"]
        extents = [math.prod(int(size) for size in trace.decisions[step]) for step in steps]
        levels = [int(step.attrs[0]) for step in steps]
        tiles = _tiles(extents, levels, _bounds(trace), _buffers(trace), chance)
        if tiles is None:
            spaces.remove(space)
            continue
        for step, tile in zip(steps, tiles, strict=True):
            trace = trace.with_decision(step, tile, True)
        for step in trace.insts:
            if step.kind.name == "SampleCategorical":
                trace = trace.with_decision(step, chance.randrange(len(step.attrs[0])), True)
        schedule = _applied(context, trace)
        if schedule is not None:
            found.setdefault(str(schedule.trace), schedule)
    return list(found.values())


def _applied(context: Any, trace: Any) -> Any:
    """The schedule of a trace after TVM's postprocessing; None if that refuses it."""
    from tvm import s_tir

    schedule = s_tir.Schedule(context.mod, error_render_level="none")
    try:
        trace.apply_to_schedule(schedule, remove_postproc=True)
    except Exception:  # a step that these tiles do not allow
        return None
    schedule.enter_postproc()  # what follows is no part of a trace that is changed and replayed
    every = context.space_generator.postprocs
    return schedule if all(postproc.apply(schedule) for postproc in every) else None


def _tiles(
    extents: list[int], levels: list[int], bounds: _Bounds, buffers: int, chance: random.Random
) -> list[list[int]] | None:
    """Tiles of each loop, or None if none were drawn that seem to fit."""
    factors = [list(_factors(extent)) for extent in extents]

    def draw(kind: int) -> dict[int, list[int]]:
        places = [place for place, parts in enumerate(levels) if parts == kind]
        return {place: _split(factors[place], kind, chance) for place in places}

    block = 2 if bounds.virtual is None else 1  # the level from which tiles are a block's
    for _ in range(_DRAWS):
        spatial = draw(_SPATIAL)
        # Which of the loops is that of the filters is not known: the one with which it fits.
        sides = [math.prod(tile[block:]) for tile in spatial.values()]
        outputs = math.prod(sides)
        operands = min(outputs // side + side for side in sides) * buffers
        if operands <= bounds.shared and _fits(list(spatial.values()), bounds):
            break
    else:
        return None
    for _ in range(_DRAWS):
        sums = draw(_SUMS)
        step = math.prod(tile[1] * tile[2] for tile in sums.values())
        innermost = max(tile[-1] for tile in sums.values())
        if (
            step <= bounds.step
            and innermost <= bounds.innermost
            and operands * step <= bounds.shared
        ):
            tiles = spatial | sums
            return [tiles[place] for place in range(len(levels))]
    return None


def _fits(spatial: list[list[int]], bounds: _Bounds) -> bool:
    blocks, virtual, threads, outer, inner = (
        math.prod(tile[level] for tile in spatial) for level in range(_SPATIAL)
    )
    if bounds.virtual is None:
        blocks, virtual, whole = blocks * virtual, 1, threads
    else:
        whole = -(-threads // _WARP) * _WARP
    (fewest, most), (small, large) = bounds.threads, bounds.tiles
    every = math.prod(math.prod(tile) for tile in spatial)
    return (
        blocks >= min(_BLOCKS, every // (fewest * small))
        and virtual <= (bounds.virtual or 1)
        and fewest <= threads <= most
        and threads >= _BUSY * whole
        and small <= virtual * outer * inner <= large
        and max(tile[-1] for tile in spatial) <= bounds.innermost
    )


def _bounds(trace: Any) -> _Bounds:
    marked = any(str(step.attrs[0]).strip('"') == _TENSORIZE for step in _annotations(trace))
    return _TENSOR_CORES if marked else _CUDA_CORES


def _annotations(trace: Any) -> Iterator[Any]:
    return (step for step in trace.insts if step.kind.name == "Annotate")


def _buffers(trace: Any) -> int:
    """How many steps of a sum are in shared memory at a time, by the trace's pipeline."""
    stages = [
        int(stage)
        for step in _annotations(trace)
        if str(step.attrs[0]).strip('"') == _PIPELINE
        for stage in step.inputs[1]
    ]
    return max(stages, default=0) or 1


def _split(factors: list[int], parts: int, chance: random.Random) -> list[int]:
    """Each prime factor in a part drawn by chance."""
    tile = [1] * parts
    for factor in factors:
        tile[chance.randrange(parts)] *= factor
    return tile


def _factors(extent: int) -> Iterator[int]:
    """The prime factors of a number."""
    factor = 2
    while factor * factor <= extent:
        while extent % factor == 0:
            yield factor
            extent //= factor
        factor += 1
    if extent > 1:
        yield extent
