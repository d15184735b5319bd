"""Kernels that were compiled once: in memory for this process, on disk for the next one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from .artifact import ArtifactError
from .environment import package_version
from .epilogue import NONE, Epilogue
from .kernel import Kernel, load
from .problem import ConvProblem
from .target import Target

__all__ = ["VARIABLE", "KernelCache", "default_folder"]

#: The environment variable that names the folder.
VARIABLE = "IM2WIN_CACHE"
_PACKAGE = Path(__file__).parent


def default_folder() -> Path | None:
    """``$IM2WIN_CACHE``, or ``im2win_tvm`` in the user's folder for caches; None without a home."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    with suppress(RuntimeError):  # of Path.home: a container may know no user
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "im2win_tvm"
    return None


class KernelCache:
    """Compiled kernels by problem, target, accuracy class and epilogue.

    folder: where kernels lie, one library each; None is `default_folder` as it is at each use.
    Its files may be deleted at any time, and several processes may share it: a file appears whole,
    and one that cannot be read counts as none and is replaced. Names are hashes of everything that
    decides on a kernel: problem, target with the device, versions, this package's source, and which
    tuning records there are. Threads may share a cache; each kernel is compiled by one of them.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self._folder = None if folder is None else Path(folder)
        self._kernels: dict[str, Kernel] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def get(
        self,
        problem: ConvProblem,
        target: Target,
        *,
        accuracy: str | None = None,
        epilogue: Epilogue = NONE,
    ) -> Kernel:
        """The kernel that `im2win_tvm.compile` would give. Raises as it does."""
        name = _name(problem, target, accuracy, epilogue)
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._kernels:
                folder = self._folder or default_folder()
                path = None if folder is None else folder / f"{name}.so"
                self._kernels[name] = _read(path, problem) or _compile(
                    path, problem, target, accuracy, epilogue
                )
            return self._kernels[name]


def _read(path: Path | None, problem: ConvProblem) -> Kernel | None:
    if path is None:
        return None
    try:
        kernel = load(path)
    except (ArtifactError, OSError):
        return None
    return kernel if kernel.problem == problem else None


def _compile(
    path: Path | None,
    problem: ConvProblem,
    target: Target,
    accuracy: str | None,
    epilogue: Epilogue,
) -> Kernel:
    from .compiler import compile

    kernel = compile(problem, target, accuracy=accuracy, **dataclasses.asdict(epilogue))
    if path is None:
        return kernel
    with suppress(OSError):  # no room, or not ours to write: the kernel is there all the same
        path.parent.mkdir(parents=True, exist_ok=True)
        kernel.export(path)
    return kernel


def _name(problem: ConvProblem, target: Target, accuracy: str | None, epilogue: Epilogue) -> str:
    deciding = [
        dataclasses.asdict(problem),
        [target.kind, dataclasses.asdict(target)],
        accuracy,
        dataclasses.asdict(epilogue),
        [package_version(name) for name in ("apache-tvm", "apache-tvm-ffi")],
        _source(),
        _records(),
    ]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source() -> str:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _files() -> list[Path]:
    """The source; in a checkout schedules are a link, which glob does not follow."""
    places = (_PACKAGE, (_PACKAGE / "schedules").resolve())
    found = {path for place in places for path in place.glob("**/*")}
    return sorted(path for path in found if path.suffix in (".py", ".c", ".cuh"))


def _records() -> list[tuple[str, int, int]]:
    """The files with tuning records, with their sizes and dates."""
    from .tuning.lookup import places

    found = []
    for place in places():
        for path in sorted(place.glob("*/*.jsonl")):
            with suppress(OSError):
                status = path.stat()
                found.append((str(path), status.st_size, status.st_mtime_ns))
    return found
