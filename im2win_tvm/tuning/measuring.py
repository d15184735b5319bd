"""Measuring kernels in a process of their own, so that a candidate can crash without harm.

A CUDA kernel that reads where it must not ends every later call of its process with an error, and
a CPU kernel ends the process itself. Both cost one candidate: after anything but a right output the
process is started anew, and those that met an error together are measured alone.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .. import environment, processes
from ..bench import timing
from ..bench.operands import Operands, operands_for
from ..kernel import Kernel, load
from ..problem import ConvProblem
from ..turns import turn

__all__ = ["Measurement", "Measurer", "TuningError", "first_line"]

#: Seconds that one kernel may take beyond its time limits before it counts as hanging.
PATIENCE = 60.0
#: Seconds for tensors and reference; a float64 convolution of a large batch takes its time.
PREPARATION = 900.0
#: Seconds until a killed process is gone; one inside a driver may stay for as long as that likes.
ENDING = 10.0


class TuningError(RuntimeError):
    """Tuning that cannot take place here; the text says what is missing."""


@dataclass(frozen=True)
class Measurement:
    """What came of one kernel.

    error: why it could not be run or timed, None if it could. passed: its output was right, before
    the timing and after. relative_error: of all outputs, None where one is not finite. times: by
    cache state, of outputs that passed.
    """

    error: str | None = None
    passed: bool = False
    relative_error: float | None = None
    message: str = ""
    times: dict[str, timing.Times] = field(default_factory=dict)


class Measurer:
    """Runs kernels in a child process; a context manager.

    kind: of the target, "llvm" or "cuda". patience: seconds, see PATIENCE. lock: a file; of the
    measurers that name it one measures at a time. width: kernels that are worth having ready at
    once.
    """

    width = 1

    def __init__(self, kind: str, patience: float = PATIENCE, lock: Path | None = None) -> None:
        self._kind, self._patience, self._lock = kind, patience, lock
        # Not forked: a CUDA context does not survive that.
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._left: Any = None  # one that was killed and had not ended
        self._connection: Connection | None = None
        self._problem: ConvProblem | None = None

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def driver(self) -> str | None:
        """The version of the driver that kernels run on; None on a CPU."""
        return environment.driver_version() if self._kind == "cuda" else None

    def close(self) -> None:
        """End the process."""
        self._stop()

    def measure(
        self, problem: ConvProblem, libraries: list[Path], limits: timing.Limits
    ) -> list[Measurement]:
        """Check exported kernels of `problem`, and time those that are right, by turns.

        One result each. Of several, those with an error are measured once more, each alone: which
        of them it was is not known. Raises TuningError where the problem cannot be measured at all,
        and OSError where the lock cannot be had.
        """
        with turn(self._lock):
            try:
                return self._with_retries(problem, libraries, limits)
            except BaseException:
                self._stop()  # before somebody else's turn begins: Ctrl-C does not reach the child
                raise

    def _with_retries(
        self, problem: ConvProblem, libraries: list[Path], limits: timing.Limits
    ) -> list[Measurement]:
        results = self._together(problem, libraries, limits)
        if len(libraries) > 1:
            for index, result in enumerate(results):
                if result.error is None:
                    continue
                try:
                    (results[index],) = self._together(problem, [libraries[index]], limits)
                except TuningError:
                    # One that still hangs may hold the device. What was measured counts.
                    break
        return results

    def _together(
        self, problem: ConvProblem, libraries: list[Path], limits: timing.Limits
    ) -> list[Measurement]:
        """As `measure`; a hang or the end of the process is the error of all."""
        if problem != self._problem:
            self._prepare(problem)
        seconds = len(libraries) * (self._patience + limits.warmup + limits.seconds)
        try:
            self._connection.send((libraries, limits))
            if not self._connection.poll(seconds):
                self._stop()
                return [Measurement(f"hangs: no answer within {seconds:.0f} s")] * len(libraries)
            results, unharmed = self._connection.recv()
        except (EOFError, OSError):
            reason = self._stop()
            return [Measurement(f"ended its process ({reason})")] * len(libraries)
        if not unharmed:
            self._stop()
        return results

    def _prepare(self, problem: ConvProblem) -> None:
        """Have the child make tensors and reference; start it if there is none."""
        if self._left is not None and self._left.exitcode is None:
            raise TuningError(
                f"{problem}: cannot be measured here: process {self._left.pid} measured before and "
                "was killed, but is still there; it may use the device, and no time would be right"
            )
        if self._process is None:
            self._start()
        refusal = f"tensors and reference took more than {PREPARATION:.0f} s"
        try:
            self._connection.send(problem)
            if self._connection.poll(PREPARATION):
                refusal = self._connection.recv()
        except (EOFError, OSError):
            refusal = f"the measuring process ended ({self._stop()})"
        if refusal is not None:
            self._stop()
            raise TuningError(f"{problem}: cannot be measured here: {refusal}")
        self._problem = problem

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, self._kind), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> str:
        """End the process if it has not ended, and say how it did."""
        process, self._process, self._problem = self._process, None, None
        if process is None:
            return ""
        self._connection.close()
        process.join(1.0)  # an idle one ends when its connection does
        if process.exitcode is None:
            process.kill()
            process.join(ENDING)
        code = process.exitcode
        if code is None:
            # Left behind: the interpreter would wait for it at its own end, without a limit.
            multiprocessing.process._children.discard(process)
            self._left = process
            return f"still there {ENDING:g} s after SIGKILL"
        process.close()
        if code is not None and code < 0:
            with suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"


def _serve(connection: Connection, kind: str) -> None:
    """The child process: answers until nobody asks.

    To a problem with None once there are tensors for it, or with why not; to kernels of it with
    their measurements, and whether it is as it was before them.
    """
    processes.begin()
    operands: Any = None
    with suppress(EOFError, OSError):
        while True:
            asked = connection.recv()
            if isinstance(asked, ConvProblem):
                operands = None  # before the next ones: both may not fit
                try:
                    operands, _ = operands_for(asked, kind), timing.clock_for(kind)
                    connection.send(None)
                except Exception as error:
                    connection.send(first_line(error))
            else:
                # A clock remembers the calls that it timed, and with them kernels and outputs.
                results = _measured(*asked, operands, timing.clock_for(kind))
                # A kernel that failed may have left an error in the CUDA context, and a wrong one
                # may have written over the tensors of those after it.
                connection.send((results, all(result.passed for result in results)))


def _measured(
    libraries: list[Path], limits: timing.Limits, operands: Operands, clock: timing.Clock
) -> list[Measurement]:
    results: list[Measurement] = []
    calls: dict[int, Any] = {}
    classes: dict[int, str] = {}
    # One for all of them, since each is checked right after a call of its own: the outputs of
    # twenty finalists would not fit on every GPU.
    output = operands.poisoned()
    for index, library in enumerate(libraries):
        try:
            kernel = load(library)
            call = _call_of(kernel, operands, output)
            classes[index] = kernel.metadata["accuracy"]
            results.append(_checked(output, call, operands, classes[index]))
        except Exception as error:
            results.append(Measurement(first_line(error)))
        if results[-1].passed:
            calls[index] = call
    try:
        times = timing.measure(calls, clock, limits)
        for index, call in calls.items():
            # Once more: a race may show in one call of many only.
            again = _checked(output, call, operands, classes[index])
            results[index] = replace(again, times=times[index] if again.passed else {})
    except Exception as error:
        for index in calls:
            results[index] = Measurement(first_line(error))
    return results


def _call_of(kernel: Kernel, operands: Operands, output: Any) -> Any:
    """The call of a kernel that writes `output`; its weights are prepared."""
    weights = kernel.prepare(operands.w)
    return lambda: kernel(operands.x, weights, out=output)


def _checked(output: Any, call: Any, operands: Operands, accuracy: str) -> Measurement:
    output[...] = math.nan
    call()
    outcome = operands.check(output, accuracy)
    error = outcome.relative_error if math.isfinite(outcome.relative_error) else None
    return Measurement(None, outcome.in_class, error, outcome.message)


def first_line(error: Exception) -> str:
    """An error in one line, its type first; of one that announces others, the last of them."""
    first, *others = f"{type(error).__name__}: {error}".strip().splitlines()
    return f"{first} {others[-1].strip()}" if others and first.endswith(":") else first
