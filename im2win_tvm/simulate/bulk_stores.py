"""Bulk copies out of shared memory, which their thread waits for by groups: `.bulk_group`.

What a copy brings is in global memory at once, for only those ordered after its thread's wait may
touch it; what it reads must not change before.
"""

from typing import Any

import numpy as np

from .bulk_copies import TENSOR_ALIGNMENT, words_of
from .errors import SimulationError, Site
from .memory import Region
from .ptx import _unless, ptx
from .tensor_maps import CHUNK, map_of


class _Issuer:
    """The copies of one thread. Its columns of the clocks: of their reads, and of their writes."""

    def __init__(self, reads: int, writes: int):
        self.reads, self.writes = reads, writes
        self.committed = self.read = 0  # groups, and those whose sources were read for sure
        self.last = 0  # the group of the last copy
        self.site: Site | None = None


class Stores:
    """The copies of a cluster, by thread."""

    def __init__(self, machine: Any, shared: Region):
        self._machine, self._shared = machine, shared
        self.start()

    def start(self) -> None:
        """Forget everything: another cluster."""
        self._issuers: dict[int, _Issuer] = {}
        self._threads: dict[int, int] = {}

    def thread(self, column: int) -> int:
        """The thread that a column of the clocks belongs to, itself or its copies; or -1."""
        own = column if column < self._machine.clocks.threads else -1
        return self._threads.get(column, own)

    def read(self, thread: int) -> int:
        """How many groups of a thread have read their sources for sure."""
        return self._issuers[thread].read

    def _of(self, thread: int) -> _Issuer:
        if thread not in self._issuers:
            columns = [self._machine.clocks.column() for _ in range(2)]
            self._issuers[thread] = _Issuer(*columns)
            self._threads.update(dict.fromkeys(columns, thread))
        return self._issuers[thread]

    def source(self, place: int, nbytes: int, span: int, lane: int, site: Site) -> np.ndarray:
        """The bytes that a copy reads, from a byte of the region on."""
        issuer, shared = self._of(int(self._machine.number[lane])), self._shared
        owner, offset = divmod(place, shared.nbytes)
        granule = shared.log.granule
        words = words_of(offset, nbytes, granule, span) + owner * shared.nbytes // granule
        clock, one = issuer.committed + 1, np.array([lane])
        shared.log.read_later(words, one, issuer.reads, clock, site, "a bulk copy")
        issuer.last, issuer.site = clock, site
        return shared.view(np.dtype(f"u{granule}"))[words]

    def put(self, region: Region, index: np.ndarray, data: np.ndarray, lane: int, site: Site):
        """Set elements of an array."""
        issuer = self._of(int(self._machine.number[lane]))
        if region.log is not None and index.size:
            words = region.log.words(index[:, None], data.dtype.itemsize)
            region.log.copy(words, lane, issuer.writes, issuer.committed + 1, site)
        region.view(data.dtype)[index] = data

    def commit(self, mask) -> None:
        """`cp.async.bulk.commit_group`."""
        for thread in self._machine.number[mask.lanes].tolist():
            self._of(thread).committed += 1

    def wait(self, mask, recent: int, read: bool) -> None:
        """`cp.async.bulk.wait_group`; `read`: only until the sources were read."""
        for thread in self._machine.number[mask.lanes].tolist():
            issuer = self._of(thread)  # which may add columns
            known = self._machine.clocks.known
            over = max(0, issuer.committed - recent)
            for column in (issuer.reads,) if read else (issuer.reads, issuer.writes):
                known[thread, column] = max(known[thread, column], over)
            issuer.read = max(issuer.read, over)

    def finish(self) -> None:
        """The end of the cluster: shared memory must be there until it was read."""
        for thread, issuer in self._issuers.items():
            if issuer.last > issuer.read:
                self._machine.gid = np.array([self._machine.first + thread])
                message = "the kernel ends, its thread did not wait until this was read: copy"
                issuer.site.fail(self._machine, message, 0, over=True)


def _stores(program, it) -> Stores:
    if not program.machine.roles:
        raise SimulationError(f"{it.node} is not simulated")
    return program.machine.stores


def _places(program, pointer, mask, nbytes: int, aligned: int, space: str, site: Site):
    address = mask.of(pointer.value(mask))
    region, at = program.space.locate(
        pointer, address, nbytes, space, mask.lanes, site, aligned=aligned
    )
    return region, np.broadcast_to(at, mask.lanes.shape).tolist()


@ptx("cp_async_bulk_tensor_s2g")
def _(program, it):
    stores, site, source = _stores(program, it), program.site, program.pointer(it.one("src_mem"))
    tensor = map_of(program, it.one("tmap"))
    corner = [program.compile(c) for c in it.operands["coords"]]
    tiled = it.modifiers.get("load_mode") in ("", "tile", None)
    _unless(tiled and len(corner) == len(tensor.sizes) and set(tensor.steps) == {1}, it)
    nbytes = int(np.prod(tensor.taken)) * tensor.dtype.itemsize

    def code(mask):
        _, places = _places(program, source, mask, nbytes, TENSOR_ALIGNMENT, "shared", site)
        corners = [np.broadcast_to(mask.of(c(mask)), mask.lanes.shape) for c in corner]
        for i, (place, lane) in enumerate(zip(places, mask.lanes.tolist(), strict=True)):
            data = stores.source(place, nbytes, tensor.span, lane, site).view(tensor.dtype)
            index, inside = tensor.elements([int(c[i]) for c in corners])
            stores.put(tensor.region, index[inside], data[inside], lane, site)
            program.copies.bytes += nbytes

    return code


@ptx("cp_async_bulk_s2g")
def _(program, it):
    stores, site, source = _stores(program, it), program.site, program.pointer(it.one("src_mem"))
    target, size = program.pointer(it.one("dst_mem")), program.compile(it.one("size"))
    _unless(not it.modifiers.get("cp_mask"), it)

    def code(mask):
        sizes = np.broadcast_to(mask.of(size(mask)), mask.lanes.shape)
        nbytes = int(sizes[0])
        if nbytes % CHUNK or nbytes <= 0 or (sizes != nbytes).any():
            message = f"a bulk copy of {sizes.tolist()} bytes"
            site.fail(program.machine, message, int(mask.lanes[0]))
        _, places = _places(program, source, mask, nbytes, CHUNK, "shared", site)
        region, targets = _places(program, target, mask, nbytes, CHUNK, "global", site)
        for place, at, lane in zip(places, targets, mask.lanes.tolist(), strict=True):
            data = stores.source(place, nbytes, 0, lane, site)
            index = at // data.dtype.itemsize + np.arange(data.size)
            stores.put(region, index, data, lane, site)
            program.copies.bytes += nbytes

    return code


@ptx("cp_async_bulk_commit_group")
def _(program, it):
    return _stores(program, it).commit


@ptx("cp_async_bulk_wait_group")
def _(program, it):
    stores, recent = _stores(program, it), program.compile(it.one("group"))
    read = bool(it.modifiers.get("read"))
    return lambda mask: stores.wait(mask, int(recent(mask)), read)
