"""cuDNN's legacy convolution API through ctypes: constants, statuses, descriptors, one plan.

The legacy API names its algorithms and tells the workspace of each, which PyTorch hides. Constants
are those of cudnn_graph.h, cudnn_ops.h and cudnn_cnn.h in cuDNN 8 and 9.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import weakref
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from ...problem import ConvProblem

__all__ = [
    "ALGORITHMS",
    "FORMATS",
    "MATH_TYPES",
    "CudnnError",
    "Library",
    "Plan",
    "load_library",
    "math_type",
]

#: cudnnConvolutionFwdAlgo_t by name.
ALGORITHMS = {
    "IMPLICIT_GEMM": 0,
    "IMPLICIT_PRECOMP_GEMM": 1,
    "GEMM": 2,
    "DIRECT": 3,
    "FFT": 4,
    "FFT_TILING": 5,
    "WINOGRAD": 6,
    "WINOGRAD_NONFUSED": 7,
}
#: cudnnTensorFormat_t by layout.
FORMATS = {"NCHW": 0, "NHWC": 1}
#: cudnnDataType_t by dtype.
DATA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 9}
#: cudnnMathType_t by name. On float32 tensors, from sm_80 on, DEFAULT and TENSOR_OP allow TF32 and
#: FMA forbids it (cuDNN's API reference, cudnnMathType_t). TENSOR_OP_ALLOW_CONVERSION would let
#: cuDNN round float32 tensors to float16: no class of ours, and used nowhere.
MATH_TYPES = {"DEFAULT": 0, "TENSOR_OP": 1, "TENSOR_OP_ALLOW_CONVERSION": 2, "FMA": 3}
# cudnnConvolutionMode_t: what neural networks call a convolution.
_CROSS_CORRELATION = 1
# cudnnDataType_t of the sums, in both dtypes.
_COMPUTE_FLOAT = 0

_P, _I, _S = c_void_p, c_int, c_size_t
#: Argument types of every function used. All but the last two return a status.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudnnCreate": (_P,),
    "cudnnDestroy": (_P,),
    "cudnnSetStream": (_P, _P),
    "cudnnCreateTensorDescriptor": (_P,),
    "cudnnDestroyTensorDescriptor": (_P,),
    "cudnnSetTensor4dDescriptor": (_P, _I, _I, _I, _I, _I, _I),
    "cudnnCreateFilterDescriptor": (_P,),
    "cudnnDestroyFilterDescriptor": (_P,),
    "cudnnSetFilter4dDescriptor": (_P, _I, _I, _I, _I, _I, _I),
    "cudnnCreateConvolutionDescriptor": (_P,),
    "cudnnDestroyConvolutionDescriptor": (_P,),
    "cudnnSetConvolution2dDescriptor": (_P, _I, _I, _I, _I, _I, _I, _I, _I),
    "cudnnSetConvolutionMathType": (_P, _I),
    "cudnnSetConvolutionGroupCount": (_P, _I),
    "cudnnGetConvolutionForwardWorkspaceSize": (_P, _P, _P, _P, _P, _I, _P),
    "cudnnConvolutionForward": (_P, _P, _P, _P, _P, _P, _P, _I, _P, _S, _P, _P, _P),
    "cudnnGetErrorString": (_I,),
    "cudnnGetVersion": (),
}


def math_type(dtype: str, tf32: bool = False) -> str:
    """The name of the math type: what PyTorch sets for the same dtype and `allow_tf32`."""
    if dtype != "float32":
        return "TENSOR_OP"
    return "DEFAULT" if tf32 else "FMA"


class CudnnError(RuntimeError):
    """A cuDNN that cannot be loaded, or a call that it refused, with its own status text."""


class Library:
    """cuDNN with every status checked; `raw` is the ctypes library, or what stands in for it.

    Makes its one handle when the first plan is made: that takes memory on the device.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        for name, arguments in SIGNATURES.items():
            function = getattr(raw, name)
            function.argtypes = list(arguments)
            function.restype = c_int
        raw.cudnnGetErrorString.restype = c_char_p
        raw.cudnnGetVersion.restype = c_size_t

    @property
    def version(self) -> str:
        """As in ``"9.19.0"``."""
        number = int(self.raw.cudnnGetVersion())
        # Since 9 a version is major * 10000 + minor * 100 + patch, before major * 1000.
        step = 10000 if number >= 90000 else 1000
        return f"{number // step}.{number % step // 100}.{number % 100}"

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises CudnnError with its name and status unless it succeeds."""
        status = getattr(self.raw, name)(*arguments)
        if status != 0:
            text = self.raw.cudnnGetErrorString(status)
            told = text.decode() if isinstance(text, bytes) else str(text)
            raise CudnnError(f"{name}: {told} ({status})")

    @functools.cached_property
    def handle(self) -> c_void_p:
        """The handle. Left to the driver at exit, when the context may be gone already."""
        handle = c_void_p()
        self.call("cudnnCreate", byref(handle))
        weakref.finalize(self, self.raw.cudnnDestroy, handle).atexit = False
        return handle

    def descriptor(self, kind: str, cleanup: contextlib.ExitStack) -> c_void_p:
        """A new descriptor (kind: Tensor, Filter or Convolution) that `cleanup` destroys."""
        made = c_void_p()
        self.call(f"cudnnCreate{kind}Descriptor", byref(made))
        cleanup.callback(getattr(self.raw, f"cudnnDestroy{kind}Descriptor"), made)
        return made


class Plan:
    """One algorithm for one problem with tensors in one format.

    algorithm: a name in ALGORITHMS. layout: ``"NCHW"`` or ``"NHWC"``, that of x, w and y in
    memory. tf32: whether float32 may be computed in TF32. Descriptors are destroyed with the plan,
    or at once if it cannot be made. workspace_bytes: what cuDNN asks for.
    Raises CudnnError with the status of the first call that is refused.
    """

    def __init__(
        self,
        library: Library,
        problem: ConvProblem,
        algorithm: str,
        layout: str,
        tf32: bool = False,
    ) -> None:
        self._library = library
        self.math_type = math_type(problem.dtype, tf32)
        self._algorithm = ALGORITHMS[algorithm]
        call, kind = library.call, DATA_TYPES[problem.dtype]
        order = FORMATS[layout]
        handle = library.handle
        with contextlib.ExitStack() as cleanup:
            self._x, self._y = (library.descriptor("Tensor", cleanup) for _ in range(2))
            self._w = library.descriptor("Filter", cleanup)
            self._convolution = library.descriptor("Convolution", cleanup)
            n = problem.batch
            for descriptor, channels, size in (
                (self._x, problem.in_channels, problem.input_size),
                (self._y, problem.out_channels, problem.output_size),
            ):
                call("cudnnSetTensor4dDescriptor", descriptor, order, kind, n, channels, *size)
            call("cudnnSetFilter4dDescriptor", self._w, kind, order, *problem.weight_shape)
            call(
                "cudnnSetConvolution2dDescriptor",
                self._convolution,
                *(before for before, _ in problem.padding),
                *problem.stride,
                *problem.dilation,
                _CROSS_CORRELATION,
                _COMPUTE_FLOAT,
            )
            math = MATH_TYPES[self.math_type]
            call("cudnnSetConvolutionMathType", self._convolution, math)
            call("cudnnSetConvolutionGroupCount", self._convolution, problem.groups)
            size = c_size_t()
            call(
                "cudnnGetConvolutionForwardWorkspaceSize",
                handle,
                self._x,
                self._w,
                self._convolution,
                self._y,
                self._algorithm,
                byref(size),
            )
            self.workspace_bytes = size.value
            weakref.finalize(self, cleanup.pop_all().close)
        # cuDNN reads the two factors of y = alpha * conv + beta * y from the host.
        self._one, self._zero = c_float(1), c_float(0)

    def run(self, x: int, w: int, y: int, workspace: int, stream: int) -> None:
        """Enqueue the convolution. All arguments are addresses; 0 is the default stream."""
        library = self._library
        library.call("cudnnSetStream", library.handle, c_void_p(stream))
        library.call(
            "cudnnConvolutionForward",
            library.handle,
            byref(self._one),
            self._x,
            c_void_p(x),
            self._w,
            c_void_p(w),
            self._convolution,
            self._algorithm,
            c_void_p(workspace),
            self.workspace_bytes,
            byref(self._zero),
            self._y,
            c_void_p(y),
        )


def candidates() -> list[str]:
    """Where cuDNN may be: the wheel that PyTorch depends on, then the loader's own search."""
    found = []
    # find_spec imports the parent of a dotted name, and fails where there is none.
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec("nvidia.cudnn")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [str(path) for path in sorted(Path(folder, "lib").glob("libcudnn.so.*"))]
    return [*found, "libcudnn.so.9", "libcudnn.so.8"]


@functools.cache
def load_library() -> Library | str:
    """cuDNN, or the reason why there is none."""
    tried = []
    for name in candidates():
        try:
            return Library(ctypes.CDLL(name))
        except (OSError, AttributeError) as error:
            tried.append(f"{name}: {error}")
    return f"cuDNN cannot be loaded (pip install nvidia-cudnn-cu13): {tried[-1]}"
