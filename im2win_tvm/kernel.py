"""A compiled convolution: call it, prepare its weights, export it, load it again."""

import ctypes
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from . import artifact
from .arrays import Argument, ArgumentError, Expected, converted
from .epilogue import Epilogue
from .problem import ConvProblem


@dataclass(frozen=True)
class PreparedWeights:
    """Weights in the order a kernel reads them; made by `Kernel.prepare` for kernels like it."""

    packed: Any
    origin: tuple


class Kernel:
    """One convolution, ready to run; returned by `compile` and `load`.

    ``kernel(x, w, bias=None, *, residual=None, out=None)`` takes NumPy arrays (CPU kernels) or
    PyTorch tensors on the kernel's kind of device, shares their memory, and may be called from
    several threads. On CUDA it runs on the caller's current stream. `bind` makes a call whose
    arguments are checked once.
    """

    def __init__(self, path: Path, metadata: dict, owner: Any = None):
        self._path = Path(path)
        self._owner = owner  # keeps the folder of a compiled, not yet exported library
        self.metadata = metadata
        self.problem = ConvProblem(**metadata["problem"])
        self.epilogue = Epilogue(**metadata["epilogue"])
        device = "cpu" if metadata["target"]["kind"] == "llvm" else "cuda"
        self._arguments = {
            name: Argument(
                "out" if name == "y" else name,
                Expected(tuple(a["shape"]), a["dtype"], a["alignment"]),
                device,
            )
            for name, a in metadata["arguments"].items()
        }
        # What is read while the output is written, and its bytes.
        self._read = [
            (name, argument.expected.nbytes)
            for name, argument in self._arguments.items()
            if name in ("x", "packed", "bias", "residual")
        ]
        self._y_bytes = self._arguments["y"].expected.nbytes
        self._workspaces = metadata["workspaces"]

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
    def _steps(self) -> list[tuple[Any, Callable[[dict], tuple]]]:
        """The functions of a call, each with what picks its arguments, in order, by their names."""
        return [
            (getattr(self._module, call["function"]), itemgetter(*call["arguments"]))
            for call in self.metadata["calls"]
        ]

    @cached_property
    def _prepare(self):
        return getattr(self._module, self.metadata["prepare"])

    @cached_property
    def _origin(self) -> tuple:
        """What two kernels must share for one's prepared weights to fit the other.

        The order of packed weights is the schedule's own: it may depend on the configuration and on
        what of the problem is not in any shape. Equal functions write equal orders.
        """
        return self.metadata["prepare_hash"], self._arguments["packed"].expected

    @property
    def workspace_bytes(self) -> int:
        """Memory a call takes above its arguments and the prepared weights, in bytes.

        Workspaces allocated from the caller's framework, and on the CPU the scratch memory of
        each thread.
        """
        allocated = sum(self._arguments[name].expected.nbytes for name in self._workspaces)
        scratch = self.metadata["scratch_bytes_per_thread"]
        if scratch:
            scratch *= self._loaded[1].im2win_threads()
        return allocated + scratch

    def prepare(self, w: Any) -> PreparedWeights:
        """Bring weights ``[Co, Ci / groups, *kernel_size]`` into the kernel's order, once."""
        view = self._arguments["w"].check(w)
        packed = self._arguments["packed"].empty_like(w)
        self._prepare(view, self._arguments["packed"].check(packed))
        return PreparedWeights(packed, self._origin)

    def __call__(self, x: Any, w: Any, bias: Any = None, *, residual: Any = None, out: Any = None):
        """The convolution of `x` with `w` (raw, or from `prepare`), as a new array or in `out`.

        Shapes: x, residual and out as `problem.input_shape` and `problem.output_shape`, in the
        problem's layout; w as `problem.weight_shape`; bias ``[Co]``; all in the problem's dtype.
        Raises ArgumentError before anything runs.
        """
        views, out = self._checked(x, w, bias, residual, out)
        for function, pick in self._steps:
            function(*pick(views))
        return out

    def into_new(self, x: Any, w: Any, bias: Any, out: Any) -> None:
        """A call for who knows that `x` and `out` fit, and that nobody else has `out`.

        Raises ArgumentError for `w` and `bias`, as a call does.
        """
        arguments = self._arguments
        views = {"x": x, "y": out, "packed": self._packed(w)}
        if bias is not None:
            views["bias"] = arguments["bias"].check(bias)
        for name in self._workspaces:
            views[name] = arguments[name].empty_like(x)
        for function, pick in self._steps:
            function(*pick(views))

    def bind(
        self, x: Any, w: Any, bias: Any = None, *, residual: Any = None, out: Any = None
    ) -> "BoundCall":
        """This call, to be made many times on the same arrays: checked once, here.

        Arguments and errors as those of a call. Raw weights are prepared here, once.
        """
        views, out = self._checked(x, w, bias, residual, out)
        # PyTorch's tensors are converted here, but for one of each function: it tells the stream.
        held = {name: converted(view) for name, view in views.items()}
        steps = [(function, (pick(views)[0], *pick(held)[1:])) for function, pick in self._steps]
        return BoundCall(self, out, steps)

    def _checked(self, x, w, bias, residual, out) -> tuple[dict[str, Any], Any]:
        """What a call's functions take, by name, and the array that it returns.

        Raises ArgumentError. Made anew at each call are the output, unless it is given, the
        workspaces and raw weights in the kernel's order.
        """
        arguments = self._arguments
        views = {"x": arguments["x"].check(x)}
        for name, array in (("bias", bias), ("residual", residual)):
            compiled = name in arguments
            if (array is not None) != compiled:
                raise ArgumentError(
                    f"{name}: {'missing' if compiled else 'given'}; this kernel was compiled with "
                    f"{name}={compiled}"
                )
            if compiled:
                views[name] = arguments[name].check(array)
        fresh = out is None
        if fresh:
            out = arguments["y"].empty_like(x)
        views["y"] = arguments["y"].check(out)
        views["packed"] = self._packed(w)
        if not fresh:
            self._refuse_overlaps(views)
        for name in self._workspaces:
            views[name] = arguments[name].check(arguments[name].empty_like(x))
        return views, out

    def _packed(self, w: Any) -> Any:
        """Weights in the kernel's order; raises ArgumentError."""
        if not isinstance(w, PreparedWeights):
            w = self.prepare(w)
        # The kernel's own weights have its own tuple, and to compare contents takes longer.
        elif w.origin is not self._origin and w.origin != self._origin:
            raise ArgumentError("w: prepared by a kernel with another configuration")
        return self._arguments["packed"].check(w.packed)

    def _refuse_overlaps(self, views: dict[str, Any]) -> None:
        """Raise ArgumentError where the output shares memory with what is read meanwhile.

        A residual may be the output itself: each of its elements is read before it is written.
        """
        y_at = views["y"].data_ptr()
        y_end = y_at + self._y_bytes
        for name, size in self._read:
            at = views[name].data_ptr()
            if at < y_end and y_at < at + size and not (name == "residual" and at == y_at):
                raise ArgumentError(f"out: overlaps {name}, which is read while out is written")

    def export(self, path: str | os.PathLike) -> Path:
        """Write the kernel as one shared library; an existing file is replaced in one step."""
        return artifact.copy_atomically(self._path, path)


class BoundCall:
    """A kernel with its arguments; made by `Kernel.bind`. ``bound()`` runs it and returns `out`.

    It shares the arrays' memory: new values in them count at the next call, but an array must stay
    as it is and where it is, since nothing is checked again. It keeps them and its own workspaces
    for as long as it lives. On CUDA it runs on the stream that is current at the call, and may be
    captured in a graph, which must not outlive it. Two threads or streams need one each: they would
    write the same memory.
    """

    __slots__ = ("_steps", "kernel", "out")

    def __init__(self, kernel: Kernel, out: Any, steps: list[tuple[Any, tuple]]):
        self.kernel, self.out, self._steps = kernel, out, steps

    def __call__(self) -> Any:
        for function, arguments in self._steps:
            function(*arguments)
        return self.out


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
