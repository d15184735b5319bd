"""What the lanes of a warp make of their values together: `redux.sync`."""

import numpy as np

from .launch import WARP
from .matrices import whole_warps
from .ptx import _unless, ptx
from .values import dtype_of


@ptx("redux_sync")
def _(program, it):
    """The largest, of all lanes."""
    _unless(it.modifiers["op"] == "max", it)
    value, store = program.compile(it.one("a")), program.target(it.one("d"))
    machine, site, dtype = program.machine, program.site, dtype_of(it.one("d"))

    def code(mask):
        warps = whole_warps(machine, mask, site)
        each = np.broadcast_to(np.asarray(value(mask)), (machine.size,)).reshape(-1, WARP)
        result = np.zeros((machine.size,), dtype)
        result.reshape(-1, WARP)[warps] = each[warps].max(axis=1, keepdims=True)
        store(result, mask)

    return code
