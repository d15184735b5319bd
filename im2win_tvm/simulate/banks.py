"""Bank conflicts of shared memory: 32 banks of 4 bytes, one word of each a cycle.

A warp's access of 4 bytes a thread is one wavefront, of 8 bytes two (half warps), of 16 bytes four
(quarter warps), if no two threads of it want different words of one bank.
"""

from typing import NamedTuple

import numpy as np

from .errors import Site
from .launch import WARP
from .machine import Machine

BANKS, BANK_BYTES = 32, 4


class Conflicts(NamedTuple):
    """Wavefronts of a statement, and how many of them conflicts cause."""

    wavefronts: int
    extra: int


class Banks:
    """Counts wavefronts by statement."""

    def __init__(self, machine: Machine):
        self._machine = machine
        self.by_statement: dict[str, Conflicts] = {}

    def count(self, offset: np.ndarray, nbytes: int, lanes: np.ndarray, site: Site) -> None:
        """An access by each lane of `nbytes` bytes at a byte offset in its block's memory."""
        machine = self._machine
        nbytes = max(nbytes, BANK_BYTES)
        together = WARP * BANK_BYTES // nbytes
        turns = WARP // together
        part = machine.warp[lanes] * turns + machine.thread[lanes] % WARP // together
        words = offset // BANK_BYTES + np.arange(nbytes // BANK_BYTES)[:, None]
        span = int(words.max()) // BANKS + 1
        # One number for each distinct (part of a warp, bank, word).
        keys = np.unique((part * BANKS + words % BANKS) * span + words // BANKS)
        bank, distinct = np.unique(keys // span, return_counts=True)
        parts = bank // BANKS
        most = np.zeros(int(parts.max()) + 1, np.int64)
        np.maximum.at(most, parts, distinct)
        wavefronts, ideal = int(most.sum()), int((most > 0).sum())
        old = self.by_statement.get(str(site), Conflicts(0, 0))
        self.by_statement[str(site)] = Conflicts(
            old.wavefronts + wavefronts, old.extra + wavefronts - ideal
        )
