"""Buffers of a program: registers of each thread, and views of memory that threads share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .banks import Banks
from .errors import SimulationError, Site
from .machine import Machine, Mask
from .memory import Region

# The widest access that the hardware makes at once, and whose alignment it asks for.
WIDEST = 16


def numpy_type(dtype: str) -> tuple[np.dtype, int]:
    """A TVM data type as NumPy's, and its vector lanes."""
    name, _, lanes = dtype.partition("x")
    if name in ("handle", ""):
        name = "int64"
    try:
        return np.dtype(name), int(lanes or 1)
    except TypeError:
        raise SimulationError(f"data type {dtype} is not simulated") from None


def scalar(value: np.ndarray):
    """A uniform value as the scalar that stands for it."""
    return value.item() if value.dtype.kind in "iub" else value[()]


def poison(dtype: np.dtype):
    """What an unwritten register of a type reads as, where that is allowed."""
    return scalar(np.full((), -1, f"i{dtype.itemsize}").view(dtype)) if dtype.kind != "b" else True


class Registers:
    """A local array: one value for each lane in each row."""

    def __init__(self, machine: Machine, name: str, dtype: np.dtype, rows: int, checked: bool):
        self.machine, self.name, self.dtype = machine, name, dtype
        self._checked, self._count = checked, rows
        self.size = rows * dtype.itemsize
        self.reset()

    def reset(self) -> None:
        """Leave every row unwritten."""
        self.rows: list[Any] = [None] * self._count
        self.flying: dict[int, np.ndarray] = {}  # rows that a wgmma is to fill
        self.lent: dict[int, int] = {}  # rows that so many of wgmma read
        self._written: list[Any] = [None] * self._count  # lanes, where some are not

    def load(self, row: int, mask: Mask, site: Site):
        """A row's value."""
        value = self.rows[row]
        if value is None or self._written[row] is not None:
            self._check(row, mask, site)
            return poison(self.dtype) if value is None else value
        return value

    def _check(self, row: int, mask: Mask, site: Site) -> None:
        if row in self.flying:
            message = f"{self.name}[{row}]: read of what a wgmma, not waited for, is to fill"
            site.fail(self.machine, message, int(mask.lanes[0]))
        if not self._checked:
            return
        written = self._written[row]
        if written is None:
            lane = int(mask.lanes[0])
        else:
            missing = np.flatnonzero(mask.bits & ~written)
            if not missing.size:
                return
            lane = int(missing[0])
        site.fail(self.machine, f"{self.name}[{row}]: read of a register never written", lane)

    def store(self, row: int, value, mask: Mask) -> None:
        """Set a row for the lanes of a mask."""
        if self.flying and row in self.flying:
            raise SimulationError(
                f"{self.name}[{row}]: written while a wgmma, not waited for, is to fill it"
            )
        if self.lent and row in self.lent:
            raise SimulationError(
                f"{self.name}[{row}]: written while a wgmma, not waited for, reads it"
            )
        if mask.full:
            self.rows[row], self._written[row] = value, None
            return
        old = self.rows[row]
        if old is None:
            old, self._written[row] = poison(self.dtype), mask.bits
        elif self._written[row] is not None:
            self._written[row] = self._written[row] | mask.bits
        merged = np.empty(self.machine.size, self.dtype)
        merged[...] = old
        np.copyto(merged, value, where=mask.bits, casting="unsafe")
        self.rows[row] = merged

    def gather(self, rows: np.ndarray, mask: Mask, site: Site) -> np.ndarray:
        """A row for each lane; `rows` has an entry for every lane."""
        out = np.zeros(rows.shape, self.dtype)
        wanted = mask.of(rows)
        for row in np.unique(wanted):
            part = mask.where((rows == row).reshape(-1, self.machine.size).any(axis=0))
            value = np.broadcast_to(self.load(int(row), part, site), self.machine.size)
            np.copyto(out, value, where=rows == row)
        return out

    def fly(self, row: int, value: np.ndarray) -> None:
        """A wgmma is to fill a row in every lane; what it held is gone."""
        self.flying[row], self.rows[row], self._written[row] = value, None, None

    def land(self, row: int) -> None:
        """The wgmma has."""
        self.rows[row] = self.flying.pop(row)

    def lend(self, row: int) -> None:
        """A wgmma reads a row from now on."""
        self.lent[row] = self.lent.get(row, 0) + 1

    def take_back(self, row: int) -> None:
        """A wgmma has read it."""
        self.lent[row] -= 1
        if not self.lent[row]:
            del self.lent[row]

    def scatter(self, rows: np.ndarray, value, mask: Mask) -> None:
        """Set a row for each lane."""
        for row in np.unique(mask.of(rows)):
            self.store(int(row), value, mask.where(rows == row))


