"""ConvProblem: one convolution, and everything that follows from its sizes alone."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from math import prod
from typing import Any

from im2win_tvm.descriptor import (
    ProblemError,
    descriptor_name,
    output_extent,
    parse_descriptor,
    write_descriptor,
)

__all__ = ["DTYPES", "LAYOUTS", "ConvProblem", "ProblemError", "descriptor_name"]

#: Bytes an element of every dtype takes.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}

#: Allowed layouts of input and output by number of spatial axes, channels-first one first.
LAYOUTS = {1: ("NCW", "NWC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}


@dataclasses.dataclass(frozen=True)
class ConvProblem:
    """A convolution in PyTorch's words: hashable, valid once made.

    Sizes are in elements. ``input_size`` has one entry per spatial axis (1 to 3 of them, outermost
    first). ``kernel_size``, ``stride``, ``dilation`` are an integer for all axes or one per axis;
    ``padding`` is an integer, one integer per axis, or one (before, after) pair per axis; zeros
    are padded. ``dilation`` 1 is dense. ``layout`` names the axes of input and output (None:
    channels first). After construction every per-axis field is a tuple, ``padding`` a tuple of
    pairs.

    Raises ProblemError (a ValueError) that names the field, its value and what is allowed.
    """

    batch: int
    in_channels: int
    input_size: tuple[int, ...]
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = 1  # type: ignore[assignment]
    padding: tuple[tuple[int, int], ...] = 0  # type: ignore[assignment]
    dilation: tuple[int, ...] = 1  # type: ignore[assignment]
    groups: int = 1
    dtype: str = "float32"
    layout: str = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for field in ("batch", "in_channels", "out_channels", "groups"):
            self._set(field, _integer(field, getattr(self, field), 1))
        size = _entries(self.input_size)
        if size is None or not 1 <= len(size) <= 3:
            raise _error(
                "input_size", self.input_size, "1 to 3 positive integers, one per spatial axis"
            )
        self._set("input_size", tuple(_integer("input_size", entry, 1) for entry in size))
        rank = len(size)
        for field in ("kernel_size", "stride", "dilation"):
            self._set(field, _per_axis(field, getattr(self, field), rank))
        self._set("padding", _padding(self.padding, rank))
        self._check_names()
        self._check_sizes()

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)

    def _check_names(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise _error("dtype", self.dtype, " or ".join(DTYPES))
        allowed = LAYOUTS[self.spatial_rank]
        if self.layout is None:
            self._set("layout", allowed[0])
        if not isinstance(self.layout, str) or self.layout not in allowed:
            raise _error(
                "layout",
                self.layout,
                f"{' or '.join(allowed)} with {self.spatial_rank} spatial axes",
            )

    def _check_sizes(self) -> None:
        for field in ("in_channels", "out_channels"):
            if getattr(self, field) % self.groups:
                raise _error(
                    "groups", self.groups, f"a divisor of {field}, which is {getattr(self, field)}"
                )
        for axis, (extent, padded) in enumerate(
            zip(self.kernel_extent, self.padded_size, strict=True)
        ):
            if extent > padded:
                raise _error(
                    "kernel_size",
                    self.kernel_size,
                    f"at most {padded} on axis {axis}, the padded input; dilated it is {extent}",
                )

    @property
    def spatial_rank(self) -> int:
        """Number of spatial axes, 1 to 3."""
        return len(self.input_size)

    @property
    def channels_last(self) -> bool:
        """Whether channels are the innermost axis of input and output."""
        return self.layout.endswith("C")

    @property
    def kernel_extent(self) -> tuple[int, ...]:
        """Input elements from the first to the last tap, per axis."""
        return tuple(
            step * (taps - 1) + 1
            for taps, step in zip(self.kernel_size, self.dilation, strict=True)
        )

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Input size with its padding, per axis."""
        return tuple(
            size + before + after
            for size, (before, after) in zip(self.input_size, self.padding, strict=True)
        )

    @cached_property  # models of the time ask for it thousands of times
    def output_size(self) -> tuple[int, ...]:
        """Outputs per spatial axis."""
        return tuple(
            output_extent(size, kernel, stride, sum(pair), dilation)
            for size, kernel, stride, pair, dilation in zip(
                self.input_size,
                self.kernel_size,
                self.stride,
                self.padding,
                self.dilation,
                strict=True,
            )
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input in the problem's layout."""
        return self._shape(self.in_channels, self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output in the problem's layout."""
        return self._shape(self.out_channels, self.output_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weights, PyTorch's in every layout: (Co, Ci / groups, *kernel)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def _shape(self, channels: int, size: tuple[int, ...]) -> tuple[int, ...]:
        if self.channels_last:
            return (self.batch, *size, channels)
        return (self.batch, channels, *size)

    @property
    def itemsize(self) -> int:
        """Bytes an element of input, weights and output takes."""
        return DTYPES[self.dtype]

    @property
    def k(self) -> int:
        """Products summed into one output: input channels of a group times kernel taps."""
        return self.in_channels // self.groups * prod(self.kernel_size)

    @property
    def flops(self) -> int:
        """Floating-point operations, 2 a multiply-add; taps on padding count, as is the custom."""
        return 2 * prod(self.output_shape) * self.k

    @cached_property
    def min_bytes(self) -> int:
        """Bytes that any implementation moves: input and weights read, output written, once."""
        elements = prod(self.input_shape) + prod(self.weight_shape) + prod(self.output_shape)
        return elements * self.itemsize

    @property
    def arithmetic_intensity(self) -> float:
        """Floating-point operations a byte of ``min_bytes``."""
        return self.flops / self.min_bytes

    @property
    def im2win_elements(self) -> int:
        """Elements of the im2win tensor.

        In 2-D N * C * Ho * Hf * Wpadded: the overlap of the outer axes is copied, that of the
        innermost axis is reused in place.
        """
        copied = prod(self.output_size[:-1]) * prod(self.kernel_size[:-1])
        return self.batch * self.in_channels * copied * self.padded_size[-1]

    @property
    def im2col_elements(self) -> int:
        """Elements of the im2col matrix: N * C * outputs * kernel taps."""
        copied = prod(self.output_size) * prod(self.kernel_size)
        return self.batch * self.in_channels * copied

    def replace(self, **changes: Any) -> ConvProblem:
        """A copy with other fields, validated anew.

        Raises ProblemError for an unknown field or a value that is not allowed. Changing the
        number of axes takes every per-axis field and ``layout``.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for field, value in changes.items():
            if field not in known:
                raise _error(field, value, f"the fields {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    @classmethod
    def parse(cls, text: str, *, dtype: str = "float32", layout: str | None = None) -> ConvProblem:
        """The problem that a oneDNN descriptor such as ``mb128ic64ih56oc64kh3ph1`` describes.

        The rules are those of :mod:`im2win_tvm.descriptor`. Raises ProblemError that shows the
        text.
        """
        fields = parse_descriptor(text)
        try:
            return cls(**fields, dtype=dtype, layout=layout)  # type: ignore[arg-type]
        except ProblemError as error:
            raise ProblemError(f"problem {text!r}: {error}") from None

    def __str__(self) -> str:
        """The shortest oneDNN descriptor, without dtype and layout.

        ``parse`` of it computes the same outputs. It gives an equal problem unless the padding is
        uneven and some other trailing padding has the same output size: then trailing padding is
        the leading one where that fits, else only as much as is read.
        """
        return write_descriptor(self)


def _error(field: str, value: object, allowed: str) -> ProblemError:
    return ProblemError(f"{field}={value!r}: allowed: {allowed}")


def _integer(field: str, value: object, least: int) -> int:
    """``value`` as an int of at least ``least``; bool is refused, NumPy integers are not."""
    number = least - 1
    if not isinstance(value, bool):
        with suppress(TypeError):  # not a whole number: refused below
            number = operator.index(value)  # type: ignore[arg-type]
    if number < least:
        kind = "a positive integer" if least == 1 else "an integer of 0 or more"
        raise _error(field, value, kind)
    return number


def _entries(value: object) -> tuple[Any, ...] | None:
    """The entries of a sequence, None for everything else."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | dict | set):
        try:
            return tuple(value)
        except TypeError:  # a 0-d array calls itself iterable
            return None
    return None


def _per_axis(field: str, value: object, rank: int) -> tuple[int, ...]:
    entries = _entries(value)
    if entries is None:
        return (_integer(field, value, 1),) * rank
    if len(entries) != rank:
        raise _error(field, value, f"one integer, or {rank}: one per spatial axis")
    return tuple(_integer(field, entry, 1) for entry in entries)


def _padding(value: object, rank: int) -> tuple[tuple[int, int], ...]:
    entries = _entries(value)
    if entries is None:
        number = _integer("padding", value, 0)
        return ((number, number),) * rank
    allowed = f"an integer, or {rank} integers or (before, after) pairs: one per spatial axis"
    if len(entries) != rank:
        raise _error("padding", value, allowed)
    pairs = []
    for entry in entries:
        pair = _entries(entry)
        if pair is None:
            pair = (entry, entry)
        elif len(pair) != 2:
            raise _error("padding", value, allowed)
        pairs.append((_integer("padding", pair[0], 0), _integer("padding", pair[1], 0)))
    return tuple(pairs)
