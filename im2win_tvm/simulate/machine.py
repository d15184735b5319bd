"""A group of blocks in lock step: masks, barriers, and the stamps that order accesses.

A lane is one thread of the group. Every value of the program is an array over all lanes, or a
scalar where they agree; a mask says which lanes execute.
"""

import numpy as np

from .errors import Site
from .launch import WARP, Launch

# An access is stamped with its thread's number and, above EPOCH, with how many barriers its block
# has passed. The bits between say that several threads read the word, so that none is named.
EPOCH = 40
THREAD = (1 << 37) - 1
IN_BLOCKS, IN_WARPS, IN_WARP = 1 << 37, 1 << 38, 1 << 39
IDENTITY = (1 << EPOCH) - 1
IN_FLIGHT = 1 << 62


class Mask:
    """Which lanes execute: as a boolean for each, and as the numbers of those that do."""

    __slots__ = ("bits", "full", "lanes")

    def __init__(self, bits: np.ndarray, lanes: np.ndarray):
        self.bits, self.lanes = bits, lanes
        self.full = lanes.size == bits.size

    def where(self, condition: np.ndarray) -> "Mask | None":
        """The lanes where the condition holds too; None if there are none."""
        bits = condition if self.full else condition & self.bits
        lanes = np.flatnonzero(bits)
        if lanes.size == self.lanes.size:
            return self
        return Mask(bits, lanes) if lanes.size else None

    def of(self, value):
        """A value's entries for these lanes."""
        if self.full or type(value) is not np.ndarray or value.shape[-1] == 1:
            return value
        return value[..., self.lanes]

    def spread(self, value: np.ndarray) -> np.ndarray:
        """Entries for these lanes as an array over all lanes."""
        if self.full:
            return value
        full = np.zeros((*value.shape[:-1], self.bits.size), value.dtype)
        full[..., self.lanes] = value
        return full


