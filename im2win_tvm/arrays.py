"""NumPy arrays, PyTorch tensors and others with DLPack as kernel arguments, without copies."""

import ctypes
import math
import sys
from typing import Any, NamedTuple

import numpy as np

from .problem import DTYPES


class ArgumentError(ValueError):
    """An argument of a kernel with a wrong shape, dtype, device, layout or alignment."""


class Expected(NamedTuple):
    """What a kernel was compiled for: one argument's shape, dtype and alignment in bytes."""

    shape: tuple[int, ...]
    dtype: str
    alignment: int

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype]


def _torch():
    """PyTorch if the caller has imported it; a tensor can only come from there."""
    return sys.modules.get("torch")


def is_torch(array: Any) -> bool:
    torch = _torch()
    return torch is not None and isinstance(array, torch.Tensor)


def device_kind(array: Any) -> str:
    """``"cpu"`` or ``"cuda"`` (or what the framework calls it)."""
    if isinstance(array, np.ndarray):
        return "cpu"
    if is_torch(array):
        return array.device.type
    # DLPack's device types: 1 and 3 (pinned) are host memory, 2 and 13 (managed) are CUDA's.
    kind = int(array.__dlpack_device__()[0])
    return {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}.get(kind, "other")


def argument(name: str, array: Any, expected: Expected, device: str) -> Any:
    """The array as the kernel takes it, sharing its memory.

    Raises ArgumentError naming the argument, what it is, and what is allowed.
    """
    if not isinstance(array, np.ndarray) and not hasattr(array, "__dlpack__"):
        raise ArgumentError(
            f"{name}: {type(array).__name__} is not an array; allowed are NumPy arrays, "
            "PyTorch tensors and others with __dlpack__"
        )
    if device_kind(array) != device:
        raise ArgumentError(f"{name}: is on {device_kind(array)!r}; this kernel runs on {device!r}")
    if isinstance(array, np.ndarray):
        view, strides, pointer = _from_numpy(name, array, expected)
    elif is_torch(array):
        view, strides, pointer = _from_torch(name, array, expected)
    else:
        view, strides, pointer = _from_dlpack(name, array, expected)
    if not _contiguous(expected.shape, strides):
        raise ArgumentError(
            f"{name}: strides {tuple(strides)} are not those of a contiguous array of shape "
            f"{expected.shape}; pass a contiguous copy, or compile for the layout it has "
            "(layout='NHWC' for channels-last memory)"
        )
    if pointer % expected.alignment:
        raise ArgumentError(
            f"{name}: data at {pointer:#x} is not aligned to {expected.alignment} bytes; "
            "pass a copy"
        )
    return view


class Argument:
    """One argument of a kernel, checked at every call: `argument` with all but the array known.

    A PyTorch tensor that fits is seen to fit in half a microsecond. Everything else takes the long
    way, which knows more kinds of arrays and says what is wrong with one.
    """

    def __init__(self, name: str, expected: Expected, device: str):
        self.name, self.expected, self.device = name, expected, device
        self._shape, self._alignment = expected.shape, expected.alignment
        self._on_cuda = device == "cuda"
        self._tensor = None  # torch.Tensor, from the first tensor on: PyTorch is not imported here

    def check(self, array: Any) -> Any:
        """The array as the kernel takes it, sharing its memory. Raises as `argument` does."""
        # Subclasses of tensors may answer as they like, and gradients depend on PyTorch's mode.
        if (
            type(array) is self._tensor
            and array.shape == self._shape
            and array.dtype is self._dtype
            and (array.is_cuda if self._on_cuda else array.is_cpu)
            and array.layout is self._strided
            and array.is_contiguous()
            and not array.requires_grad
            and array.data_ptr() % self._alignment == 0
        ):
            return array
        if self._tensor is None and is_torch(array):
            torch = _torch()
            self._dtype, self._strided = getattr(torch, self.expected.dtype), torch.strided
            self._empty = torch.empty
            self._tensor = torch.Tensor  # the last: another thread may be in the lines above
        return argument(self.name, array, self.expected, self.device)

    def empty_like(self, reference: Any) -> Any:
        """An uninitialised array that fits, of the reference's framework, device and allocator."""
        if type(reference) is self._tensor:
            return self._empty(self._shape, dtype=self._dtype, device=reference.device)
        return empty_like(reference, self.expected)


def _check(name: str, shape, dtype: str, expected: Expected) -> None:
    if tuple(shape) != expected.shape:
        raise ArgumentError(f"{name}: shape {tuple(shape)}; this kernel takes {expected.shape}")
    if dtype != expected.dtype:
        raise ArgumentError(f"{name}: dtype {dtype}; this kernel takes {expected.dtype}")


def _from_numpy(name: str, array: np.ndarray, expected: Expected):
    import tvm_ffi

    _check(name, array.shape, array.dtype.name, expected)
    if not array.dtype.isnative:
        raise ArgumentError(f"{name}: byte order {array.dtype.byteorder!r}; native is allowed")
    strides = [s // array.itemsize for s in array.strides]
    pointer = array.ctypes.data
    if not array.flags.writeable and name != "out":
        # DLPack cannot say "read-only"; a kernel does not write its inputs.
        memory = (ctypes.c_char * array.nbytes).from_address(pointer)
        memory.owner = array
        array = np.lib.stride_tricks.as_strided(
            np.frombuffer(memory, array.dtype), array.shape, array.strides
        )
    if not array.flags.writeable:
        raise ArgumentError(f"{name}: the array is read-only")
    return tvm_ffi.from_dlpack(array), strides, pointer


def _from_torch(name: str, tensor, expected: Expected):
    if tensor.layout != _torch().strided:
        raise ArgumentError(f"{name}: layout {tensor.layout}; this kernel takes torch.strided")
    _check(name, tensor.shape, str(tensor.dtype).removeprefix("torch."), expected)
    if tensor.requires_grad:
        if _torch().is_grad_enabled():
            raise ArgumentError(
                f"{name}: requires grad, and this kernel has no backward; "
                "call it under torch.no_grad() or pass a detached tensor"
            )
        tensor = tensor.detach()
    return tensor, tensor.stride(), tensor.data_ptr()


def _from_dlpack(name: str, array: Any, expected: Expected):
    import tvm_ffi

    view = tvm_ffi.from_dlpack(array)
    _check(name, view.shape, str(view.dtype), expected)
    return view, view.strides, view.data_ptr()


def converted(view: Any) -> Any:
    """What a function of a kernel takes, as the tensor that it would make of it."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(view) if is_torch(view) else view


def _contiguous(shape, strides) -> bool:
    step = 1
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


def empty_like(reference: Any, expected: Expected) -> Any:
    """An uninitialised array of the reference's framework and device, from its own allocator."""
    if is_torch(reference):
        torch = _torch()
        return torch.empty(
            expected.shape, dtype=getattr(torch, expected.dtype), device=reference.device
        )
    if isinstance(reference, np.ndarray):
        return aligned_empty(expected)
    raise ArgumentError(
        f"out: needed for arrays of {type(reference).__name__}; only NumPy's and PyTorch's are "
        "allocated here"
    )


def aligned_empty(expected: Expected) -> np.ndarray:
    """An uninitialised NumPy array that starts on a multiple of `expected.alignment` bytes."""
    dtype = np.dtype(expected.dtype)
    count = math.prod(expected.shape)
    memory = np.empty(count * dtype.itemsize + expected.alignment, np.uint8)
    offset = -memory.ctypes.data % expected.alignment
    return memory[offset : offset + count * dtype.itemsize].view(dtype).reshape(expected.shape)
