"""Bulk copies into shared memory, counted by mbarriers: `cp.async.bulk` and its tensor form."""

from math import prod

import numpy as np

from .mbarriers import barriers_of
from .ptx import Instruction, _unless, ptx
from .tensor_maps import CHUNK, as_tf32, map_of, swizzled

# PTX ISA, "cp.async.bulk.tensor": alignment of the destination.
TENSOR_ALIGNMENT = 128


def words_of(offset: int, nbytes: int, granule: int, span: int) -> np.ndarray:
    """The words of a block's shared memory that bytes from an offset on go to, swizzled."""
    chunks = swizzled(offset // CHUNK + np.arange(nbytes // CHUNK), span)
    return (chunks[:, None] * (CHUNK // granule) + np.arange(CHUNK // granule)).ravel()


class _Destination:
    """Where a bulk copy's bytes go, and the mbarrier that counts them."""

    def __init__(self, program, it: Instruction):
        self._program, self._site = program, program.site
        self._barriers = barriers_of(program, it.node)
        self._space = it.modifiers["dst"]
        self._target = program.pointer(it.one("dst_mem"))
        self._barrier = program.pointer(it.one("mbar"))
        masked = bool(it.operands.get("cta_mask"))
        self._ranks = program.compile(it.one("cta_mask")) if masked else None

    def put(self, mask, nbytes: int, alignment: int, span: int, datas: list[np.ndarray]) -> None:
        """Copy each lane's data."""
        program, site, lanes = self._program, self._site, mask.lanes
        machine, shared, space = program.machine, program.shared, self._space
        address = mask.of(self._target.value(mask))
        _, first = program.space.locate(
            self._target, address, nbytes, space, lanes, site, aligned=alignment
        )
        at = self._barriers.place(self._barrier, mask, lanes, space, site)
        everybody = self._ranks(mask) if self._ranks is not None else None
        granule = shared.log.granule
        for i, (lane, data) in enumerate(zip(lanes.tolist(), datas, strict=True)):
            owner, offset = divmod(int(first[i]), shared.nbytes)
            counter, counter_offset = divmod(int(at[i]), shared.nbytes)
            if owner != counter:
                site.fail(machine, "a copy into one block, counted by an mbarrier of another", lane)
            words = words_of(offset, nbytes, granule, span)
            blocks = [owner]
            if everybody is not None:
                bits = int(np.broadcast_to(everybody, (machine.size,))[lane])
                blocks = [n for n in range(16) if bits >> n & 1]
                if not blocks or blocks[-1] >= machine.ranks:
                    site.fail(machine, f"a copy to blocks {blocks} of {machine.ranks}", lane)
            for block in blocks:
                one = np.array([lane])
                machine.reach(np.array([block]), one, site, keep=False)
                place = block * shared.nbytes + counter_offset
                barrier = self._barriers.find(place, one, site)
                held = np.ascontiguousarray(data).view(f"u{granule}")
                within = words + block * shared.nbytes // granule
                self._barriers.copy(barrier, within, held, nbytes, lane, site)
            program.copies.bytes += nbytes


@ptx("cp_async_bulk_g2s_cluster", "cp_async_bulk_g2s_cta")
def _(program, it):
    into, source = _Destination(program, it), program.pointer(it.one("src_mem"))
    size, site, machine = program.compile(it.one("size")), program.site, program.machine
    _unless(not it.modifiers.get("ignore_oob"), it)

    def code(mask):
        sizes = np.broadcast_to(size(mask), (machine.size,))
        for nbytes in np.unique(sizes[mask.lanes]):
            copy(mask.where(sizes == nbytes), int(nbytes))

    def copy(mask, nbytes):
        lanes = mask.lanes
        if nbytes % CHUNK or nbytes <= 0:
            site.fail(machine, f"a bulk copy of {nbytes} bytes", int(lanes[0]))
        address = mask.of(source.value(mask))
        region, start = program.space.locate(
            source, address, nbytes, "global", lanes, site, aligned=CHUNK
        )
        index = start + np.arange(nbytes)[:, None]
        data = region.read(np.dtype("u1"), index, lanes, site)
        into.put(mask, nbytes, CHUNK, 0, list(data.T))

    return code


@ptx("cp_async_bulk_tensor_g2s_cluster", "cp_async_bulk_tensor_g2s_cta")
def _(program, it):
    into, tensor = _Destination(program, it), map_of(program, it.one("tmap"))
    corner, site = [program.compile(c) for c in it.operands["coords"]], program.site
    tiled = it.modifiers.get("load_mode") in ("", "tile", None)
    _unless(tiled and not it.modifiers.get("cta_group") and len(corner) == len(tensor.sizes), it)
    nbytes = prod(tensor.taken) * tensor.dtype.itemsize

    def code(mask):
        corners = [np.broadcast_to(mask.of(c(mask)), mask.lanes.shape) for c in corner]
        datas = []
        for i, lane in enumerate(mask.lanes):
            index, inside = tensor.elements([int(c[i]) for c in corners])
            if tensor.region.log is not None and inside.any():
                there, one = index[inside][:, None], np.array([lane])
                tensor.region.log.read(there, tensor.dtype.itemsize, one, site)
            values = tensor.region.view(tensor.dtype)[index]
            values = np.where(inside, values, tensor.dtype.type(0))
            datas.append(as_tf32(values) if tensor.rounds else values)
        into.put(mask, nbytes, TENSOR_ALIGNMENT, tensor.span, datas)

    return code
