"""Build many kernels, in several processes where that pays: nvcc takes seconds for each."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import artifact, compiler
from .epilogue import NONE, Epilogue
from .kernel import Kernel
from .problem import ConvProblem
from .schedules import Schedule, ScheduleError
from .target import CudaTarget, Target
from .toolchain import ToolchainError

__all__ = ["Request", "build_all", "default_jobs"]


@dataclass(frozen=True)
class Request:
    """One kernel to build; schedule and config as in `im2win_tvm.compile`."""

    problem: ConvProblem
    target: Target
    schedule: str | Schedule | None = None
    config: Any = None
    epilogue: Epilogue = NONE


def default_jobs(target: Target) -> int:
    """Processes that pay: a CPU kernel takes less time to build than a process to start."""
    if isinstance(target, CudaTarget):
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return 1


def build_all(requests: Iterable[Request], jobs: int = 1) -> Iterator[Kernel | Exception]:
    """The kernels in the order of the requests; for one that cannot be built, its error.

    With more than one job at most twice as many kernels as jobs are built ahead.
    """
    if jobs == 1:
        for request in requests:
            try:
                kernel: Kernel | Exception = _build(request)
            except Exception as error:  # whatever TVM raises concerns this kernel alone
                kernel = error
            yield kernel
        return
    # Not forked: a CUDA context does not survive that.
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[Future, tempfile.TemporaryDirectory]] = deque()
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for request in requests:
                folder = tempfile.TemporaryDirectory(prefix="im2win-")
                waiting.append((pool.submit(_build_to, request, _library(folder)), folder))
                if len(waiting) >= 2 * jobs:
                    yield _built(*waiting.popleft())
            while waiting:
                yield _built(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _build(request: Request) -> Kernel:
    epilogue = request.epilogue
    return compiler.compile(
        request.problem,
        request.target,
        schedule=request.schedule,
        config=request.config,
        bias=epilogue.bias,
        residual=epilogue.residual,
        activation=epilogue.activation,
    )


def _library(folder: tempfile.TemporaryDirectory) -> Path:
    return Path(folder.name) / "kernel.so"


def _build_to(request: Request, path: Path) -> Exception | None:
    """In the other process: write the kernel, or return why there is none."""
    try:
        _build(request).export(path)
    except (ScheduleError, ToolchainError) as error:
        return error
    except Exception as error:
        # TVM's exceptions do not all survive the way between processes.
        return RuntimeError(f"{type(error).__name__}: {error}")
    return None


def _built(future: Future, folder: tempfile.TemporaryDirectory) -> Kernel | Exception:
    error = future.result()
    if error is not None:
        return error
    path = _library(folder)
    return Kernel(path, artifact.read_metadata(path), owner=folder)