class Array:
    """A buffer: a shape over registers or over a region, at `offset` elements from its start."""

    def __init__(
        self,
        machine: Machine,
        name: str,
        dtype: str,
        shape: Sequence[int],
        storage: Registers | Region,
        offset: int,
        strides: Sequence[int] = (),
    ):
        self.machine, self.name = machine, name
        self.dtype, self.vector = numpy_type(dtype)
        self.shape, self.storage, self.offset = tuple(shape), storage, offset
        compact = [1]
        for extent in self.shape[:0:-1]:
            compact.insert(0, compact[0] * extent)
        self.strides = tuple(strides) or tuple(compact)
        # With strides, the elements from the first to the last.
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        self.count = (reach + 1) * self.vector if all(self.shape) else 0
        self.registers = isinstance(storage, Registers)
        self.banks: Banks | None = None

    def element(self, indices: list, mask: Mask, site: Site):
        """Element numbers from the array's start for the mask's lanes, every index in bounds."""
        total = 0
        for axis, (index, extent, stride) in enumerate(
            zip(indices, self.shape, self.strides, strict=True)
        ):
            if type(index) is int:
                if not 0 <= index < extent:
                    self._outside(index, axis, int(mask.lanes[0]), site)
            else:
                index = mask.of(index).astype(np.int64)
                if index.min() < 0 or index.max() >= extent:
                    at = int(np.flatnonzero((index < 0) | (index >= extent))[0])
                    column = at % index.shape[-1]
                    self._outside(int(index.ravel()[at]), axis, int(mask.lanes[column]), site)
            total = total + index * stride
        if self.vector > 1:
            total = np.arange(self.vector)[:, None] + total * self.vector
        return total

    def _outside(self, index: int, axis: int, lane: int, site: Site) -> None:
        of = f" of axis {axis}" if len(self.shape) > 1 else ""
        message = f"{self.name}: index {index}{of} outside [0, {self.shape[axis]}): access"
        site.fail(self.machine, message, lane)

    def load(self, indices: list, mask: Mask, site: Site):
        """The elements as a value: a scalar, or an array with a column for every lane."""
        storage = self.storage
        if self.registers:
            return self._load_registers(indices, mask, site)
        element = self.element(indices, mask, site)
        if type(element) is int and storage.log is None:
            return scalar(storage.view(self.dtype)[element + self.offset])
        index = self._absolute(element, mask, site)
        return mask.spread(storage.read(self.dtype, index, mask.lanes, site))

    def store(self, indices: list, value, mask: Mask, site: Site) -> None:
        """Set the elements from a value."""
        if self.registers:
            self._store_registers(indices, value, mask, site)
            return
        index = self._absolute(self.element(indices, mask, site), mask, site)
        self.storage.write(self.dtype, index, mask.of(value), mask.lanes, site)

    def _absolute(self, element, mask: Mask, site: Site) -> np.ndarray:
        """Indices into the storage's view, a column for each lane of the mask."""
        lanes, storage, size = mask.lanes, self.storage, self.dtype.itemsize
        element = element + self.offset
        if type(element) is int:
            element = np.full(lanes.size, element)
        elif element.shape[-1] != lanes.size:
            element = np.broadcast_to(element, (element.shape[0], lanes.size))
        first, nbytes = element, size
        if element.ndim == 2:
            first = element[0]
            n = len(element)
            if n > 1 and (element[1:] == element[:-1] + 1).all():
                nbytes = n * size
                self.check_alignment(first, nbytes, lanes, site)
        if storage.shared:
            if self.banks is not None:
                self.banks.count(first * size, nbytes, lanes, site)
            element = element + self.machine.block[lanes] * (storage.nbytes // size)
        return element

    def check_alignment(self, first: np.ndarray, nbytes: int, lanes: np.ndarray, site: Site):
        """That a vector of `nbytes` starts at a multiple of its size."""
        wide = min(nbytes, WIDEST)
        odd = (self.storage.base + first * self.dtype.itemsize) % wide != 0
        if odd.any():
            at = int(np.flatnonzero(odd)[0])
            address = int(first[at]) * self.dtype.itemsize
            message = f"{self.name}: access of {wide} bytes not aligned to them:"
            site.fail(self.machine, message, int(lanes[at]), address)

    def _load_registers(self, indices: list, mask: Mask, site: Site):
        row = self.element(indices, mask, site)
        if type(row) is int:
            return self.storage.load(row + self.offset, mask, site)
        size = self.machine.size
        if row.ndim == 2 and row.shape[-1] == 1:  # the same rows in every lane: a vector of them
            rows = [self.storage.load(int(r) + self.offset, mask, site) for r in row[:, 0]]
            out = np.empty((len(rows), size), self.dtype)
            for at, value in enumerate(rows):
                out[at] = value
            return out
        return self.storage.gather(mask.spread(row) + self.offset, mask, site)

    def _store_registers(self, indices: list, value, mask: Mask, site: Site) -> None:
        row = self.element(indices, mask, site)
        if type(row) is int:
            self.storage.store(row + self.offset, value, mask)
            return
        if row.ndim == 1:
            self.storage.scatter(mask.spread(row) + self.offset, value, mask)
            return
        for at, rows in enumerate(row):
            part = value
            if type(value) is np.ndarray and value.ndim == 2:
                part = value[at]
                if part.size == 1:
                    part = scalar(part[0])
            if rows.size == 1:
                self.storage.store(int(rows[0]) + self.offset, part, mask)
            else:
                self.storage.scatter(mask.spread(rows) + self.offset, part, mask)

    def address(self, indices: list):
        """The address of an element in every lane; not checked, nothing is touched."""
        if self.registers:
            raise SimulationError(f"{self.name}: the address of a register is not simulated")
        total = 0
        for index, stride in zip(indices, self.strides, strict=True):
            wide = index if type(index) is int else index.astype(np.int64)
            total = total + wide * stride
        return (total * self.vector + self.offset) * self.dtype.itemsize + self.storage.base

    @property
    def bounds(self) -> tuple[int, int]:
        """Addresses of the first byte and of the first byte after."""
        first = self.storage.base + self.offset * self.dtype.itemsize
        return first, first + self.count * self.dtype.itemsize