class Machine:
    """The threads of one group of blocks after another, and how far each block has come."""

    roles = False  # whether warps may wait for each other in different branches

    def __init__(self, launch: Launch):
        self.launch = launch
        self.threads, self.ranks = launch.threads, launch.ranks
        self.warps = -(-launch.threads // WARP)
        self.barriers = self.cluster_barriers = 0
        self.clustered = launch.ranks > 1
        self.warp_ordered = False  # set where the function has a barrier of a warp

    def start(self, first: int, count: int) -> None:
        """Begin with `count` blocks from number `first`."""
        self.count, self.size = count, count * self.threads
        lanes = np.arange(self.size)
        self.lanes = lanes
        self.block = lanes // self.threads  # of a lane, in the group
        self.thread = lanes % self.threads
        self.gid = first * self.threads + lanes
        self.everyone = Mask(np.ones(self.size, bool), lanes)
        self.absent = np.zeros(self.size, bool)  # left a loop or the kernel
        self.exited = np.zeros(self.size, bool)
        self.epoch = np.ones(count, np.int64)
        # Cluster barriers: arrived at, waited for, and the last one waited for that orders memory.
        self.arrived = np.zeros(count, np.int64)
        self.released = np.zeros(count, bool)
        self.waited = np.zeros(count, np.int64)
        self.synced = np.zeros(count, np.int64)
        self.reached = np.full(count, -1)  # latest phase in which another block touched this one
        self.reacher: list = [None] * count
        self.warp_epoch = np.zeros(count * self.warps, np.int64)
        self.warp = self.block * self.warps + self.thread // WARP
        self._stamp()

    def _stamp(self) -> None:
        self.key = (self.epoch[self.block] << EPOCH) | self.gid
        if (self.epoch == self.epoch[0]).all():
            self.limit = int(self.epoch[0]) << EPOCH
        else:
            self.limit = self.epoch[self.block] << EPOCH

    def coordinates(self, gid: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """blockIdx and threadIdx of a thread of the grid."""
        block, thread = divmod(int(gid), self.threads)
        return self.launch.block_index(block), self.launch.thread_index(thread)

    def name(self, gid: int) -> str:
        """A thread of the grid, for messages."""
        block, thread = self.coordinates(gid)
        return f"block {_short(block, self.launch.grid)} thread {_short(thread, self.launch.block)}"

    def whole_blocks(self, mask: Mask, site: Site, what: str) -> np.ndarray:
        """The blocks that execute; an error if one does so without some of its threads."""
        if mask.full:
            return np.ones(self.count, bool)
        per_block = mask.bits.reshape(self.count, self.threads)
        some = per_block.any(axis=1)
        missing = some[:, None] & ~per_block & ~self.exited.reshape(per_block.shape)
        if missing.any():
            lane = int(np.flatnonzero(missing)[0])
            site.fail(self, f"{what} in divergent code: not reached", lane)
        return some

    def block_barrier(self, mask: Mask, site: Site) -> None:
        """`bar.sync`: every thread of a block waits for the others."""
        self.epoch[self.whole_blocks(mask, site, "barrier")] += 1
        self.barriers += 1
        self._stamp()

    def warp_barrier(self, mask: Mask, site: Site) -> None:
        """`bar.warp.sync` of whole warps."""
        if mask.full:
            self.warp_epoch += 1
            return
        active = np.bincount(self.warp[mask.lanes], minlength=self.warp_epoch.size)
        there = np.bincount(self.warp[~self.exited], minlength=self.warp_epoch.size)
        if ((active > 0) & (active < there)).any():
            warp = np.flatnonzero((active > 0) & (active < there))[0]
            lane = np.flatnonzero((self.warp == warp) & ~mask.bits & ~self.exited)[0]
            site.fail(self, "barrier of a warp in divergent code: not reached", int(lane))
        self.warp_epoch[active > 0] += 1

    def cluster_arrive(self, mask: Mask, site: Site, release: bool) -> None:
        """`barrier.cluster.arrive` by every thread of a block."""
        blocks = self.whole_blocks(mask, site, "barrier.cluster.arrive")
        twice = blocks & (self.arrived > self.waited)
        if twice.any():
            lane = int(np.flatnonzero(twice)[0]) * self.threads
            site.fail(self, "second barrier.cluster.arrive without a wait between", lane)
        self.arrived[blocks] += 1
        self.released[blocks] = release

    def cluster_wait(self, mask: Mask, site: Site) -> None:
        """`barrier.cluster.wait` by every thread of a block."""
        blocks = self.whole_blocks(mask, site, "barrier.cluster.wait")
        early = blocks & (self.arrived == self.waited)
        if early.any():
            lane = int(np.flatnonzero(early)[0]) * self.threads
            site.fail(self, "barrier.cluster.wait without an arrive before it", lane)
        # Threads that have ended are not waited for.
        ended = self.exited.reshape(self.count, self.threads).all(axis=1)
        of_cluster = np.where(ended, self.arrived.max(), self.arrived).reshape(-1, self.ranks)
        missing = blocks & (np.repeat(of_cluster.min(axis=1), self.ranks) < self.waited + 1)
        if missing.any():
            lane = int(np.flatnonzero(missing)[0]) * self.threads
            site.fail(self, "barrier.cluster.wait before every block of the cluster arrived", lane)
        self.waited[blocks] += 1
        released = np.repeat(self.released.reshape(-1, self.ranks).all(axis=1), self.ranks)
        ordered = blocks & released
        self.synced[ordered] = self.waited[ordered]
        self.cluster_barriers += 1

    def reach(self, owner: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        """Note that lanes touch the shared memory of other blocks of their cluster."""
        mine = self.block[lanes]
        remote = owner != mine
        if not remote.any():
            return
        unborn = remote & (self.waited[mine] == 0)
        if unborn.any():
            lane = int(lanes[np.flatnonzero(unborn)[0]])
            site.fail(
                self,
                "shared memory of another block before a cluster barrier shows that it runs:"
                " access",
                lane,
            )
        lanes, owner = lanes[remote], owner[remote]
        phases = self.arrived[self.block[lanes]]
        for block in np.unique(owner):
            of_block = np.flatnonzero(owner == block)
            at = of_block[phases[of_block].argmax()]
            if phases[at] >= self.reached[block]:
                self.reached[block], self.reacher[block] = phases[at], (int(lanes[at]), site)

    def finish(self) -> None:
        """The end of the kernel: no block may leave while another can still touch its memory."""
        left = np.flatnonzero((self.reached >= 0) & (self.waited <= self.reached))
        if left.size:
            lane, site = self.reacher[left[0]]
            block, _ = self.coordinates(self.gid[left[0] * self.threads])
            owner = _short(block, self.launch.grid)
            site.fail(
                self,
                f"block {owner} may have left the cluster, no barrier keeps it: access to its"
                " shared memory",
                lane,
                over=True,
            )


def _short(index: tuple[int, ...], extents: tuple[int, ...]):
    """An index without the trailing axes that have one entry."""
    axes = max((at for at, n in enumerate(extents, 1) if n > 1), default=1)
    return index[0] if axes == 1 else index[:axes]
