"""The tensor functions that kernels consist of, and filters in their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from .. import simulate
from ..accuracy import allowed
from ..emulate import serial
from ..epilogue import Epilogue
from ..lower import calls, function_parameters, is_tirx, lower
from ..problem import ConvProblem
from ..schedules import ScheduleError
from ..schedules.base import PREPARE
from ..select import Choice, select
from ..target import Target
from .measured import Comparison
from .memory import IN_PLACE
from .passes import as_scheduled

__all__ = ["Functions"]

# Threads that are simulated together: filters have no barriers, and NumPy costs per call.
_LANES = 1 << 16


class Functions:
    """The tensor functions of kernels, one set for equal ones, and packed filters."""

    def __init__(
        self,
        target: Target,
        accuracy: str | None,
        compare: Callable[[ConvProblem, Target, str | None], Comparison] | None,
        keep: Callable[[ConvProblem, Choice], str | None] | None,
    ):
        self.target, self.accuracy, self.keep = target, accuracy, keep
        self._compare = compare
        self._comparisons: dict[ConvProblem, Comparison] = {}
        self._lowered: dict[tuple, tuple[Choice, tvm.IRModule]] = {}
        self._variables: dict[tuple, tvm.ir.GlobalVar] = {}
        self._libraries: dict[int, Any] = {}

    def of(self, problem: ConvProblem, epilogue: Epilogue) -> tuple[Choice, tvm.IRModule]:
        """Raises ScheduleError."""
        key = problem, epilogue
        if key not in self._lowered:
            # A class of float32 says nothing of a model's other convolutions.
            accuracy = self.accuracy if self.accuracy in allowed(problem.dtype) else None
            choice = select(problem, self.target, accuracy=accuracy)
            reason = self.keep(problem, choice) if self.keep else None
            if reason is not None:
                raise ScheduleError(reason)
            self._measure(problem, accuracy)
            module = choice.schedule.build(problem, choice.config, self.target, epilogue)
            self._lowered[key] = choice, lower(module)
        return self._lowered[key]

    def _measure(self, problem: ConvProblem, accuracy: str | None) -> None:
        """Raise ScheduleError where TVM's own kernel is the faster one, if that is asked for."""
        if self._compare is None:
            return
        if problem not in self._comparisons:
            self._comparisons[problem] = self._compare(problem, self.target, accuracy)
        found = self._comparisons[problem]
        if found.tvm_us < found.ours_us:
            raise ScheduleError(f"measured: {found}; TVM's own kernel stays")

    def origin(self, problem: ConvProblem, choice: Choice) -> str:
        """Where a configuration comes from, and what was measured."""
        if self._compare is None:
            return str(choice.origin)
        return f"{choice.origin}; measured: {self._comparisons[problem]}"

    def variable(self, builder, problem, epilogue, module, name: str) -> tvm.ir.GlobalVar:
        key = problem, epilogue, name
        if key not in self._variables:
            function = as_scheduled(module[name])
            for call in calls(module):
                if call["function"] == name and "residual" in call["arguments"]:
                    places = [call["arguments"].index(each) for each in ("residual", "y")]
                    function = function.with_attr(IN_PLACE, places)
            self._variables[key] = builder.add_func(function, name)
        return self._variables[key]

    def prepared(self, module: tvm.IRModule, w: np.ndarray) -> np.ndarray:
        """The filter in the kernel's order, made on this machine's CPU whatever the target."""
        function = module[PREPARE]
        parameters = function_parameters(module)[PREPARE]
        if is_tirx(function):
            made = np.zeros(parameters[-1].shape, parameters[-1].dtype)
            arrays = zip(parameters, (np.ascontiguousarray(w), made), strict=True)
            simulate.run(function, {p.name: array for p, array in arrays}, lanes=_LANES)
            return made
        key = tvm_ffi.structural_hash(function)
        if key not in self._libraries:
            compiled = tvm.compile(tvm.IRModule({PREPARE: serial(function)}), target="llvm")
            self._libraries[key] = compiled.jit()
        library = self._libraries[key]
        packed = tvm.runtime.tensor(np.zeros(parameters[-1].shape, parameters[-1].dtype))
        library[PREPARE](tvm.runtime.tensor(np.ascontiguousarray(w)), packed)
        return packed.numpy()
