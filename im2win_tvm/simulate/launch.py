"""The grid of a TIRx function, and what its scope identifiers are worth to each thread."""

from math import prod
from typing import Any, NamedTuple

import numpy as np
import tvm_ffi
from tvm import tirx

from .errors import SimulationError

WARP, WARPGROUP = 32, 128
# `ScopeIdDef.scope`: TVM's enumeration of (parent, scope).
_CLUSTERS, _BLOCKS, _RANKS, _WARPGROUPS, _WARPS, _WARPS_OF_GROUP, _LANES, _THREADS, _GROUP = range(
    9
)


def _padded(extents: tuple[int, ...]) -> tuple[int, int, int]:
    return (*extents, 1, 1, 1)[:3]


def _axes(index: np.ndarray, extents: tuple[int, ...]) -> list[np.ndarray]:
    """Coordinates of a linear index, x first."""
    return list(np.unravel_index(index, extents[::-1]))[::-1]


class Launch(NamedTuple):
    """Extents of the grid in blocks, of a cluster in blocks, and of a block in threads, x first.

    Blocks are numbered so that those of a cluster are neighbours: cluster, then rank in it.
    """

    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: tuple[int, int, int]
    identifiers: tuple[Any, ...]  # the ScopeIdDefs

    @property
    def blocks(self) -> int:
        return prod(self.grid)

    @property
    def threads(self) -> int:
        return prod(self.block)

    @property
    def ranks(self) -> int:
        return prod(self.cluster)

    def coordinates(self, block: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of a block by number: its cluster's place in the grid, its own in the cluster."""
        clusters = tuple(g // c for g, c in zip(self.grid, self.cluster, strict=True))
        return _axes(block // self.ranks, clusters), _axes(block % self.ranks, self.cluster)

    def block_index(self, block: int) -> tuple[int, ...]:
        """blockIdx of a block by number."""
        cluster, rank = self.coordinates(np.asarray(block))
        return tuple(int(c * n + r) for c, n, r in zip(cluster, self.cluster, rank, strict=True))

    def thread_index(self, thread: int) -> tuple[int, ...]:
        """threadIdx of a thread by number."""
        return tuple(int(axis) for axis in _axes(np.asarray(thread), self.block))

    def values(self, block: np.ndarray, thread: np.ndarray):
        """(variable, value of every thread) of each identifier."""
        cluster, rank = self.coordinates(block)
        full = [c * n + r for c, n, r in zip(cluster, self.cluster, rank, strict=True)]
        linear = {
            _WARPGROUPS: thread // WARPGROUP,
            _WARPS: thread // WARP,
            _WARPS_OF_GROUP: thread % WARPGROUP // WARP,
            _LANES: thread % WARP,
            _GROUP: thread % WARPGROUP,
        }
        axes = {
            _CLUSTERS: cluster,
            _BLOCKS: full,
            _RANKS: rank,
            _THREADS: _axes(thread, self.block),
        }
        for definition in self.identifiers:
            scope, variables = int(definition.scope), list(definition.def_ids)
            if scope in axes and (len(variables) > 1 or definition.extents is not None):
                values = axes[scope]
            elif scope in linear and len(variables) == 1:
                values = [linear[scope]]
            else:
                raise SimulationError(f"scope identifiers {variables} are not simulated")
            for variable, value in zip(variables, values, strict=False):
                yield variable, value.astype(np.int32)


def launch(function: tirx.PrimFunc) -> Launch:
    """The launch that a function's scope identifiers declare."""
    found: list[Any] = []
    tvm_ffi.structural_walk(
        function.body, (tirx.ScopeIdDefStmt, lambda node: found.append(getattr(node, "def")))
    )
    extents = {
        int(d.scope): tuple(int(e) for e in d.extents) for d in found if d.extents is not None
    }
    cluster = _padded(extents.get(_RANKS, (1,)))
    if _BLOCKS in extents:
        grid = _padded(extents[_BLOCKS])
    elif _CLUSTERS in extents:
        clusters = _padded(extents[_CLUSTERS])
        grid = tuple(n * c for n, c in zip(clusters, cluster, strict=True))
    else:
        raise SimulationError("T.cta_id: the function declares no grid")
    if _THREADS in extents:
        block = _padded(extents[_THREADS])
    elif _WARPS in extents:
        block = _padded((prod(extents[_WARPS]) * WARP,))
    elif _WARPGROUPS in extents:
        block = _padded((prod(extents[_WARPGROUPS]) * WARPGROUP,))
    else:
        raise SimulationError("T.thread_id: the function declares no threads")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise SimulationError(f"grid {grid} is not a multiple of the cluster {cluster}")
    return Launch(grid, cluster, block, tuple(found))
