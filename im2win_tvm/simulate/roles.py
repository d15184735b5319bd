"""A machine for kernels whose warps have roles: they wait for each other in different branches.

One cluster runs at a time, each warpgroup of a block as a coroutine in lock step of its own; where
warps of a warpgroup turn out to wait for each other, each of them. The machine's lanes are those of
the coroutine that runs; barriers are where coroutines take turns.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .clocks import Clocks, merged
from .coroutines import Coroutine, Coroutines, Wait
from .errors import SimulationError, Site
from .launch import WARP, WARPGROUP, Launch
from .machine import Machine, Mask, _short

# What a machine says of the lanes that run.
_OF_LANES = ("size", "lanes", "block", "thread", "gid", "number", "everyone", "absent", "exited",
             "warp")  # fmt: skip


_SHOWN = 8  # of those who wait, in a message


class Deadlock(SimulationError):
    """Nobody can go on."""


class _Meeting:
    """A barrier of `bar.sync`: threads that came, what they released, who waits."""

    def __init__(self, expected: int | None):
        self.expected = expected  # None: all threads of the block that have not ended
        self.came = 0
        self.given: np.ndarray | None = None
        self.waiting: list[tuple[np.ndarray, Wait]] = []


class Roles(Machine):
    """The threads of one cluster after another, ordered by vector clocks."""

    roles = True
    mbarriers: Any  # the program's, which know their own columns of the clocks
    stores: Any  # and its bulk copies out of shared memory

    def __init__(self, launch: Launch):
        super().__init__(launch)
        if self.threads % WARP:
            raise SimulationError(f"{self.threads} threads a block: with mbarriers whole warps")
        self.coroutines = Coroutines()
        self.split: set[int] = set()  # warpgroups of a block whose warps run one by one
        self.per_block = -(-self.threads // WARPGROUP)
        # Puts everything in place that a coroutine keeps; the program has more of it.
        self.resume: Callable[[Coroutine], None] = self.enter

    def start(self, first: int, count: int) -> None:
        """Begin with the cluster whose first block has this number."""
        self.count, self.first = count, first * self.threads
        total = count * self.threads
        self.clocks = Clocks(total, count * self.per_block)
        self.gone = np.zeros(total, bool)
        # Groups of wgmma that each warpgroup committed, and those of them waited for.
        self.committed = [0] * (count * self.per_block)
        self.completed = [0] * (count * self.per_block)
        self._meetings: dict[tuple[int, int], _Meeting] = {}
        self._arrivals = np.zeros(total, np.int64)  # at cluster barriers, and waits for them
        self._waits = np.zeros(total, np.int64)
        self._phase = 0
        self._gathering: np.ndarray | None = None
        self._given: np.ndarray | None = None
        self._cluster_waiting: list[tuple[np.ndarray, Wait]] = []
        # By block: until when each thread touched its memory from elsewhere, and where.
        self._reached = np.zeros((count, total), np.int32)
        self._reachers: dict[int, tuple[int, Site]] = {}

    def crew(self) -> list[Coroutine]:
        """The coroutines of the cluster."""
        crew = []
        for block in range(self.count):
            for start in range(0, self.threads, WARPGROUP):
                end = min(start + WARPGROUP, self.threads)
                size = WARP if start // WARPGROUP in self.split else end - start
                for first in range(start, end, size):
                    thread = np.arange(first, first + size)
                    number = block * self.threads + thread
                    lanes = np.arange(size)
                    view = {
                        "size": size,
                        "lanes": lanes,
                        "block": np.full(size, block),
                        "thread": thread,
                        "gid": self.first + number,
                        "number": number,
                        "everyone": Mask(np.ones(size, bool), lanes),
                        "absent": np.zeros(size, bool),
                        "exited": self.gone[number[0] : number[-1] + 1],
                        "warp": number // WARP,
                    }
                    crew.append(Coroutine(block, first, [view]))
        return crew

    def enter(self, coroutine: Coroutine) -> None:
        """Its lanes are the machine's from now on."""
        self.__dict__.update(coroutine.held[0])

    def leave(self, coroutine: Coroutine) -> None:
        """Its turn is over."""
        if coroutine.ended:
            self.exited[...] = True

    def groups_of(self, thread: int) -> int:
        """The number of a thread's warpgroup in the cluster."""
        block, thread = divmod(int(thread), self.threads)
        return block * self.per_block + thread // WARPGROUP

    def reader(self, column: int) -> tuple[str, int]:
        """What reads asynchronously with a column of the clocks, and the clock it was waited to."""
        thread = self.stores.thread(column)
        if thread >= 0:
            return f"a bulk copy of {self.name(self.first + thread)}", self.stores.read(thread)
        group = column - self.clocks.threads
        block, within = divmod(group, self.per_block)
        index, _ = self.coordinates(self.first + block * self.threads)
        name = f"a wgmma of block {_short(index, self.launch.grid)} warpgroup {within}"
        return name, self.completed[group]

    # --- Waiting

    def wait(self, wait: Wait, mask: Mask, different: bool = False) -> None:
        """Let others run until the wait of these lanes is over."""
        warps = np.unique(self.warp[mask.lanes]).size
        live = np.unique(self.warp[~self.exited]).size
        wait.scattered = warps < live or (different and warps > 1)
        self.coroutines.wait(wait)

    def stuck(self, left: list[Coroutine]) -> None:
        """Everybody waits: some perhaps for threads that have ended, or else for ever."""
        for key, meeting in list(self._meetings.items()):
            if meeting.expected is None:
                self._complete(key, meeting)
        self._cluster_complete()
        if any(not c.wait.missing for c in left):
            return
        self.scattered = {
            c.first // WARPGROUP for c in left if c.wait.scattered and c.held[0]["size"] > WARP
        }
        everybody = []
        for c in left:
            gid = self.first + c.block * self.threads + c.first + c.wait.lane
            everybody.append(f"{self.name(gid)} for {c.wait.what()}")
        first = left[0]
        self.resume(first)
        try:
            shown = "; ".join(everybody[:_SHOWN])
            if len(everybody) > _SHOWN:
                shown += f"; and {len(everybody) - _SHOWN} more"
            message = f"nobody can go on: waiting are {shown}: deadlock"
            first.wait.site.fail(self, message, first.wait.lane)
        except SimulationError as error:
            raise Deadlock(
                str(error), error.statement, error.block, error.thread, error.address
            ) from None

    # --- Barriers of a block

    def whole_warps(self, mask: Mask, site: Site, what: str) -> None:
        """An error if some lanes of a warp do not execute."""
        if mask.full:
            return
        some = mask.bits.reshape(-1, WARP).any(axis=1).repeat(WARP)
        missing = some & ~mask.bits & ~self.exited
        if missing.any():
            lane = int(np.flatnonzero(missing)[0])
            site.fail(self, f"{what} in divergent code: not reached", lane)

    def block_barrier(self, mask: Mask, site: Site) -> None:
        """`bar.sync 0`: every thread of a block waits for the others."""
        self.named_barrier(mask, 0, None, site)

    def named_barrier(self, mask: Mask, number, count, site: Site, waits: bool = True) -> None:
        """`bar.sync` or, if not `waits`, `bar.arrive` of `count` threads (None: of the block)."""
        self.whole_warps(mask, site, "barrier")
        if type(number) is int:
            parts = [(number, mask.lanes)]
        else:
            each = np.broadcast_to(number, (self.size,))[mask.lanes]
            parts = [(int(n), mask.lanes[each == n]) for n in np.unique(each)]
        block, lane = int(self.block[0]), int(mask.lanes[0])
        wait = Wait(0, lambda: self._meeting_name(keys), site, lane)
        keys = [(block, n) for n, _ in parts]
        for key, (n, lanes) in zip(keys, parts, strict=True):
            expected = None
            if count is not None:
                expected = int(np.max(mask.of(count)))
                if expected % WARP or not WARP <= expected <= self.threads:
                    site.fail(self, f"barrier {n} of {expected} threads", lane)
            if not 0 <= n < 16:
                site.fail(self, f"barrier {n}: there are 0 to 15", lane)
            meeting = self._meetings.setdefault(key, _Meeting(expected))
            if meeting.expected != expected:
                message = f"barrier {n} of {expected} threads, of {meeting.expected} for others"
                site.fail(self, message, lane)
            threads = self.number[lanes]
            meeting.came += threads.size
            if expected is not None and meeting.came > expected:
                site.fail(self, f"barrier {n} of {expected} threads: more than these come", lane)
            meeting.given = merged(meeting.given, self.clocks.release(threads))
            if waits:
                wait.missing += 1
                meeting.waiting.append((threads, wait))
            self._complete(key, meeting)
        self.wait(wait, mask, len(parts) > 1)

    def _complete(self, key: tuple[int, int], meeting: _Meeting) -> None:
        """End the barrier if all have come."""
        expected = meeting.expected
        if expected is None:
            of_block = slice(key[0] * self.threads, (key[0] + 1) * self.threads)
            expected = int((~self.gone[of_block]).sum())
        if meeting.came < expected:
            return
        del self._meetings[key]
        self.barriers += 1
        for threads, wait in meeting.waiting:
            self.clocks.acquire(threads, meeting.given)
            wait.missing -= 1

    def _meeting_name(self, keys: list[tuple[int, int]]) -> str:
        names = []
        for key in keys:
            if key in self._meetings:
                meeting = self._meetings[key]
                of = "the block" if meeting.expected is None else f"{meeting.expected} threads"
                names.append(f"barrier {key[1]} of {of}, of whom {meeting.came} came")
        return " and ".join(names)

    def warp_barrier(self, mask: Mask, site: Site) -> None:
        """`bar.warp.sync` of whole warps."""
        self.whole_warps(mask, site, "barrier of a warp")
        threads = self.number[mask.lanes]
        for warp in np.unique(threads // WARP):
            of_warp = threads[threads // WARP == warp]
            self.clocks.acquire(of_warp, self.clocks.release(of_warp))

    # --- Barriers of a cluster

    def cluster_arrive(self, mask: Mask, site: Site, release: bool) -> None:
        """`barrier.cluster.arrive`."""
        threads = self.number[mask.lanes]
        twice = self._arrivals[threads] > self._waits[threads]
        if twice.any():
            lane = int(mask.lanes[np.flatnonzero(twice)[0]])
            site.fail(self, "second barrier.cluster.arrive without a wait between", lane)
        self._arrivals[threads] += 1
        if release:
            self._gathering = merged(self._gathering, self.clocks.release(threads))
        self._cluster_complete()

    def cluster_wait(self, mask: Mask, site: Site) -> None:
        """`barrier.cluster.wait`."""
        threads, lane = self.number[mask.lanes], int(mask.lanes[0])
        early = self._arrivals[threads] == self._waits[threads]
        if early.any():
            lane = int(mask.lanes[np.flatnonzero(early)[0]])
            site.fail(self, "barrier.cluster.wait without an arrive before it", lane)
        wait = Wait(1, self._cluster_name, site, lane)
        self._cluster_waiting.append((threads, wait))
        self._cluster_wake()
        self.wait(wait, mask)

    def _cluster_name(self) -> str:
        missing = int(((self._arrivals <= self._phase) & ~self.gone).sum())
        return f"the barrier of the cluster, where {missing} threads are missing"

    def _cluster_complete(self) -> None:
        live = self._arrivals[~self.gone]
        if live.size and live.min() > self._phase:
            self._phase += 1
            self.mbarriers.publish()
            self._given, self._gathering = merged(self._gathering, self._empty()), None
            self.cluster_barriers += 1
            self._cluster_wake()

    def _empty(self) -> np.ndarray:
        return np.zeros(self.clocks.threads, np.int32)

    def _cluster_wake(self) -> None:
        waiting, self._cluster_waiting = self._cluster_waiting, []
        for threads, wait in waiting:
            if (self._waits[threads] < self._phase).all():
                self._waits[threads] += 1
                self.clocks.acquire(threads, self._given)
                wait.missing -= 1
            else:
                self._cluster_waiting.append((threads, wait))

    def reach(self, owner: np.ndarray, lanes: np.ndarray, site: Site, keep: bool = True) -> None:
        """Note that lanes touch the shared memory of other blocks of their cluster.

        keep: those blocks must not leave before they know of it.
        """
        for block in np.unique(owner[owner != self.block[lanes]]).tolist():
            part = lanes[owner == block]
            threads = self.number[part]
            of_block = slice(block * self.threads, (block + 1) * self.threads)
            heard = (self.clocks.known[threads, of_block] > 0).any(axis=1)
            unborn = ~heard & (self._waits[threads] == 0)
            if unborn.any():
                site.fail(
                    self,
                    "shared memory of another block before a cluster barrier shows that it runs:"
                    " access",
                    int(part[np.flatnonzero(unborn)[0]]),
                )
            if keep:
                self._reached[block, threads] = self.clocks.now[threads // WARP]
                self._reachers.update(dict.fromkeys(threads.tolist(), site))

    def finish(self) -> None:
        """The end of the cluster: no block may leave while another can still touch its memory."""
        for block in range(self.count):
            of_block = slice(block * self.threads, (block + 1) * self.threads)
            known = self.clocks.known[of_block, : self.clocks.threads].max(axis=0)
            early = np.flatnonzero(self._reached[block] > known)
            if early.size:
                index, _ = self.coordinates(self.first + block * self.threads)
                owner, gid = _short(index, self.launch.grid), self.first + early[0]
                self.gid = np.array([gid])
                self._reachers[int(early[0])].fail(
                    self,
                    f"block {owner} may have left the cluster, no barrier keeps it: access to its"
                    " shared memory",
                    0,
                    over=True,
                )
