"""A hand-written schedule as a template of MetaSchedule: its steps stay, its tiles are sampled.

What the search finds is a configuration of that schedule like any other: it is checked by the
schedule, built, measured and recorded as such.
"""

from __future__ import annotations

from typing import Any

from ..epilogue import NONE
from ..problem import ConvProblem
from ..schedules import cpu_blocked
from ..target import CpuTarget

__all__ = ["CpuBlockedTemplate"]

# Rows and columns of a register block are at most what any processor's registers hold.
_MOST_ROWS, _MOST_COLUMNS = 4, 16


class CpuBlockedTemplate:
    """`cpu_blocked` with sampled tiles, over the output rounded up as a start needs it.

    start: a valid configuration; its lanes, vectors and unroll stay.
    """

    name = "cpu_blocked"

    def __init__(self, problem: ConvProblem, target: CpuTarget, start: Any = None) -> None:
        self.problem, self.target = problem, target
        self.start = start or cpu_blocked.SCHEDULE.default(problem, target)
        self.function = cpu_blocked.expression(problem, self.start, NONE)

    def space(self) -> Any:
        """The space generator: one design, whose tile sizes mutate."""
        from tvm.s_tir import meta_schedule as ms

        return ms.space_generator.ScheduleFn(
            self._design,
            sch_rules=[],
            postprocs=[],
            mutator_probs={ms.mutator.MutateTileSize(): 1.0},
        )

    def _design(self, sch: Any) -> None:
        _, _, b, m, q, _ = sch.get_loops(sch.get_sblock("y"))
        blocks = int(sch.get(b).extent)
        parts = sch.sample_perfect_tile(b, n=2, max_innermost_factor=blocks)
        rows = sch.sample_perfect_tile(m, n=3, max_innermost_factor=_MOST_ROWS)
        columns = sch.sample_perfect_tile(q, n=2, max_innermost_factor=_MOST_COLUMNS)
        cpu_blocked.lay_out(sch, self.problem, self.start, parts, rows, columns)

    def config(self, trace: Any) -> Any | None:
        """The configuration that a trace of the space decides for; None if it is not valid."""
        tiles = [
            [int(size) for size in trace.decisions[step]]
            for step in trace.insts
            if step.kind.name == "SamplePerfectTile"
        ]
        (splits, _), (_, row_tiles, tile_rows), (_, tile_columns) = tiles
        start = self.start
        config = cpu_blocked.Config(
            lanes=start.lanes,
            vectors=start.vectors,
            tile_rows=tile_rows,
            tile_columns=tile_columns,
            block_rows=row_tiles * tile_rows,
            splits=splits,
            unroll=start.unroll,
        )
        refused = cpu_blocked.SCHEDULE.check(config, self.problem, self.target)
        return config if refused is None else None
