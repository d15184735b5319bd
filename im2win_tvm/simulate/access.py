"""What instructions do with memory: addresses, loads, stores, and registers they write."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import ir, tirx

from .expressions import Expressions
from .pointers import Pointer
from .values import Code


class Accesses(Expressions):
    """Compiles the memory operands of instructions."""

    def target(self, node: Any) -> Callable:
        """The register or element that an instruction writes: a function of value and mask."""
        array, site = self.array(node.source), self.site
        indices = [self.compile(index) for index in node.indices]
        return lambda value, mask: array.store(
            [index(mask) for index in indices], value, mask, site
        )

    def pointer(self, node: Any) -> Pointer:
        """The address that an expression is, with the array that it points into if that shows."""
        name = node.op.name if isinstance(node, ir.Call) and isinstance(node.op, ir.Op) else ""
        if name == "tirx.address_of":
            (load,) = node.args
            array = self.array(load.source)
            indices = [self.compile(index) for index in load.indices]
            return Pointer(
                lambda mask: array.address([index(mask) for index in indices]),
                array.name,
                array.bounds,
            )
        if name == "tirx.buffer_data":
            array = self.array(node.args[0])
            first = array.bounds[0]
            return Pointer(lambda mask: first, array.name, array.bounds)
        if name == "tirx.cuda.cvta_generic_to_shared":
            inner = self.pointer(node.args[0])
            return inner._replace(value=lambda mask: inner.value(mask) & 0xFFFFFFFF)
        if name == "tirx.ptx.addr":
            inner, offset = self.pointer(node.args[0]), self.compile(node.args[1])
            return inner._replace(value=lambda mask: inner.value(mask) + offset(mask))
        if name == "tirx.reinterpret":
            return self.pointer(node.args[0])
        if isinstance(node, ir.Var):
            known = self.pointers.get(node.__chandle__())
            return known or Pointer(self.compile(node))
        if isinstance(node, tirx.Add):
            # An offset from an address leads into the same array.
            for side in (node.a, node.b):
                inner = self.pointer(side)
                if inner.bounds is not None:
                    return inner._replace(value=self.compile(node))
        return Pointer(self.compile(node))

    def _reach(self, pointer: Pointer, nbytes: int, space: str, itemsize: int) -> Callable:
        """A function of the mask: the region, and element numbers, a row for each element."""
        memory, site, machine, banks = self.space, self.site, self.machine, self.banks
        rows = np.arange(nbytes // itemsize)[:, None]

        def code(mask):
            lanes = mask.lanes
            address = mask.of(pointer.value(mask))
            region, first = memory.locate(pointer, address, nbytes, space, lanes, site)
            if banks is not None and region.shared:
                block, offset = np.divmod(first, region.nbytes)
                if (block == machine.block[lanes]).all():
                    banks.count(offset, nbytes, lanes, site)
            return region, first // itemsize + rows

        return code

    def loader(self, pointer: Pointer, dtype: np.dtype, count: int, space: str) -> Callable:
        """A function of the mask that loads `count` elements: an array with a row for each."""
        reach, site = self._reach(pointer, count * dtype.itemsize, space, dtype.itemsize), self.site

        def code(mask):
            region, index = reach(mask)
            return mask.spread(region.read(dtype, index, mask.lanes, site))

        return code

    def storer(self, pointer: Pointer, dtype: np.dtype, count: int, space: str) -> Callable:
        """A function of values and mask that stores `count` elements."""
        reach, site = self._reach(pointer, count * dtype.itemsize, space, dtype.itemsize), self.site

        def code(values, mask):
            region, index = reach(mask)
            data = np.empty(index.shape, dtype)
            for row, value in zip(data, values, strict=True):
                row[...] = mask.of(value)
            region.write(dtype, index, data, mask.lanes, site)

        return code

    def adder(self, pointer: Pointer, value: Code, dtype: np.dtype, space: str) -> Callable:
        """A function of the mask that adds atomically and returns what was there before."""
        reach, site = self._reach(pointer, dtype.itemsize, space, dtype.itemsize), self.site

        def code(mask):
            region, index = reach(mask)
            amount = np.broadcast_to(mask.of(value(mask)), mask.lanes.shape)
            return mask.spread(region.add(dtype, index[0], amount, mask.lanes, site))

        return code
