"""Who knows of whose accesses: a vector clock for each thread of a cluster.

Columns stand for what accesses memory: the threads; the tensor cores of each warpgroup (its wgmma);
and, of each mbarrier, the copies that it counts. An access is stamped with its column and that
column's clock. A thread is ordered after it if the thread's entry for the column has come so far.
"""

import numpy as np

from .launch import WARP

_LANES = np.arange(WARP)


class Clocks:
    """What every thread knows. The lanes of a warp share a clock, which each release advances."""

    def __init__(self, threads: int, groups: int):
        self.threads, self.groups = threads, groups
        self._columns = threads + groups
        self.known = np.zeros((threads, self._columns + 64), np.int32)
        # What a thread knew at its last proxy fence: the accesses that asynchronous ones see.
        self.fenced = np.zeros((threads, threads), np.int32)
        self.now = np.zeros(threads // WARP, np.int32)
        # Of each thread the least that it knows of the lanes of each warp, where up to date.
        self._floor = np.zeros((threads, threads // WARP), np.int32)
        self._stale = np.ones(threads, bool)
        self._advance(np.arange(threads))

    def column(self) -> int:
        """A column for another mbarrier."""
        if self._columns == self.known.shape[1]:
            self.known = np.hstack([self.known, np.zeros_like(self.known)])
        self._columns += 1
        return self._columns - 1

    def _advance(self, threads: np.ndarray) -> None:
        warps = np.unique(threads // WARP)
        self.now[warps] += 1
        lanes = (warps[:, None] * WARP + _LANES).ravel()
        self.known[lanes, lanes] = self.now[lanes // WARP]

    def release(self, threads: np.ndarray) -> np.ndarray:
        """What the threads know together, and a new time for what they do from now on."""
        given = self.known[threads].max(axis=0)
        self._advance(threads)
        return given

    def acquire(self, threads: np.ndarray, given: np.ndarray) -> None:
        """The threads learn what others released."""
        width = given.size  # columns that came later were not known then
        self.known[threads, :width] = np.maximum(self.known[threads, :width], given)
        self._stale[threads] = True

    def fence(self, threads: np.ndarray) -> None:
        """`fence.proxy.async`: all that the threads know of is seen by asynchronous accesses."""
        self.fenced[threads] = self.known[threads, : self.threads]
        self._advance(threads)

    def floor(self, threads: np.ndarray) -> np.ndarray:
        """The least that each thread knows of the lanes of each warp; own releases aside."""
        stale = threads[self._stale[threads]]
        if stale.size:
            of_warps = self.known[stale, : self.threads].reshape(stale.size, -1, WARP)
            self._floor[stale] = of_warps.min(axis=2)
            self._stale[stale] = False
        return self._floor[threads]


def merged(given: np.ndarray | None, more: np.ndarray) -> np.ndarray:
    """Knowledge from several releases, of which the later may have more columns."""
    if given is None:
        return more
    if given.size < more.size:
        given, more = more, given
    given = given.copy()
    np.maximum(given[: more.size], more, out=given[: more.size])
    return given
