"""Warpgroups of `cuda_thin` begin their tiles' products one after the other.

Side by side they would share the tensor cores, be done with their tiles together, and then store
them together while the tensor cores wait. In turns some store while others multiply.
"""

# Bodies of inline functions are parsed as TIRx.

from tvm.script import tirx as T

from .hopper import WARPGROUP


@T.meta_class
class InTurn:
    """Named barriers, one for each of `count` warpgroups, behind the first `count` of the block.

    That of a warpgroup ends when it waits there and the one before it has passed the turn on.
    """

    def __init__(self, count: int, warpgroup):
        self.count, self.warpgroup = count, warpgroup
        self.threads = 2 * WARPGROUP

    def barrier(self, warpgroup):
        return T.Cast("uint32", warpgroup % self.count + self.count + 1)

    @T.inline
    def wait(self):
        """Until the turn is passed to this warpgroup."""
        T.ptx.bar.sync(self.barrier(self.warpgroup), T.uint32(self.threads))

    @T.inline
    def pass_on(self):
        """The next warpgroup may begin."""
        T.ptx.bar.arrive(self.barrier(self.warpgroup + 1), T.uint32(self.threads))
