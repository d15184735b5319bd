"""``torch.ops.im2win.conv2d``: PyTorch's operator, and what PyTorch has to know of it.

Kernels are compiled at the first call of a problem, and kept on disk (see
`im2win_tvm.kernel_cache`). What no kernel takes, or cannot be compiled here, PyTorch computes; a
FallbackWarning says so once for each problem.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import NamedTuple

import torch
from torch import library
from torch.autograd import forward_ad

from ..accuracy import OWN, TF32, AccuracyError, accepted
from ..arrays import ArgumentError
from ..epilogue import Epilogue
from ..kernel import Kernel
from ..kernel_cache import KernelCache
from ..problem import ConvProblem
from ..target import TargetError, resolve
from .direct import nothing_between
from .weights import Cast, Prepared

__all__ = ["CACHE", "FallbackWarning", "conv2d", "kernel_of"]

NAME = "im2win::conv2d"
#: Kernels of all calls.
CACHE = KernelCache()
# Data of PyTorch's own tensors is aligned to more; views may begin anywhere.
_ALIGNMENT = 16

library.define(
    NAME,
    "(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1, str? accuracy=None, bool constant_weight=False) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class FallbackWarning(UserWarning):
    """A convolution that PyTorch computes, and why."""


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    accuracy: str | None = None,
    constant_weight: bool = False,
) -> torch.Tensor:
    """As `torch.nn.functional.conv2d`, for a batch of images and zero padding by numbers.

    input: ``[N, Ci, H, W]``, contiguous or in channels_last format, which the output ``[N, Co, Ho,
    Wo]`` has too; any other is copied. weight: ``[Co, Ci / groups, Kh, Kw]``; bias: ``[Co]``; all
    of one dtype: float32, float16 or bfloat16. accuracy: as in `im2win_tvm.compile`, which raises
    AccuracyError for one that the dtype does not have. Derivatives are PyTorch's; in forward mode
    (`torch.func.jvp`) the output is, too. `torch.func.grad` of it is refused by PyTorch.
    constant_weight: the weight is brought into the kernel's order once, and again when PyTorch has
    counted a change of it; changes by way of ``weight.data`` are not counted and not seen. A CUDA
    graph may go on with the weight as it was at its capture: capture it again after a change. What
    it reads is kept for as long as the weight, which must outlive the graph.
    """
    if not type(stride) is type(padding) is type(dilation) is tuple:
        stride, padding, dilation = (
            (int(value),) * 2 if isinstance(value, Integral) else value
            for value in (stride, padding, dilation)
        )
    if nothing_between(input, weight, bias):
        return _computed(
            input, weight, bias, stride, padding, dilation, groups, accuracy, constant_weight
        )
    return torch.ops.im2win.conv2d(
        input, weight, bias, stride, padding, dilation, groups, accuracy, constant_weight
    )


class _Call(NamedTuple):
    """What decides on a kernel."""

    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    accuracy: str | None
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def problem(self) -> ConvProblem:
        batch, channels, *size = self.shape
        return ConvProblem(
            batch,
            channels,
            tuple(size),
            self.weight_shape[0],
            self.weight_shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            str(self.dtype).removeprefix("torch."),
            "NHWC" if self.channels_last else "NCHW",
        )

    def kernel(self) -> Kernel | str:
        """Or why there is none, after a warning."""
        try:
            target = resolve("llvm" if self.device.type == "cpu" else self.device.type)
            if self.device.type == "cuda":
                _check_architecture(self.device)
            return CACHE.get(
                self.problem(), target, accuracy=self.accuracy, epilogue=Epilogue(self.bias)
            )
        except AccuracyError:
            raise
        except Exception as error:  # whatever is missing or failed, PyTorch can do it
            warnings.warn(
                f"PyTorch computes the convolution of {self.shape} with {self.weight_shape}, "
                f"{self.dtype} on {self.device}: {error}",
                FallbackWarning,
                stacklevel=2,
            )
            return str(error)


def _check_architecture(device: torch.device) -> None:
    """Raise TargetError where kernels for the first device do not run on this one."""
    first, here = (torch.cuda.get_device_capability(each) for each in (0, device))
    if first != here:
        raise TargetError(
            f"{device}: compute capability {here}; allowed is that of the first device, {first}"
        )


# With the shape of the output.
_kernels: dict[_Call, tuple[Kernel | str, tuple[int, ...]]] = {}
_guard = threading.Lock()


def kernel_of(input, weight, bias, stride, padding, dilation, groups, accuracy) -> Kernel | str:
    """The kernel of a call with these operands, or why there is none."""
    operands = input, weight, bias, stride, padding, dilation, groups, accuracy
    return _found(*operands, _is_channels_last(input))[0]


def _found(input, weight, bias, stride, padding, dilation, groups, accuracy, channels_last):
    """`kernel_of` these operands, and the shape of the output."""
    call = _Call(
        tuple(input.shape), tuple(weight.shape), bias is not None, tuple(stride), tuple(padding),
        tuple(dilation), groups, accuracy, input.dtype, input.device, channels_last,
    )  # fmt: skip
    found = _kernels.get(call)
    if found is None:
        _check_numbers(groups, stride=stride, padding=padding, dilation=dilation)
        _check(input, weight, bias, groups)
        made = call.kernel(), _output_shape(input, weight, stride, padding, dilation)
        with _guard:
            found = _kernels.setdefault(call, made)
    return found


_PREPARED = Prepared()


@contextmanager
def _classes(accuracy: str | None) -> Iterator[None]:
    """Keep PyTorch in float32's own class where that was asked for by name: cuDNN takes TF32."""
    if accuracy in (None, TF32):
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _is_channels_last(x: torch.Tensor) -> bool:
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _rows_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def _pytorchs(x, w, b, stride, padding, dilation, groups, accuracy) -> torch.Tensor:
    """The same by PyTorch."""
    with _classes(accuracy):
        y = torch.ops.aten.convolution(x, w, b, stride, padding, dilation, False, (0, 0), groups)
    return y.contiguous(
        memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    )


