"""Addresses as numbers: what an address operand of an instruction points to."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .errors import Site
from .machine import Machine
from .memory import SHARED, SPACING, WINDOW, Region

_OFFSET = (1 << WINDOW) - 1


class Pointer(NamedTuple):
    """An address operand: its value by mask, and the array that it was taken from if that shows."""

    value: Callable
    name: str = ""
    bounds: tuple[int, int] | None = None


class Space:
    """All memory that threads share."""

    def __init__(self, machine: Machine, arrays: list[Region], shared: Region):
        self._machine, self._arrays, self.shared = machine, arrays, shared

    def array(self, address: int) -> tuple[Region, int]:
        """The array of global memory that an address lies in, and the byte of it."""
        region = self._arrays[(address >> SPACING) - 1]
        return region, address - region.base

    def locate(
        self,
        pointer: Pointer,
        address: np.ndarray,
        nbytes: int,
        space: str,
        lanes: np.ndarray,
        site: Site,
        aligned: int | None = None,
    ) -> tuple[Region, np.ndarray]:
        """The region and the byte in it where each lane touches `nbytes` bytes, all checked.

        `space` is PTX's state space, "" for a generic address; `aligned` bytes, `nbytes` unless
        told, divide the address.
        """
        address = np.broadcast_to(np.asarray(address), lanes.shape).astype(np.int64)
        in_shared = space.startswith("shared") or (not space and bool((address >= SHARED).all()))
        base, end = pointer.bounds or (0, 0)
        wide = aligned or nbytes
        odd = address % wide != 0
        if odd.any():
            name = pointer.name or "address"
            known = f", of an array aligned to {base & -base}" if base & (wide - 1) else ""
            offset = (address & _OFFSET) - (base & _OFFSET) if in_shared else address - base
            message = f"{name}: {wide} bytes not aligned to them{known}"
            self._fail(site, lanes, odd, offset, message)
        if in_shared:
            return self._shared(pointer, address & 0xFFFFFFFF, nbytes, space, lanes, site)
        if pointer.bounds is None:
            other = address >> SPACING != address[0] >> SPACING
            if other.any():
                message = "threads that point into several arrays are not simulated"
                self._fail(site, lanes, other, address, message)
        number = (int(base or address[0]) >> SPACING) - 1
        if not 0 <= number < len(self._arrays):
            self._fail(site, lanes, address == address[0], address, "not an address of an array")
        region = self._arrays[number]
        if pointer.bounds is None:
            base, end = region.base, region.base + region.nbytes
        outside = (address < base) | (address + nbytes > end)
        if outside.any():
            message = f"{pointer.name or region.name}: {nbytes} bytes outside its {end - base}"
            self._fail(site, lanes, outside, address - base, message)
        return region, address - region.base

    def _shared(self, pointer, address, nbytes, space, lanes, site) -> tuple[Region, np.ndarray]:
        machine, shared = self._machine, self.shared
        window, offset = address >> WINDOW, address & _OFFSET
        mine = owner = machine.block[lanes]
        if window.any():
            strange = window > machine.ranks
            if strange.any():
                self._fail(site, lanes, strange, address, "not an address of shared memory")
            owner = np.where(window == 0, mine, mine // machine.ranks * machine.ranks + window - 1)
            remote = owner != mine
            if remote.any() and space in ("shared", "shared::cta"):
                message = "shared memory of another block needs shared::cluster"
                self._fail(site, lanes, remote, offset, message)
            if remote.any():
                machine.reach(owner, lanes, site)
                shared.log.local = False
        first, end = 0, shared.nbytes
        if pointer.bounds is not None:
            first, end = (bound & _OFFSET for bound in pointer.bounds)
        outside = (offset < first) | (offset + nbytes > end)
        if outside.any():
            name = pointer.name or shared.name
            message = f"{name}: {nbytes} bytes outside its {end - first}"
            self._fail(site, lanes, outside, offset - first, message)
        return shared, owner * shared.nbytes + offset

    def _fail(self, site, lanes, bad, address, message) -> None:
        at = int(np.flatnonzero(bad)[0])
        site.fail(self._machine, f"{message}:", int(lanes[at]), int(address[at]))
