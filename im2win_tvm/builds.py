"""Build many kernels, in several processes where that pays: nvcc takes seconds for each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import artifact, compiler, processes
from .accuracy import AccuracyError
from .epilogue import NONE, Epilogue
from .kernel import Kernel
from .problem import ConvProblem
from .schedules import Schedule, ScheduleError
from .target import CudaTarget, Target
from .toolchain import ToolchainError

__all__ = ["Builder", "Request", "build_all", "default_jobs"]


@dataclass(frozen=True)
class Request:
    """One kernel to build; schedule, config and accuracy as in `im2win_tvm.compile`."""

    problem: ConvProblem
    target: Target
    schedule: str | Schedule | None = None
    config: Any = None
    epilogue: Epilogue = NONE
    accuracy: str | None = None


def default_jobs(target: Target) -> int:
    """Processes that pay: a CPU kernel takes less time to build than a process to start."""
    if isinstance(target, CudaTarget):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return 1


def build_all(requests: Iterable[Request], jobs: int = 1) -> Iterator[Kernel | Exception]:
    """The kernels in the order of the requests; for one that cannot be built, its error.

    With more than one job at most twice as many kernels as jobs are built ahead.
    """
    with Builder(jobs) as builder:
        yield from builder.build(requests)


class _Waiting:
    """A kernel that is being built in another process."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.folder = tempfile.TemporaryDirectory(prefix="im2win-")
        self.future: Future | None = None

    def submit(self, pool: ProcessPoolExecutor) -> None:
        try:
            self.future = pool.submit(_build_to, self.request, _library(self.folder))
        except BrokenProcessPool as error:  # just found out: as if it had begun
            self.future = Future()
            self.future.set_exception(error)

    def broken(self) -> bool:
        """Whether it went down with the pool."""
        return not self.future.done() or isinstance(self.future.exception(), BrokenProcessPool)


class Builder:
    """Processes that build kernels and stay for the next ones; a context manager.

    jobs: how many; 1 builds in this process.
    """

    def __init__(self, jobs: int = 1) -> None:
        self.jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(self) -> None:
        """Start the processes: each imports TVM, for seconds in which a caller may do other things.

        Without it they start with the first request.
        """
        if self.jobs > 1:
            for _ in range(self.jobs):
                self._started().submit(_import)

    def build(self, requests: Iterable[Request]) -> Iterator[Kernel | Exception]:
        """As `build_all`. A process that ends while it builds costs that kernel alone."""
        if self.jobs == 1:
            for request in requests:
                try:
                    kernel: Kernel | Exception = _build(request)
                except Exception as error:  # whatever TVM raises concerns this kernel alone
                    kernel = error
                yield kernel
            return
        waiting: deque[_Waiting] = deque()
        try:
            for request in requests:
                waiting.append(_Waiting(request))
                waiting[-1].submit(self._started())
                if len(waiting) >= 2 * self.jobs:
                    yield self._built(waiting)
            while waiting:
                yield self._built(waiting)
        finally:
            for entry in waiting:
                if entry.future is not None:  # Ctrl-C may come before it is submitted
                    entry.future.cancel()

    def _built(self, waiting: deque[_Waiting]) -> Kernel | Exception:
        """The first kernel of those waiting, or its error."""
        entry = waiting.popleft()
        try:
            error = entry.future.result()
        except BrokenProcessPool:
            # Whose fault it was is not known: this one is tried alone, and the others again.
            error = self._alone(entry)
            for other in waiting:
                if other.broken():
                    other.submit(self._started())
        if error is not None:
            return error
        path = _library(entry.folder)
        return Kernel(path, artifact.read_metadata(path), owner=entry.folder)

    def _alone(self, entry: _Waiting) -> Exception | None:
        self.close()
        entry.submit(self._started())
        try:
            return entry.future.result()
        except BrokenProcessPool:
            self.close()
            return RuntimeError("the process that built it ended")

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # Not forked: a CUDA context does not survive that.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, context, processes.begin)
        return self._pool

    def close(self) -> None:
        """End the processes, once they have built what they began."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _build(request: Request) -> Kernel:
    epilogue = request.epilogue
    return compiler.compile(
        request.problem,
        request.target,
        accuracy=request.accuracy,
        schedule=request.schedule,
        config=request.config,
        bias=epilogue.bias,
        residual=epilogue.residual,
        activation=epilogue.activation,
    )


def _library(folder: tempfile.TemporaryDirectory) -> Path:
    return Path(folder.name) / "kernel.so"


def _import() -> None:
    """In the other process: nothing, once this module is there."""


def _build_to(request: Request, path: Path) -> Exception | None:
    """In the other process: write the kernel, or return why there is none."""
    try:
        _build(request).export(path)
    except (AccuracyError, ScheduleError, ToolchainError) as error:
        return error
    except Exception as error:
        # TVM's exceptions do not all survive the way between processes.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return None
