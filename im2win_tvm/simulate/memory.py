"""Memory that threads share: its bytes, and who touched each word of it when.

Two accesses of one word by different threads, one of them a write, need a barrier between them
that both threads' blocks (or, across blocks, their cluster) took part in.
"""

import numpy as np

from .errors import Site
from .machine import (
    EPOCH,
    IDENTITY,
    IN_BLOCKS,
    IN_FLIGHT,
    IN_WARP,
    IN_WARPS,
    THREAD,
    Machine,
)

# Bits between the places of two arrays of global memory: no index of one array leads to another.
SPACING = 40
# Generic addresses of shared memory, above every array; a block of a cluster has 2**24 of them, of
# which the first 2**24 stand for the thread's own block.
SHARED = 1 << 60
WINDOW = 24


class Region:
    """One array of global memory, or the shared memory of all blocks of the group.

    `base` is the address of the first byte, or of the first byte in each block.
    """

    def __init__(self, name: str, data: np.ndarray, nbytes: int, base: int):
        self.name, self.nbytes, self.base = name, nbytes, base
        self.log: Log | None = None
        self.fill(data)

    def fill(self, data: np.ndarray) -> None:
        """Take other bytes."""
        self._bytes = data
        self._views: dict[np.dtype, np.ndarray] = {}

    @property
    def shared(self) -> bool:
        return self.base == SHARED

    def view(self, dtype: np.dtype) -> np.ndarray:
        """The region as elements of a type, from the first aligned address on."""
        view = self._views.get(dtype)
        if view is None:
            first = -self.base % dtype.itemsize
            count = (self._bytes.size - first) // dtype.itemsize
            whole = self._bytes[first : first + count * dtype.itemsize]
            view = self._views[dtype] = whole.view(dtype)
        return view

    def read(self, dtype: np.dtype, index: np.ndarray, lanes: np.ndarray, site: Site):
        """Elements by index into the view, one column a lane."""
        if self.log is not None:
            self.log.read(index, dtype.itemsize, lanes, site)
        return self.view(dtype)[index]

    def write(self, dtype: np.dtype, index: np.ndarray, value, lanes: np.ndarray, site: Site):
        """Set elements by index into the view, one column a lane."""
        if self.log is not None:
            self.log.write(index, dtype.itemsize, lanes, site)
        self.view(dtype)[index] = value

    def add(self, dtype: np.dtype, index: np.ndarray, value, lanes: np.ndarray, site: Site):
        """Add atomically, lane after lane; returns what each lane found."""
        if self.log is not None:
            self.log.write(index, dtype.itemsize, lanes, site, atomic=True)
        memory, found = self.view(dtype), np.empty(index.shape, dtype)
        for at, where in enumerate(index):
            found[at] = memory[where]
            memory[where] += value[at]
        return found


