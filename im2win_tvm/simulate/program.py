"""A TIRx function on a machine, its parameters bound to arrays."""

import numpy as np
from tvm import tirx

from . import matrices, ptx
from .banks import Banks
from .copies import Copies
from .launch import launch
from .layout import array_of, calls, log_parameters, parameters, place_shared
from .machine import Machine
from .pointers import Space
from .statements import Statements

assert matrices and ptx  # imported for their entries in the table of intrinsics

_LEAVING = ("tirx.break_loop", "tirx.continue_loop", "tirx.thread_return")
_WARP_BARRIERS = ("tirx.cuda.warp_sync", "tirx.ptx.bar_warp_sync")


class Program(Statements):
    """The compiled function.

    checked: reading what was never written is an error. banks: count bank conflicts.
    """

    def __init__(
        self, function: tirx.PrimFunc, arrays: dict[str, np.ndarray], checked: bool, banks: bool
    ):
        super().__init__()
        self.checked = checked
        self.leaving = bool(calls(function.body, _LEAVING))
        self.machine = Machine(launch(function))
        self.machine.warp_ordered = bool(calls(function.body, _WARP_BARRIERS))
        self.banks = Banks(self.machine) if banks else None
        regions = parameters(function, arrays)
        log_parameters(function, regions, self.machine)
        self.shared, self.arrays = place_shared(function, self.machine, checked)
        for p, region in zip(function.params, regions, strict=True):
            self.arrays[p.__chandle__()] = array_of(self.machine, p, region, 0)
        for array in self.arrays.values():
            array.banks = self.banks
        self.space = Space(self.machine, regions, self.shared)
        self.copies = Copies(self.machine, self.shared)
        self.wgmma = matrices.Pending(self.machine, self.shared)
        self._body = self.statement(function.body)

    def run(self, lanes: int) -> None:
        """Run all blocks, about `lanes` threads at a time, whole clusters."""
        machine = self.machine
        step = max(1, lanes // (machine.threads * machine.ranks)) * machine.ranks
        for first in range(0, machine.launch.blocks, step):
            count = min(step, machine.launch.blocks - first)
            machine.start(first, count)
            nbytes = count * self.shared.nbytes
            self.shared.fill(np.full(nbytes, 0xFF, "u1"))
            self.shared.log.clear(nbytes // self.shared.log.granule)
            self.copies.start()
            values = machine.launch.values(first + machine.block, machine.thread)
            for variable, value in values:
                same = (value == value[0]).all()
                self.env[self.slot(variable)] = int(value[0]) if same else value
            self._body(machine.everyone)
            machine.finish()