def _computed(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    accuracy=None, constant_weight=False,
):  # fmt: skip
    x, w, b = (
        t.detach() if t is not None and t.requires_grad else t for t in (input, weight, bias)
    )
    channels_last = _is_channels_last(x)
    if not channels_last:
        x = x.contiguous()
    kernel = "it is empty"
    if x.numel() and w.numel():
        kernel, shape = _found(x, w, b, stride, padding, dilation, groups, accuracy, channels_last)
    others = (w,) if b is None else (w, b)
    if isinstance(kernel, str) or any(t.dtype != x.dtype or t.device != x.device for t in others):
        _check(x, w, b, groups)
        return _pytorchs(x, w, b, stride, padding, dilation, groups, accuracy)
    if x.data_ptr() % _ALIGNMENT:
        x = x.clone()
    y = torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    with nullcontext() if _is_here(x) else torch.cuda.device_of(x):
        w = _PREPARED.get(kernel, w) if constant_weight else w.contiguous()
        given, out = (_rows_last(x), _rows_last(y)) if channels_last else (x, y)
        try:
            kernel.into_new(given, w, b if b is None else b.contiguous(), out)
        except ArgumentError as error:
            _check(x, weight, bias, groups)
            # Checked: whatever is left is a fault of ours.
            raise RuntimeError(f"im2win::conv2d: {error}") from error
    return y


library.impl(NAME, ("cpu", "cuda"), _computed)


def _is_here(x: torch.Tensor) -> bool:
    """Whether the device of a tensor is the current one."""
    return not x.is_cuda or x.get_device() == torch.cuda.current_device()


def _check_numbers(groups, **pairs) -> None:
    """Raise RuntimeError for strings, floats and other than two numbers.

    Nobody else has where the dispatcher was left out, and 1.0 would be found as 1 is.
    """
    for name, value in pairs.items():
        least = 0 if name == "padding" else 1
        if len(value) != 2 or not all(isinstance(n, Integral) and n >= least for n in value):
            raise RuntimeError(
                f"im2win::conv2d: {name}={value!r}: allowed are two whole numbers from {least}"
            )
    if not isinstance(groups, Integral):
        raise RuntimeError(f"im2win::conv2d: groups={groups!r}: allowed is a whole number")


