"""mbarriers in shared memory: phases, arrivals and bytes of copies (PTX ISA, "mbarrier").

A phase is over when nobody is missing and no bytes are; who waited for it is then ordered after
those who arrived and after the copies. A copy's bytes count when it is issued and are there when
the phase is over: only those ordered after it may touch them anyway.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .clocks import merged
from .coroutines import Wait
from .errors import SimulationError, Site
from .intrinsics import intrinsic
from .memory import Region
from .pointers import Pointer, Space
from .ptx import ptx

NBYTES = 8
# PTX ISA, "Contents of the mbarrier object": ranges of the counts.
_MOST_THREADS, _MOST_BYTES = (1 << 20) - 1, (1 << 20) - 1


class Barrier:
    """One mbarrier."""

    def __init__(self, name: str, count: int, thread: int, clock: int, column: int):
        self.name, self.count, self.column = name, count, column
        self.thread, self.clock = thread, clock  # who initialised it, and when
        self.fenced = False  # whether copies see that
        # Whether `fence.mbarrier_init` came after, and then a barrier of the cluster, of any kind.
        self.fenced_for_cluster = self.published = False
        self.phase, self.pending, self.bytes = 0, count, 0
        self.given: np.ndarray | None = None  # what is known when the last phase is over
        self.gathering: np.ndarray | None = None
        self.waiting: list[tuple[int, np.ndarray, Wait]] = []
        self.landing: list[tuple[np.ndarray, np.ndarray]] = []
        self.copied = self.waited = 0  # the last phases with a copy, and that somebody waited for
        self.site: Site | None = None  # of the last copy, or of who expects bytes
        self.gid = 0

    def state(self) -> str:
        """What its current phase lacks."""
        lacks = f"{self.pending} of {self.count} arrivals"
        if self.bytes:
            lacks += f" and {self.bytes} bytes"
        return f"{self.name}, whose phase {self.phase} lacks {lacks}"


class Barriers:
    """The mbarriers of a cluster, by their place in the region of shared memory."""

    def __init__(self, machine: Any, space: Space, shared: Region):
        self._machine, self._space, self._shared = machine, space, shared

    def start(self) -> None:
        """Forget everything: another cluster."""
        self._at: dict[int, Barrier] = {}

    def of_column(self, column: int) -> str:
        """The name of the mbarrier with a column of the clocks."""
        return next((b.name for b in self._at.values() if b.column == column), "an mbarrier")

    def place(self, pointer: Pointer, mask, lanes: np.ndarray, space: str, site: Site):
        """Where in the region each lane's mbarrier lies."""
        address = mask.of(pointer.value(mask))
        _, at = self._space.locate(pointer, address, NBYTES, space, lanes, site)
        return np.broadcast_to(at, lanes.shape)

    def initialise(self, pointer: Pointer, at: np.ndarray, counts, lanes, site: Site) -> None:
        """`mbarrier.init`."""
        machine, log = self._machine, self._shared.log
        counts = np.broadcast_to(counts, lanes.shape)
        for place, count, lane in zip(at.tolist(), counts.tolist(), lanes.tolist(), strict=True):
            name = self._name(pointer, place)
            if place in self._at:
                site.fail(machine, f"init of the live mbarrier {name}", lane)
            if not 1 <= count <= _MOST_THREADS:
                site.fail(machine, f"mbarrier {name} of {count} arrivals", lane)
            thread = int(machine.number[lane])
            column = machine.clocks.column()
            words = np.arange(place // log.granule, (place + NBYTES) // log.granule)
            log.reserve(words, lane, column, site)
            clock = int(machine.clocks.now[thread // 32])
            self._at[place] = Barrier(f"mbarrier {name}", int(count), thread, clock, column)

    def _name(self, pointer: Pointer, place: int) -> str:
        offset = place % self._shared.nbytes
        if pointer.bounds is None:
            return f"at byte {offset}"
        index = (offset - (pointer.bounds[0] & ((1 << 24) - 1))) // NBYTES
        return f"{pointer.name}[{index}]"

    def fence(self, threads: np.ndarray, for_cluster: bool) -> None:
        """Copies see what these threads initialised, and the cluster after its next barrier."""
        for barrier in self._at.values():
            if barrier.thread in threads:
                barrier.fenced = True
                barrier.fenced_for_cluster |= for_cluster

    def publish(self) -> None:
        """The cluster has passed a barrier."""
        for barrier in self._at.values():
            barrier.published |= barrier.fenced_for_cluster

    def find(self, place: int, lanes: np.ndarray, site: Site) -> Barrier:
        """The mbarrier at a place, known to these lanes."""
        barrier = self._at.get(place)
        offset, lane = place % self._shared.nbytes, int(lanes[0])
        if barrier is None:
            site.fail(self._machine, "no mbarrier was initialised there: access", lane, offset)
        known = self._machine.clocks.known[self._machine.number[lanes], barrier.thread]
        if (known < barrier.clock).any() and not barrier.published:
            lane = int(lanes[np.flatnonzero(known < barrier.clock)[0]])
            message = f"{barrier.name}: nothing orders its initialisation before its use"
            site.fail(self._machine, message, lane)
        return barrier

    def by_place(self, at: np.ndarray, lanes: np.ndarray, site: Site):
        """Each mbarrier of these lanes, and which of them are its."""
        for place in np.unique(at).tolist():
            part = np.flatnonzero(at == place)
            yield self.find(place, lanes[part], site), part

    def arrive(self, at, counts, expected, lanes, site: Site, release: bool = True) -> None:
        """`mbarrier.arrive`, after expecting bytes."""
        counts = np.broadcast_to(counts, lanes.shape)
        expected = np.broadcast_to(expected, lanes.shape)
        for barrier, part in self.by_place(at, lanes, site):
            if int(counts[part].sum()) <= barrier.pending:
                self._arrive(barrier, lanes[part], int(counts[part].sum()),
                             int(expected[part].sum()), site, release)  # fmt: skip
                continue
            for i in part:  # the phase might end on the way
                self._arrive(barrier, lanes[i : i + 1], int(counts[i]), int(expected[i]), site,
                             release)  # fmt: skip

    def _arrive(self, barrier: Barrier, lanes, count, expected, site, release) -> None:
        machine, lane = self._machine, int(lanes[0])
        if count > barrier.pending:
            message = f"{count} arrivals at {barrier.state()}"
            site.fail(machine, message, lane)
        if expected:
            self.expect(barrier, expected, lane, site)
        if release:
            given = machine.clocks.release(machine.number[lanes])
            barrier.gathering = merged(barrier.gathering, given)
        barrier.pending -= count
        self._complete(barrier, lane, site)

    def expect(self, barrier: Barrier, nbytes: int, lane: int, site: Site) -> None:
        """`mbarrier.expect_tx`."""
        barrier.bytes += nbytes
        barrier.site, barrier.gid = site, int(self._machine.gid[lane])
        if barrier.bytes > _MOST_BYTES:
            site.fail(self._machine, f"{barrier.name}: {barrier.bytes} bytes at once", lane)

    def copy(self, barrier: Barrier, words: np.ndarray, data: np.ndarray, nbytes: int, lane: int,
             site: Site) -> None:  # fmt: skip
        """A copy of `nbytes` bytes into words of shared memory."""
        if not barrier.fenced:
            message = f"{barrier.name}: no fence shows copies that it was initialised"
            site.fail(self._machine, message, lane)
        self._shared.log.copy(words, lane, barrier.column, barrier.phase + 1, site)
        barrier.landing.append((words, data))
        barrier.copied = barrier.phase + 1
        barrier.bytes -= nbytes
        barrier.site, barrier.gid = site, int(self._machine.gid[lane])
        self._complete(barrier, lane, site)

    def _complete(self, barrier: Barrier, lane: int, site: Site) -> None:
        """End the phase if nothing is missing."""
        if barrier.pending:
            return
        if barrier.bytes < 0:
            message = f"{barrier.name}: {-barrier.bytes} bytes more than its phase expects"
            site.fail(self._machine, message, lane)
        if barrier.bytes:
            return
        for words, data in barrier.landing:
            self._shared.view(data.dtype)[words] = data
        barrier.landing.clear()
        barrier.phase += 1
        given = np.zeros(barrier.column + 1, np.int32)
        given[barrier.column] = barrier.phase
        for more in (barrier.given, barrier.gathering):
            given = given if more is None else merged(given, more)
        barrier.given, barrier.gathering = given, None
        barrier.pending = barrier.count
        waiting, barrier.waiting = barrier.waiting, []
        for parity, threads, wait in waiting:
            if parity == (barrier.phase - 1) & 1:
                self._pass(barrier, threads)
                wait.missing -= 1
            else:
                barrier.waiting.append((parity, threads, wait))

    def _pass(self, barrier: Barrier, threads: np.ndarray) -> None:
        barrier.waited = barrier.phase
        if barrier.given is not None:
            self._machine.clocks.acquire(threads, barrier.given)

    def wait(self, at: np.ndarray, parities, mask, site: Site) -> None:
        """Until the phase of this parity of each lane's mbarrier is over."""
        machine, lanes = self._machine, mask.lanes
        parities = np.broadcast_to(parities, lanes.shape)
        waited: list[tuple[Barrier, int]] = []

        def what() -> str:
            return " and ".join(f"parity {p} of {b.state()}" for b, p in waited)

        wait, different = Wait(0, what, site, int(lanes[0])), 0
        for barrier, part in self.by_place(at, lanes, site):
            for parity in np.unique(parities[part]).tolist():
                different += 1
                threads = machine.number[lanes[part[parities[part] == parity]]]
                if parity not in (0, 1):
                    site.fail(machine, f"parity {parity}: there are 0 and 1", wait.lane)
                if barrier.phase & 1 != parity:
                    self._pass(barrier, threads)
                else:
                    barrier.waiting.append((parity, threads, wait))
                    waited.append((barrier, parity))
                    wait.missing += 1
        machine.wait(wait, mask, different > 1)

    def invalidate(self, at: np.ndarray, lanes: np.ndarray, site: Site) -> None:
        """`mbarrier.inval`."""
        for place, lane in zip(at.tolist(), lanes, strict=True):
            self.find(place, np.array([lane]), site)
            del self._at[place]

    def finish(self) -> None:
        """The end of the cluster: copies were waited for, and all bytes came."""
        for barrier in self._at.values():
            if barrier.bytes or barrier.landing:
                message = f"the kernel ends while {barrier.state()}: last touched"
            elif barrier.copied > barrier.waited:
                message = f"the kernel ends, nobody waited for {barrier.name}: copy"
            else:
                continue
            self._machine.gid = np.array([barrier.gid])
            barrier.site.fail(self._machine, message, 0, over=True)


def barriers_of(program, what: Any) -> Barriers:
    """The program's mbarriers."""
    if not program.machine.roles:
        raise SimulationError(f"{what}: mbarriers without mbarrier.init are not simulated")
    return program.machine.mbarriers


def _located(program, it, space: str) -> Callable:
    barriers, pointer = barriers_of(program, it.node), program.pointer(it.one("addr"))
    site = program.site
    return lambda mask: barriers.place(pointer, mask, mask.lanes, space, site)


@ptx("mbarrier_init")
def _(program, it):
    barriers, site = barriers_of(program, it.node), program.site
    pointer, count = program.pointer(it.one("addr")), program.compile(it.one("count"))

    def code(mask):
        at = barriers.place(pointer, mask, mask.lanes, it.modifiers["space"], site)
        barriers.initialise(pointer, at, mask.of(count(mask)), mask.lanes, site)

    return code


@ptx("mbarrier_inval")
def _(program, it):
    barriers, site = barriers_of(program, it.node), program.site
    located = _located(program, it, it.modifiers["space"])
    return lambda mask: barriers.invalidate(located(mask), mask.lanes, site)


@ptx("mbarrier_arrive", "mbarrier_arrive_nocount", "mbarrier_arrive_expect_tx")
@ptx("mbarrier_arrive_state", "mbarrier_arrive_count_state", "mbarrier_arrive_expect_tx_state")
def _(program, it):
    barriers, site = barriers_of(program, it.node), program.site
    located = _located(program, it, it.modifiers["space"])
    one, none = program.constant(1), program.constant(0)
    count = program.compile(it.one("count")) if "count" in it.operands else one
    expected = program.compile(it.one("tx_count")) if "tx_count" in it.operands else none
    state = it.operands.get("state", [None])[0]
    store = None if state is None else program.target(state)
    release = it.modifiers.get("sem") != "relaxed"

    def code(mask):
        at = located(mask)
        counts, nbytes = mask.of(count(mask)), mask.of(expected(mask))
        if store is not None:  # of the state only the phase is kept
            phases = np.empty(mask.lanes.shape, np.uint64)
            for barrier, part in barriers.by_place(at, mask.lanes, site):
                phases[part] = barrier.phase
            store(mask.spread(phases), mask)
        barriers.arrive(at, counts, nbytes, mask.lanes, site, release)

    return code


@ptx("mbarrier_expect_tx")
def _(program, it):
    barriers, site = barriers_of(program, it.node), program.site
    located = _located(program, it, it.modifiers["space"])
    expected = program.compile(it.one("tx_count"))

    def code(mask):
        nbytes = np.broadcast_to(mask.of(expected(mask)), mask.lanes.shape)
        for barrier, part in barriers.by_place(located(mask), mask.lanes, site):
            lane = int(mask.lanes[part[0]])
            barriers.expect(barrier, int(nbytes[part].sum()), lane, site)

    return code


def _waits(program, node, pointer, parity, space: str, by_state=False) -> Callable:
    barriers, site = barriers_of(program, node), program.site
    pointer, parity = program.pointer(pointer), program.compile(parity)

    def code(mask):
        at = barriers.place(pointer, mask, mask.lanes, space, site)
        turn = mask.of(parity(mask))
        barriers.wait(at, turn & 1 if by_state else turn, mask, site)

    return code


@intrinsic("tirx.cuda.mbarrier_wait")
def _(program, node):
    return _waits(program, node, node.args[0], node.args[1], "")


# One that gives up for now would be tried again: here it is over when the phase is.
@ptx("mbarrier_try_wait_parity", "mbarrier_try_wait_parity_no_hint")
@ptx("mbarrier_try_wait", "mbarrier_try_wait_hint")
def _(program, it):
    by_state = "state" in it.operands
    phase = it.one("state" if by_state else "phase")
    wait = _waits(program, it.node, it.one("addr"), phase, it.modifiers["space"], by_state)
    store = program.target(it.one("wait_complete"))

    def code(mask):
        wait(mask)
        store(1, mask)

    return code
