"""Asynchronous copies from global to shared memory (`cp.async`), PTX ISA 9.7.9.25.

A copy reads its source when it is issued, and its bytes are in shared memory when its thread waits
for the group that holds it: the latest moment that the ISA allows, so that code which needs an
earlier one is found out.
"""

from typing import NamedTuple

import numpy as np

from .errors import Site
from .machine import Machine, Mask
from .memory import Region


class _Copy(NamedTuple):
    groups: np.ndarray  # of each lane's copy
    lanes: np.ndarray
    words: np.ndarray  # destination, one column a lane
    data: np.ndarray


class Copies:
    """Copies in flight, and the groups of each lane."""

    def __init__(self, machine: Machine, shared: Region):
        self._machine, self._shared = machine, shared
        self.bytes = 0

    def start(self) -> None:
        """Forget everything: a new group of blocks."""
        self._groups = np.zeros(self._machine.size, np.int64)  # committed so far
        self._flying: list[_Copy] = []

    def issue(self, words: np.ndarray, data: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        """Start a copy: words of shared memory and their data to be, one column a lane."""
        self._shared.log.issue(words, lanes, site)
        self._flying.append(_Copy(self._groups[lanes], lanes, words, data))
        self.bytes += data.nbytes

    def commit(self, mask: Mask) -> None:
        """`cp.async.commit_group`: end each lane's group."""
        self._groups[mask.lanes] += 1

    def wait(self, mask: Mask, recent: int) -> None:
        """`cp.async.wait_group`: all of a lane's groups but the `recent` last are over."""
        self._land(mask, self._groups - recent)

    def wait_all(self, mask: Mask) -> None:
        """`cp.async.wait_all`: every copy of the lane is over, committed or not."""
        self._land(mask, self._groups + 1)

    def _land(self, mask: Mask, before: np.ndarray) -> None:
        log, kept = self._shared.log, []
        memory = self._shared.view(np.dtype(f"u{log.granule}"))
        for copy in self._flying:
            over = copy.groups < before[copy.lanes]
            if not mask.full:
                over &= mask.bits[copy.lanes]
            if over.all():
                memory[copy.words] = copy.data
                log.land(copy.words, copy.lanes)
                continue
            kept.append(copy)
            if over.any():
                done = np.flatnonzero(over)
                memory[copy.words[:, done]] = copy.data[:, done]
                log.land(copy.words[:, done], copy.lanes[done])
                rest = np.flatnonzero(~over)
                kept[-1] = _Copy(
                    copy.groups[rest],
                    copy.lanes[rest],
                    copy.words[:, rest],
                    copy.data[:, rest],
                )
        self._flying = kept
