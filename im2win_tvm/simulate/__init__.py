"""Run a TIRx CUDA kernel on the CPU as the GPU would, and stop at what would go wrong there.

All threads of a group of blocks run in lock step, one statement after another, as NumPy arrays. A
kernel with mbarriers, or with barriers of some warps, runs cluster by cluster: each warpgroup in
lock step, taking turns where they wait; warps of one that wait for each other run apart too.
Checked on the way:

* every access: bounds of the array, alignment of vectors and copies to their size, words of shared
  memory and registers that nothing was written to;
* order: two threads on one word of shared memory, or of an array that the kernel writes, one of
  them writing, with no barrier between; two lanes of one statement that write one word;
* `cp.async`: its bytes arrive when the issuing thread waits for their group, and no sooner; nothing
  may touch them before;
* bulk copies, of tensors by a map too: what the driver checks of a map; alignment; the words of
  shared memory that they fill belong to those who waited for their mbarrier; they may not fill what
  somebody, or a wgmma, not ordered before them still reads; copies that nobody waits for; out of
  shared memory, that what they read stays, and what they write is left alone, until waited for;
* mbarriers: initialised, known to whoever uses them, and fenced for copies; no more arrivals or
  bytes than they expect, and no fewer at the end; a state where nobody can go on says who waits for
  what;
* wgmma: its operands unchanged and its sums untouched until it was waited for; with mbarriers also
  that a proxy fence shows it what threads wrote;
* barriers: reached by all threads of the block or of none, named ones by as many as they say;
* clusters: no access of another block's shared memory before a cluster barrier shows that it runs,
  nor one that its end might precede.

Not simulated:

* time, caches, and the order of warps. Without mbarriers a race is an error in any order; with them
  it is one in the order that ran, where vector clocks tell what waiting has ordered;
* threads that wait for each other in different branches, without mbarriers: a barrier there must be
  where all come; with them, lanes of one warp, and warps of a warpgroup that has wgmma;
* fences by themselves: only barriers order accesses. With mbarriers `fence.proxy.async` and
  `fence.mbarrier_init` show copies and wgmma what was written, others do nothing;
* bulk copies that reduce, gather or scatter; `cp.async` beside mbarriers.

Both operands of `T.Select` are evaluated in every lane, those of `T.if_then_else`, `and` and `or`
are not. What an intrinsic means is in the tables of `intrinsics` and `ptx`, to which `matrices`,
`wgmma`, `reductions`, `mbarriers`, `bulk_copies`, `bulk_stores` and `tensor_maps` add; any other is
refused by name.
"""

from typing import NamedTuple

import numpy as np
from tvm import tirx

from .banks import Conflicts
from .errors import SimulationError
from .program import Program

# Threads that run together: enough to make NumPy's cost per call small.
_LANES = 8192


class Report(NamedTuple):
    """What a run did. Barriers and copied bytes are summed over the groups of blocks that ran.

    conflicts: by statement, wavefronts of shared memory and how many more they are than without
    bank conflicts; empty unless asked for.
    """

    barriers: int
    cluster_barriers: int
    copied_bytes: int
    conflicts: dict[str, Conflicts]


def run(
    function: tirx.PrimFunc,
    arrays: dict[str, np.ndarray],
    *,
    uninitialised: bool = False,
    conflicts: bool = False,
    lanes: int = _LANES,
) -> Report:
    """Run a TIRx function, as parsed, on arrays by parameter name, in place.

    The arrays are contiguous and have the sizes and types of the parameters. `uninitialised` lets
    the kernel read shared memory and registers that it never wrote: as NaN. `lanes` threads run
    together. Raises SimulationError at the first fault, or for what is not simulated.
    """
    try:
        with np.errstate(all="ignore"):  # lanes that do not execute compute nonsense
            program = Program(function, arrays, not uninitialised, conflicts)
            program.run(lanes)
    except SimulationError as error:
        raise error.with_traceback(None) from None  # the message says where; our frames do not
    machine, banks = program.machine, program.banks
    return Report(
        machine.barriers,
        machine.cluster_barriers,
        program.copies.bytes,
        {} if banks is None else banks.by_statement,
    )


__all__ = ["Conflicts", "Report", "SimulationError", "run"]
