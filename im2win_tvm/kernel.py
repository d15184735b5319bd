"""A compiled convolution: call it, prepare its weights, export it, load it again."""

import ctypes
import math
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import arrays, artifact
from .arrays import ArgumentError, Expected
from .epilogue import Epilogue
from .problem import DTYPES, ConvProblem


@dataclass(frozen=True)
class PreparedWeights:
    """Weights in the order a kernel reads them; made by `Kernel.prepare` for kernels like it."""

    packed: Any
    origin: tuple


class Kernel:
    """One convolution, ready to run; returned by `compile` and `load`.

    ``kernel(x, w, bias=None, *, residual=None, out=None)`` takes NumPy arrays (CPU kernels) or
    PyTorch tensors on the kernel's kind of device, shares their memory, and may be called from
    several threads. On CUDA it runs on the caller's current stream.
    """

    def __init__(self, path: Path, metadata: dict, owner: Any = None):
        self._path = Path(path)
        self._owner = owner  # keeps the folder of a compiled, not yet exported library
        self.metadata = metadata
        self.problem = ConvProblem(**metadata["problem"])
        self.epilogue = Epilogue(**metadata["epilogue"])
        self._expected = {
            name: Expected(tuple(a["shape"]), a["dtype"], a["alignment"])
            for name, a in metadata["arguments"].items()
        }
        self._device = "cpu" if metadata["target"]["kind"] == "llvm" else "cuda"

    def __repr__(self):
        m = self.metadata
        return f"Kernel({self.problem}, {m['schedule']['name']}, {m['target']})"

    @cached_property
    def _loaded(self) -> tuple[Any, ctypes.CDLL]:
        """The library as a module of functions, and as the C library that it also is."""
        import tvm_ffi

        # Under a name of its own: the dynamic loader takes a name that it has seen for the library
        # that it has, and would go on with the old one after an export over the same path.
        with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
            name = os.path.join(folder, "kernel.so")
            os.symlink(self._path.resolve(), name)
            return tvm_ffi.load_module(name), ctypes.CDLL(name)

    @property
    def _module(self):
        return self._loaded[0]

    @cached_property
    def _steps(self) -> list[tuple[Any, list[str]]]:
        return [
            (getattr(self._module, call["function"]), call["arguments"])
            for call in self.metadata["calls"]
        ]

    @cached_property
    def _prepare(self):
        return getattr(self._module, self.metadata["prepare"])

    @cached_property
    def _origin(self) -> tuple:
        """What two kernels must share for one's prepared weights to fit the other.

        The packed shape tells the blocking and the axes of K. Their order is the schedule's own and
        depends on the layout: shapes of different orders may be equal.
        """
        return (
            self.metadata["schedule"]["name"],
            self._expected["packed"],
            self.problem.weight_shape,
            self.problem.groups,
            self.problem.channels_last,
        )

    @property
    def workspace_bytes(self) -> int:
        """Memory a call takes above its arguments and the prepared weights, in bytes.

        Workspaces allocated from the caller's framework, and on the CPU the scratch memory of
        each thread.
        """
        allocated = sum(
            math.prod(self._expected[name].shape) * DTYPES[self._expected[name].dtype]
            for name in self.metadata["workspaces"]
        )
        scratch = self.metadata["scratch_bytes_per_thread"]
        if scratch:
            scratch *= self._loaded[1].im2win_threads()
        return allocated + scratch

    def prepare(self, w: Any) -> PreparedWeights:
        """Bring weights ``[Co, Ci / groups, *kernel_size]`` into the kernel's order, once."""
        view = arrays.argument("w", w, self._expected["w"], self._device)
        packed = arrays.empty_like(w, self._expected["packed"])
        into = arrays.argument("packed", packed, self._expected["packed"], self._device)
        self._prepare(view, into)
        return PreparedWeights(packed, self._origin)

    def __call__(self, x: Any, w: Any, bias: Any = None, *, residual: Any = None, out: Any = None):
        """The convolution of `x` with `w` (raw, or from `prepare`), as a new array or in `out`.

        Shapes: x, residual and out as `problem.input_shape` and `problem.output_shape`, in the
        problem's layout; w as `problem.weight_shape`; bias ``[Co]``; all in the problem's dtype.
        Raises ArgumentError before anything runs.
        """
        views = {"x": arrays.argument("x", x, self._expected["x"], self._device)}
        for name, array, compiled in (
            ("bias", bias, self.epilogue.bias),
            ("residual", residual, self.epilogue.residual),
        ):
            if (array is not None) != compiled:
                raise ArgumentError(
                    f"{name}: {'missing' if compiled else 'given'}; this kernel was compiled with "
                    f"{name}={compiled}"
                )
            if compiled:
                views[name] = arrays.argument(name, array, self._expected[name], self._device)
        if out is None:
            out = arrays.empty_like(x, self._expected["y"])
        elif arrays.overlap(x, out):
            raise ArgumentError("out: overlaps x, which is read while out is written")
        views["y"] = arrays.argument("out", out, self._expected["y"], self._device)
        if not isinstance(w, PreparedWeights):
            w = self.prepare(w)
        elif w.origin != self._origin:
            raise ArgumentError("w: prepared by a kernel with another configuration")
        views["packed"] = arrays.argument(
            "packed", w.packed, self._expected["packed"], self._device
        )
        for name in self.metadata["workspaces"]:
            workspace = arrays.empty_like(x, self._expected[name])
            views[name] = arrays.argument(name, workspace, self._expected[name], self._device)
        for function, names in self._steps:
            function(*(views[name] for name in names))
        return out

    def export(self, path: str | os.PathLike) -> Path:
        """Write the kernel as one shared library; an existing file is replaced in one step."""
        return artifact.copy_atomically(self._path, path)


def load(path: str | os.PathLike) -> Kernel:
    """Load an exported kernel. Needs NumPy and apache-tvm-ffi, and no compiler.

    Raises ArtifactError if the file is not a kernel, is damaged, or is for another machine.
    """
    metadata = artifact.read_metadata(path)
    artifact.check_machine(metadata, path)
    kernel = Kernel(Path(path), metadata)
    try:
        _ = kernel._module
    except (OSError, RuntimeError) as error:
        hint = " (install libgomp1)" if "libgomp" in str(error) else ""
        raise artifact.ArtifactError(f"{path}: cannot be loaded{hint}: {error}") from error
    return kernel
