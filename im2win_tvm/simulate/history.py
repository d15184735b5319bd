"""Accesses of memory in a kernel with roles: as `memory.Log`, but ordered by vector clocks."""

import numpy as np

from .errors import Site
from .launch import WARP
from .memory import Log, Region

# The clock of words that are an mbarrier: nobody comes so far.
_NEVER = np.iinfo(np.int32).max
_LANES = np.arange(WARP)


class History(Log):
    """Of each word the last write, and the last reads of every warp and of its wgmma."""

    def clear(self, words: int) -> None:
        """Forget everything; the region has `words` words from now on."""
        self.size, self.local = words, self.region.shared
        # Threads of the grid, counted from 1, of clusters that ran before: ordered with nobody.
        self._past_writes = np.zeros(0 if self.local else words, np.int64)
        self._past_reads = np.zeros(0 if self.local else words, np.int64)
        self._begin()

    def _begin(self) -> None:
        self._writer = np.zeros(self.size, np.int32)  # its column, counted from 1
        self._written = np.zeros(self.size, np.int32)
        self._atomic: np.ndarray | None = None
        # By warp: the clock of the last read, and the lanes that read, as bits.
        self._reads: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # By column of what reads asynchronously, wgmma and copies: the clock of its last read.
        self._async: dict[int, np.ndarray] = {}

    def end(self) -> None:
        """The end of a cluster: what it did is of the past."""
        first, stores = self.machine.first, self.machine.stores
        touched = self._writer > 0
        thread = np.array([stores.thread(c) for c in range(self._writer.max() + 1)])
        self._past_writes[touched] = first + thread[self._writer[touched] - 1] + 1
        for warp, (clocks, _) in self._reads.items():
            self._past_reads[clocks > 0] = first + warp * WARP + 1
        self._begin()

    def forget(self) -> None:
        """The cluster begins again."""
        self._begin()

    # --- What others call

    def read(self, index: np.ndarray, itemsize: int, lanes: np.ndarray, site: Site) -> None:
        """Check and note a read, one column a lane."""
        words = self.words(index, itemsize)
        threads = self.machine.number[lanes]
        self._after_write(words, threads, lanes, site, "read of")
        clocks = self.machine.clocks
        bits = np.uint32(1) << (threads % WARP).astype(np.uint32)
        for warp in np.unique(threads // WARP).tolist():
            mine = np.flatnonzero(threads // WARP == warp)
            at = words[..., mine]
            when, readers = self._reads.setdefault(
                warp, (np.zeros(self.size, np.int32), np.zeros(self.size, np.uint32))
            )
            now, before = clocks.now[warp], when[at]
            # Earlier reads that these lanes know of need not be remembered beside theirs.
            known = before <= clocks.floor(threads[mine])[:, warp]
            readers[at] = np.where(known & (before < now), 0, readers[at])
            when[at] = now
            np.bitwise_or.at(readers, at, np.broadcast_to(bits[mine], at.shape))

    def write(
        self, index: np.ndarray, itemsize: int, lanes: np.ndarray, site: Site, atomic: bool = False
    ) -> None:
        """Check and note a write, one column a lane."""
        words = self.words(index, itemsize)
        threads = self.machine.number[lanes]
        doing = "atomic of" if atomic else "write of"
        self._after_write(words, threads, lanes, site, doing)
        self._after_reads(words, threads, lanes, site, doing)
        self._writer[words] = threads + 1
        self._written[words] = self.machine.clocks.now[threads // WARP]
        if atomic and self._atomic is None:
            self._atomic = np.zeros(self.size, bool)
        if self._atomic is not None:
            self._atomic[words] = atomic
        lost = self._writer[words] != threads + 1
        if lost.any() and not atomic:
            other = self._name(self._writer[words][lost][0])
            message = f"write of a word that {other} writes in the same statement"
            self._fail(lost, words, lanes, site, message)

    def issue(self, words: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        """A copy of `cp.async`, which knows no mbarrier here."""
        site.fail(self.machine, "cp.async in a kernel with mbarriers is not simulated", lanes[0])

    def copy(self, words: np.ndarray, lane: int, column: int, clock: int, site: Site) -> None:
        """A bulk copy is issued: its words are written at a clock of its mbarrier's column."""
        words, lanes = words.reshape(-1, 1), np.array([lane])
        threads = self.machine.number[lanes]
        self._after_write(words, threads, lanes, site, "copy into")
        self._after_reads(words, threads, lanes, site, "copy into")
        self._writer[words], self._written[words] = column + 1, clock

    def reserve(self, words: np.ndarray, lane: int, column: int, site: Site) -> None:
        """Words become an mbarrier."""
        self.copy(words, lane, column, _NEVER, site)

    def read_later(
        self, words: np.ndarray, lanes: np.ndarray, column: int, clock: int, site: Site, who: str
    ) -> None:
        """What these lanes issue, `who`, reads words until a clock of its column.

        It is to be ordered after their writes for all the lanes, and writes of threads fenced.
        """
        clocks = self.machine.clocks
        threads = self.machine.number[lanes]
        known = clocks.known[threads].min(axis=0)
        writer, written = self._writer[words], self._written[words]
        lane = np.full(words.size, lanes[0])
        if self.must_be_written and not writer.all():
            message = f"{who} reads a word never written"
            self._fail(writer == 0, words.reshape(1, -1), lane, site, message)
        late = known[writer - 1] < written
        if late.any():
            self._blame(late, words, writer, written, lane, site, f"{who}'s read of")
        by_thread = writer <= clocks.threads
        if by_thread.any():
            others, when = writer[by_thread] - 1, written[by_thread]
            # Fenced by who wrote, or by who reads.
            here = clocks.fenced[threads].min(axis=0)
            seen = np.maximum(clocks.fenced[others, others], here[others])
            if (seen < when).any():
                bad = by_thread.copy()
                bad[by_thread] = seen < when
                other = self._name(writer[bad][0])
                message = f"{who} reads a word that {other} wrote, no fence.proxy.async between"
                self._fail(bad, words.reshape(1, -1), lane, site, message)
        if column not in self._async:
            self._async[column] = np.zeros(self.size, np.int32)
        self._async[column][words] = clock

    # --- Checks

    def _after_write(self, words, threads, lanes, site, doing) -> None:
        """That the last write of every word is ordered before now."""
        writer, written = self._writer[words], self._written[words]
        if self.must_be_written and doing == "read of" and not writer.all():
            self._fail(writer == 0, words, lanes, site, "read of a word never written")
        clash = (self.machine.clocks.known[threads, writer - 1] < written) & (writer != 0)
        if doing == "atomic of" and self._atomic is not None:
            clash &= ~self._atomic[words]
        if clash.any():
            self._blame(clash, words, writer, written, lanes, site, doing)
        if self._past_writes.size and doing != "atomic of":
            self._check_past(self._past_writes[words], words, lanes, site, doing, "wrote")

    def _check_past(self, past, words, lanes, site, doing, did) -> None:
        if past.any():
            other = self.machine.name(int(past[past > 0][0]) - 1)
            message = f"{doing} a word that {other} {did}, no barrier between"
            self._fail(past > 0, words, lanes, site, message)

    def _blame(self, bad, words, writer, written, lanes, site, doing) -> None:
        column, clock = int(writer[bad][0]) - 1, int(written[bad][0])
        thread = self.machine.stores.thread(column)
        if column < self.machine.clocks.threads:
            message = f"{doing} a word that {self._name(column + 1)} wrote, no barrier between"
        elif thread >= 0:
            message = (
                f"{doing} a word that a bulk copy of {self._name(thread + 1)} fills, not waited for"
            )
        else:
            barrier = self.machine.mbarriers.of_column(column)
            filled = f"that a copy counted by {barrier}, not waited for, is to fill"
            message = f"{doing} a word {f'of {barrier}' if clock == _NEVER else filled}"
        self._fail(bad, words, lanes, site, message)

    def _after_reads(self, words, threads, lanes, site, doing) -> None:
        """That all reads of every word are ordered before now."""
        machine, clocks = self.machine, self.machine.clocks
        floor = clocks.floor(threads) if self._reads else None
        for warp, (when, readers) in self._reads.items():
            late = when[words] > floor[:, warp]
            if not late.any():
                continue
            at, column = words[late], np.broadcast_to(np.arange(lanes.size), words.shape)[late]
            others = warp * WARP + _LANES
            unknown = clocks.known[threads[column][:, None], others] < when[at][:, None]
            unknown &= readers[at][:, None] >> _LANES.astype(np.uint32) & 1 == 1
            unknown &= others != threads[column][:, None]
            if unknown.any():
                first = np.flatnonzero(unknown.any(axis=1))[0]
                other = self._name(others[np.flatnonzero(unknown[first])[0]] + 1)
                several = " and others" if unknown[first].sum() > 1 else ""
                bad = late.copy()
                bad[late] = unknown.any(axis=1)
                message = f"{doing} a word that {other}{several} read, no barrier between"
                self._fail(bad, words, lanes, site, message)
        for column, when in self._async.items():
            late = when[words] > clocks.known[threads, column]
            if late.any():
                other, over = machine.reader(column)
                waited = int(when[words][late][0]) <= over
                unordered = "no barrier between" if waited else "not waited for"
                message = f"{doing} a word that {other} reads, {unordered}"
                self._fail(late, words, lanes, site, message)
        if self._past_reads.size:
            self._check_past(self._past_reads[words], words, lanes, site, doing, "read")

    def _name(self, number: int) -> str:
        """A thread of the cluster, counted from 1."""
        return self.machine.name(self.machine.first + int(number) - 1)


def log(machine, region: Region, words: int, granule: int, checked: bool) -> Log:
    """What logs the accesses of a region on this machine."""
    return (History if machine.roles else Log)(machine, region, words, granule, checked)
