"""A TIRx function on a machine, its parameters bound to arrays."""

import numpy as np
from tvm import tirx

from . import bulk_copies, bulk_stores, matrices, ptx, reductions, tensor_maps, wgmma
from .banks import Banks
from .copies import Copies
from .launch import launch
from .layout import array_of, calls, log_parameters, parameters, place_shared
from .machine import Machine
from .mbarriers import Barriers
from .pointers import Space
from .roles import Deadlock, Roles
from .statements import Statements

# Imported for their entries in the table of intrinsics.
assert bulk_copies and bulk_stores and matrices and ptx and reductions and tensor_maps

_LEAVING = ("tirx.break_loop", "tirx.continue_loop", "tirx.thread_return")
# What has warps wait for each other in different branches: mbarriers, barriers of some warps.
_ROLES = (
    "tirx.ptx.mbarrier", "tirx.cuda.mbarrier", "tirx.ptx.cp_async_bulk", "tirx.ptx.bar_sync_count",
    "tirx.ptx.barrier_sync_count", "tirx.ptx.bar_arrive", "tirx.ptx.barrier_arrive",
)  # fmt: skip
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
        roles = bool(calls(function.body, _ROLES))
        self.machine = (Roles if roles else Machine)(launch(function))
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
        self.wgmma = wgmma.Pending(self.machine, self.shared)
        if roles:
            self.machine.mbarriers = Barriers(self.machine, self.space, self.shared)
            self.machine.stores = bulk_stores.Stores(self.machine, self.shared)
            self.machine.resume = self._enter
        self._logged = [region for region in regions if region.log is not None]
        self._body = self.statement(function.body)

    def run(self, lanes: int) -> None:
        """Run all blocks, about `lanes` threads at a time, whole clusters."""
        machine = self.machine
        if machine.roles:
            for first in range(0, machine.launch.blocks, machine.ranks):
                self._run_roles(first)
            return
        step = max(1, lanes // (machine.threads * machine.ranks)) * machine.ranks
        for first in range(0, machine.launch.blocks, step):
            count = min(step, machine.launch.blocks - first)
            self._start(first, count)
            self.copies.start()
            self._set(machine.launch.values(first + machine.block, machine.thread))
            self._body(machine.everyone)
            machine.finish()

    def _start(self, first: int, count: int) -> None:
        self.machine.start(first, count)
        nbytes = count * self.shared.nbytes
        self.shared.fill(np.full(nbytes, 0xFF, "u1"))
        self.shared.log.clear(nbytes // self.shared.log.granule)

    def _set(self, values) -> None:
        for variable, value in values:
            same = (value == value[0]).all()
            self.env[self.slot(variable)] = int(value[0]) if same else value

    # --- Kernels with roles

    def _run_roles(self, first: int) -> None:
        """One cluster, its warpgroups as coroutines, or their warps where nothing else will do."""
        machine = self.machine
        before = [region.view(np.dtype("u1")).copy() for region in self._logged]
        counts = machine.barriers, machine.cluster_barriers, self.copies.bytes
        try:
            self._run_crew(first)
        except Deadlock as deadlock:
            # Do the warps of a warpgroup wait for each other? Then from the start with each of
            # them on its own.
            if not machine.scattered - machine.split:
                raise
            machine.split |= machine.scattered
            machine.barriers, machine.cluster_barriers, self.copies.bytes = counts
            for region, data in zip(self._logged, before, strict=True):
                region.view(np.dtype("u1"))[:] = data
                region.log.forget()
            try:
                self._run_crew(first)
            except wgmma.Apart:
                doubt = (
                    "or warps of a warpgroup with wgmma wait for each other, which is not simulated"
                )
                raise Deadlock(
                    f"{deadlock}, {doubt}", deadlock.statement, deadlock.block, deadlock.thread
                ) from None
        for region in self._logged:
            region.log.end()

    def _run_crew(self, first: int) -> None:
        machine = self.machine
        self._start(first, machine.ranks)
        machine.mbarriers.start()
        machine.stores.start()
        crew = machine.crew()
        for coroutine in crew:
            machine.enter(coroutine)
            self.env[:] = [None] * len(self.env)
            self._set(machine.launch.values(first + machine.block, machine.thread))
            for registers in self.registers:
                registers.reset()
            for loop in self.loops:
                loop.reset()
            self.wgmma.start()
            coroutine.held += self._kept()
        machine.coroutines.run(
            crew, lambda: self._body(machine.everyone), self._enter, self._leave, machine.stuck
        )
        machine.mbarriers.finish()
        machine.stores.finish()
        machine.finish()

    def _kept(self) -> list:
        """What a coroutine keeps while others run, besides its lanes."""
        apart = [*self.registers, *self.loops, self.wgmma]
        return [list(self.env), [dict(vars(each)) for each in apart]]

    def _enter(self, coroutine) -> None:
        self.machine.enter(coroutine)
        self.env[:] = coroutine.held[1]
        apart = [*self.registers, *self.loops, self.wgmma]
        for each, kept in zip(apart, coroutine.held[2], strict=True):
            each.__dict__.update(kept)

    def _leave(self, coroutine) -> None:
        self.machine.leave(coroutine)
        coroutine.held[1:] = self._kept()