class Log:
    """The last write and the reads of each word of a region, as stamps.

    A word has `granule` bytes. Zero is the stamp of a word never touched.
    """

    def __init__(self, machine: Machine, region: Region, words: int, granule: int, checked: bool):
        self.machine, self.region, self.granule = machine, region, granule
        self.must_be_written = region.shared and checked
        self.clear(words)

    def clear(self, words: int) -> None:
        """Forget everything; the region has `words` words from now on."""
        self.local = self.region.shared  # no word was touched by several blocks yet
        self.writes = np.zeros(words, np.int64)
        self.reads = np.zeros(words, np.int64)
        self.atomic: np.ndarray | None = None
        # Cluster phases and warp barriers of the accesses, where the kernel has any.
        phases, warps = self.machine.clustered, self.machine.warp_ordered
        self.phases = [np.zeros(words, np.int32) for _ in range(2)] if phases else None
        self.warps = [np.zeros(words, np.int32) for _ in range(2)] if warps else None

    def words(self, index: np.ndarray, itemsize: int) -> np.ndarray:
        """Words of elements, one column a lane."""
        if itemsize == self.granule:
            return index
        if itemsize < self.granule:
            return index * itemsize // self.granule
        each = itemsize // self.granule
        rows = index.reshape(-1, 1, index.shape[-1]) * each + np.arange(each)[:, None]
        return rows.reshape(-1, index.shape[-1])

    def read(self, index: np.ndarray, itemsize: int, lanes: np.ndarray, site: Site) -> None:
        """Check and note a read."""
        words = self.words(index, itemsize)
        key, limit = self._now(lanes)
        self._check_write(words, lanes, key, limit, site, "read")
        before = self.reads[words]
        stamp = key
        if self._maybe_recent(before, limit):
            clash = self._unordered(before, 1, words, lanes)
            if clash.any():
                together = key | IN_WARP | (before & (IN_WARPS | IN_BLOCKS))
                together |= np.where(self._warp(before) != self._warp(key), IN_WARPS, 0)
                together |= np.where(self._block(before) != self._block(key), IN_BLOCKS, 0)
                stamp = np.where(clash, together, key)
        self.reads[words] = stamp
        self._note(1, words, lanes)
        # Of several lanes on one word only the last left its stamp.
        kept = self.reads[words]
        lost = (kept ^ key) & THREAD != 0
        if lost.any():
            kept = kept[lost]
            if self.local and self.warps is None:
                self.reads[words[lost]] = kept | IN_WARP
                return
            key = np.broadcast_to(key, lost.shape)[lost]
            several = kept | IN_WARP
            several |= np.where(self._warp(kept) != self._warp(key), IN_WARPS, 0)
            several |= np.where(self._block(kept) != self._block(key), IN_BLOCKS, 0)
            np.bitwise_or.at(self.reads, words[lost], several & ~THREAD & IDENTITY)

    def write(
        self, index: np.ndarray, itemsize: int, lanes: np.ndarray, site: Site, atomic: bool = False
    ) -> None:
        """Check and note a write."""
        words = self.words(index, itemsize)
        key, limit = self._now(lanes)
        self._check_before_write(words, lanes, key, limit, site, atomic)
        self._stamp_writes(words, lanes, key, site, atomic)

    def issue(self, words: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        """Check the start of a copy, whose words are then in flight."""
        key, limit = self._now(lanes)
        self._check_before_write(words, lanes, key, limit, site, False)
        self._stamp_writes(words, lanes, key | IN_FLIGHT, site, False)

    def land(self, words: np.ndarray, lanes: np.ndarray) -> None:
        """Note the end of a copy: a write of its thread, now."""
        self.writes[words] = self.machine.key[lanes]
        self._note(0, words, lanes)

    def _now(self, lanes: np.ndarray):
        machine = self.machine
        if lanes.size == machine.size:
            return machine.key, machine.limit
        limit = machine.limit
        return machine.key[lanes], limit if type(limit) is int else limit[lanes]

    def _maybe_recent(self, stamps: np.ndarray, limit) -> bool:
        """Whether some stamp is not of an earlier epoch of the only block that can touch it."""
        if not self.local:
            return bool(stamps.any())
        if type(limit) is int:
            return bool(stamps.max() >= limit)
        return bool((stamps >= limit).any())

    def _check_write(self, words, lanes, key, limit, site, doing) -> None:
        """That the last write of every word is over, and ordered before now."""
        stamps = self.writes[words]
        if self.must_be_written and doing == "read" and not stamps.all():
            self._fail(stamps == 0, words, lanes, site, "read of a word never written")
        if not self._maybe_recent(stamps, limit):
            return
        flying = stamps >= IN_FLIGHT
        if flying.any():
            other = self.machine.name(int(stamps[flying][0]) & THREAD)
            message = f"{doing} of a word that a copy of {other}, not waited for, is to fill"
            self._fail(flying, words, lanes, site, message)
        if self.local and (stamps == key).all():
            return
        clash = self._unordered(stamps, 0, words, lanes)
        if doing == "atomic" and self.atomic is not None:
            clash &= ~self.atomic[words]
        if clash.any():
            other = self.machine.name(int(stamps[clash][0]) & THREAD)
            message = f"{doing} of a word that {other} wrote, no barrier between"
            self._fail(clash, words, lanes, site, message)

    def _check_before_write(self, words, lanes, key, limit, site, atomic) -> None:
        doing = "atomic" if atomic else "write"
        self._check_write(words, lanes, key, limit, site, doing)
        stamps = self.reads[words]
        if self._maybe_recent(stamps, limit):
            clash = self._unordered(stamps, 1, words, lanes)
            if clash.any():
                stamp = int(stamps[clash][0])
                other = self.machine.name(stamp & THREAD)
                other += " and others" if stamp & (IN_WARP | IN_WARPS | IN_BLOCKS) else ""
                message = f"{doing} of a word that {other} read, no barrier between"
                self._fail(clash, words, lanes, site, message)

    def _stamp_writes(self, words, lanes, key, site, atomic) -> None:
        self.writes[words] = key
        self._note(0, words, lanes)
        if atomic and self.atomic is None:
            self.atomic = np.zeros(self.writes.size, bool)
        if self.atomic is not None:
            self.atomic[words] = atomic
        lost = self.writes[words] != key
        if lost.any() and not atomic:
            other = self.machine.name(int(self.writes[words][lost][0]) & THREAD)
            message = f"write of a word that {other} writes in the same statement"
            self._fail(lost, words, lanes, site, message)

    def _note(self, kind: int, words: np.ndarray, lanes: np.ndarray) -> None:
        machine = self.machine
        if self.phases is not None:
            self.phases[kind][words] = machine.arrived[machine.block[lanes]]
        if self.warps is not None:
            self.warps[kind][words] = machine.warp_epoch[machine.warp[lanes]]

    def _block(self, stamp):
        return (stamp & THREAD) // self.machine.threads

    def _warp(self, stamp):
        block, thread = np.divmod(stamp & THREAD, self.machine.threads)
        return block * self.machine.warps + thread // 32

    def _unordered(self, stamps, kind: int, words, lanes) -> np.ndarray:
        """Which accesses, by stamp, are of other threads and not ordered before those of now."""
        machine = self.machine
        key = machine.key[lanes]
        clash = ((stamps ^ key) & IDENTITY != 0) & (stamps != 0)
        recent = (stamps ^ key) & ~IN_FLIGHT < (1 << EPOCH)
        if self.local:
            clash &= recent
        else:
            same = (self._block(stamps) == self._block(key)) & (stamps & IN_BLOCKS == 0)
            clash &= recent | ~same
        if self.phases is not None:
            clusters = self._block(stamps) // machine.ranks == self._block(key) // machine.ranks
            if not self.region.shared:
                clusters &= stamps & IN_BLOCKS == 0
            synced = machine.synced[machine.block[lanes]]
            clash &= ~(clusters & (synced > self.phases[kind][words]))
        if self.warps is not None:
            together = (self._warp(stamps) == self._warp(key)) & (
                stamps & (IN_WARPS | IN_BLOCKS) == 0
            )
            now = machine.warp_epoch[machine.warp[lanes]]
            clash &= ~(together & (now > self.warps[kind][words]))
        return clash

    def _fail(self, bad: np.ndarray, words, lanes, site: Site, message: str) -> None:
        at = int(np.flatnonzero(bad)[0])
        lane = int(lanes[at % bad.shape[-1]])
        byte = int(words.ravel()[at]) * self.granule
        if self.region.shared:
            byte %= self.region.nbytes
        site.fail(self.machine, f"{self.region.name}: {message}:", lane, byte)