def _check(x, weight, bias, groups) -> None:
    """Raise RuntimeError, as PyTorch's operators do, for operands that do not fit."""
    if x.dim() != 4 or weight.dim() != 4:
        raise RuntimeError(
            f"im2win::conv2d: input of {x.dim()} and weight of {weight.dim()} dimensions: "
            "allowed are 4"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"im2win::conv2d: input has {x.shape[1]} channels; weight and groups={groups} take "
            f"{weight.shape[1] * groups}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (x.dtype, x.device):
            raise RuntimeError(
                f"im2win::conv2d: {name} is {tensor.dtype} on {tensor.device}, input {x.dtype} "
                f"on {x.device}"
            )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(
            f"im2win::conv2d: bias of shape {tuple(bias.shape)}: allowed is ({weight.shape[0]},)"
        )


def _output_shape(x, weight, stride, padding, dilation) -> tuple:
    size = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    )
    return (x.shape[0], weight.shape[0], *size)


@library.register_fake(NAME)
def _fake(
    input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    accuracy=None, constant_weight=False,
):  # fmt: skip
    _check(input, weight, bias, groups)
    return input.new_empty(_output_shape(input, weight, stride, padding, dilation)).to(
        memory_format=torch.channels_last if _is_channels_last(input) else torch.contiguous_format
    )


def _keep(ctx, inputs, output) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.channels = None if bias is None else [weight.shape[0]]


def _backward(ctx, gradient):
    """By PyTorch's own backward of a convolution."""
    x, weight = ctx.saved_tensors
    # PyTorch leaves out what was not given.
    wanted = [*ctx.needs_input_grad[:2], ctx.channels is not None and ctx.needs_input_grad[2]]
    gradients = torch.ops.aten.convolution_backward(
        gradient, x, weight, ctx.channels, ctx.stride, ctx.padding, ctx.dilation, False, [0, 0],
        ctx.groups, wanted,
    )  # fmt: skip
    return (*gradients, *[None] * 6)


def _gradients():
    """What `library.register_autograd` registers; None for a PyTorch that has it elsewhere."""
    try:
        from torch._library.autograd import Info, make_autograd_impl
    except ImportError:
        return None
    return make_autograd_impl(torch.ops.im2win.conv2d.default, Info(_backward, _keep))


_graded = _gradients()


def _derived(
    keys, input, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1,
    accuracy=None, *rest,
):  # fmt: skip
    """In forward mode by PyTorch's own convolution and its derivative."""
    if forward_ad._current_level >= 0 and any(  # of nested `dual_level`s, from 0
        t is not None and forward_ad.unpack_dual(t).tangent is not None
        for t in (input, weight, bias)
    ):
        _check_numbers(groups, stride=stride, padding=padding, dilation=dilation)
        _check(input, weight, bias, groups)
        dtype = str(input.dtype).removeprefix("torch.")
        if dtype in OWN:
            accepted(dtype, accuracy)
        return _pytorchs(input, weight, bias, stride, padding, dilation, groups, accuracy)
    return _graded(keys, input, weight, bias, stride, padding, dilation, groups, accuracy, *rest)


_LIBRARY = library.Library("im2win", "FRAGMENT")
if _graded is None:
    library.register_autograd(NAME, _backward, setup_context=_keep)
else:
    # It drops tangents without a word where no gradient is wanted, and the operator's function no
    # longer sees those of torch.func.jvp.
    _LIBRARY.impl("conv2d", _derived, "Autograd", with_keyset=True)

_CAST = Cast()
_CONSTANT_WEIGHT = 5  # its place among the arguments after the tensors


def _autocast(device: str):
    def cast(input, weight, bias=None, *rest):
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device)
            if len(rest) > _CONSTANT_WEIGHT and rest[_CONSTANT_WEIGHT]:
                weight = _CAST.get(weight, dtype)
            # As PyTorch does: float64 stays.
            tensors = (
                t if t is None or t.dtype == torch.float64 else t.to(dtype)
                for t in (input, weight, bias)
            )
            return torch.ops.im2win.conv2d(*tensors, *rest)

    return cast


for _device in ("cpu", "cuda"):
    _LIBRARY.impl("conv2d", _autocast(_device), f"Autocast{_device.upper()}")


@library.register_vmap(NAME)
def _vmap(info, in_dims, input, weight, bias=None, *rest):
    """Over inputs: their batches are one. Over weights it is refused."""
    if any(dim is not None for dim in in_dims[1:3]):
        raise RuntimeError(
            "im2win::conv2d: vmap over weight or bias: allowed is vmap over input; call "
            "torch.nn.functional.conv2d"
        )
    x = input.movedim(in_dims[0], 0)
    y = torch.ops.im2win.conv2d(x.flatten(0, 1), weight, bias, *rest)
    return y.unflatten(0, x.shape[:2]), 0
