"""A thread's outputs and the rows of input that pass by them: the inner part of `cuda_depthwise`.

An input is brought into registers once, as float32, and counts in every window of the thread's
outputs that holds it: kw * kh / (sh * sw) times, but at the edges of the thread's tile.
"""

# Bodies of inline functions are parsed as TIRx: their names are variables of the kernel.

from tvm.script import tirx as T

from .cuda_depthwise_tiles import Geometry


@T.meta_class
class Sums:
    """Sums [row, column, channel] of a thread, and the row of input that is being added to them."""

    def __init__(self, geometry: Geometry, packed, tap_stride: int):
        """packed: the filter, a tap's `vector` channels side by side, taps `tap_stride` apart."""
        g = self.geometry = geometry
        self.rows, self.columns, self.vector = g.config.rows, g.config.columns, g.config.vector
        self.resident, self.packed, self.tap_stride = g.config.resident, packed, tap_stride
        # Channels of x that a thread reads at a time: its outputs', or one of their group.
        self.channels = self.vector if g.depthwise else 1
        self.total = T.alloc_local((g.sums,), "float32")
        self.line = T.alloc_local((g.w.reads * self.channels,), "float32")
        self.tap = T.alloc_local(((g.taps if self.resident else 1) * self.vector,), "float32")

    def at(self, row, column, e):
        """Of a sum in `total`."""
        return (row * self.columns + column) * self.vector + e

    @T.inline
    def clear(self):
        for i in T.unroll(self.geometry.sums):
            self.total[i] = T.float32(0)

    @T.inline
    def load_tap(self, into, tap, at):
        for e in T.vectorized(self.vector):
            self.tap[into * self.vector + e] = self.packed[
                (tap * (self.tap_stride // self.vector) + at) * self.vector + e]

    @T.inline
    def load_filter(self, at):
        """All taps of one input channel into registers; `at`: of the first one, in vectors."""
        if self.resident:
            for tap in T.unroll(self.geometry.taps):
                self.load_tap(tap, tap, at)

    @T.inline
    def add_tap(self, row, tap, v):
        for column in T.unroll(self.columns):
            for e in T.unroll(self.vector):
                self.total[self.at(row, column, e)] = self.total[self.at(row, column, e)] + (
                    self.line[(column * self.geometry.w.stride + v) * self.channels
                              + (e if self.channels > 1 else 0)]
                    * self.tap[tap * self.vector + e])

    @T.inline
    def add_line(self, r, at):
        """`line` is row r of what the thread reads; `at`: of the filter's first tap, in vectors."""
        for row in T.unroll(self.rows):
            u = T.meta_var(r - row * self.geometry.h.stride)
            if T.And(u >= 0, u < self.geometry.h.taps):
                for v in T.unroll(self.geometry.w.taps):
                    if self.resident:
                        self.add_tap(row, u * self.geometry.w.taps + v, v)
                    else:
                        self.load_tap(0, u * self.geometry.w.taps + v, at)
                        self.add_tap(row, 0, v)
