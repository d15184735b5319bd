"""Tensors for a problem, and whether a result is right: how to try a kernel, not on what."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod, sqrt
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from im2win_tvm.accuracy import TF32, accepted
from im2win_tvm.problem import ConvProblem

__all__ = [
    "KINDS",
    "CheckResult",
    "Limits",
    "Tensors",
    "check",
    "fill",
    "from_torch",
    "poisoned",
    "rounding_limits",
    "to_torch",
]

#: How tensors are filled: unit-scale outputs, or integers whose every sum is exact.
KINDS = ("normal", "integer")

_EPS32 = float(np.finfo(np.float32).eps)
# Types of two bytes: what they round outputs by, and to.
_EPS = {dtype: float(ml_dtypes.finfo(dtype).eps) for dtype in ("float16", "bfloat16")}
_TINY = {dtype: float(ml_dtypes.finfo(dtype).smallest_subnormal) for dtype in _EPS}
# What cutting a float32 to TF32's 10 bits of the fraction takes away of it, at most.
_CUT = 2.0**-10
# From here on float16 rounds to infinity; bfloat16 has float32's range.
_OVERFLOW16 = 65520.0
# Largest integer up to which all are exact: in float32 sums, and in an output of two bytes.
_EXACT = {"float32": 1 << 24, "float16": 1 << 11, "bfloat16": 1 << 8}
# Largest |x| and |w|. Smaller ones leave a sum of few exact integers room for more products.
_LARGEST = {"float32": (4, 4), "float16": (2, 2), "bfloat16": (2, 1)}
_LARGEST_ADDEND = 8  # |bias| and |residual|
# Fewer outputs than this might all cancel to zero if signs were random.
_FEW_OUTPUTS = 64
_CHECK_CHUNK = 1 << 22  # elements looked at together: bounds the temporaries of a check


class Tensors(NamedTuple):
    """Operands of one convolution in the problem's dtype.

    ``x`` (problem.input_shape), ``w`` (problem.weight_shape), ``bias`` (Co,) or None,
    ``residual`` (problem.output_shape) or None; all C-contiguous.
    """

    x: np.ndarray
    w: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None


class Limits(NamedTuple):
    """Allowed error of an element, ``floor + share * |expected|``, and relative norm of all."""

    floor: float
    share: float
    norm: float


class CheckResult(NamedTuple):
    """``ok``; ``max_error`` absolute, infinite where a value is not finite; ``message``."""

    ok: bool
    max_error: float
    message: str


def fill(
    problem: ConvProblem,
    kind: str = "normal",
    seed: int = 0,
    bias: bool = False,
    residual: bool = False,
) -> Tensors:
    """Random tensors for ``problem``; equal values at equal coordinates in every layout.

    "normal": x, bias and residual are of unit variance, w of variance 1/K, so that outputs are of
    unit scale. "integer": small integers such that every partial sum, bias and residual
    included, is exact in float32 and in a shorter output (at most 2048 in float16, 256 in
    bfloat16); weights are thinned out where K is too large for that. Outputs are all zero only
    where every window lies in the padding. Raises ValueError for an unknown ``kind``.
    """
    _require_kind(kind)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4)]
    logical_in = (problem.batch, problem.in_channels, *problem.input_size)
    logical_out = (problem.batch, problem.out_channels, *problem.output_size)
    shapes = (logical_in, problem.weight_shape, (problem.out_channels,), logical_out)
    wanted = (True, True, bias, residual)
    made: list[np.ndarray | None] = []
    for position, (stream, shape, want) in enumerate(zip(streams, shapes, wanted, strict=True)):
        if not want:
            made.append(None)
        elif kind == "normal":
            scale = 1 / sqrt(problem.k) if position == 1 else 1.0
            made.append(_normal(stream, shape, problem.dtype, scale))
        elif position == 1:
            made.append(_integer_weights(stream, problem))
        else:
            largest = _LARGEST[problem.dtype][0] if position == 0 else _LARGEST_ADDEND
            made.append(_integers(stream, shape, largest, problem))
    x, w, added_bias, added_residual = made
    return Tensors(_laid_out(x, problem), w, added_bias, _laid_out(added_residual, problem))


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of NaN: an output buffer in which elements never written show."""
    return np.full(shape, np.nan, dtype)


def to_torch(array: np.ndarray) -> Any:
    """A PyTorch tensor over the array's memory; bfloat16, which PyTorch does not take, by bits."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_torch(tensor: Any) -> np.ndarray:
    """A PyTorch tensor's values on the host, in its dtype: the way back of `to_torch`."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)
    return tensor.cpu().numpy()


def check(
    actual: np.ndarray,
    expected64: np.ndarray,
    problem: ConvProblem,
    kind: str,
    accuracy: str | None = None,
) -> CheckResult:
    """Whether a kernel's output is right, given the float64 reference.

    ``actual`` has problem.output_shape and problem.dtype; ``expected64`` the same shape, float64.
    "integer" asks for equality. "normal" allows what summing K products of :func:`fill`'s tensors
    in float32 in any order rounds off, by element and over all (relative Frobenius norm), and for
    float16 and bfloat16 the rounding of the output too; TF32 or half-precision sums do not pass
    as float32. ``accuracy`` is the kernel's class (None: the dtype's own); "tf32" allows what
    operands of 10 bits leave, and those of bfloat16 do not pass. An output that is mostly zero
    where the reference is not fails. The message of a failure names the worst index, both values
    and how many are wrong. Raises ValueError for an
    unknown ``kind``, a class that the dtype does not have, and a reference of another shape.
    """
    _require_kind(kind)
    if np.shape(expected64) != problem.output_shape:
        raise ValueError(
            f"expected64 of shape {np.shape(expected64)}: allowed: {problem.output_shape}"
        )
    if np.shape(actual) != problem.output_shape or actual.dtype != problem.dtype:
        return CheckResult(
            False,
            float("inf"),
            f"output is {actual.dtype} of shape {np.shape(actual)}, "
            f"not {problem.dtype} of shape {problem.output_shape}",
        )
    floor, share, norm_limit = _limits(expected64, problem, kind, accuracy)
    wrong, worst, worst_at, max_error = 0, -np.inf, 0, 0.0
    nonzero_actual = nonzero_expected = 0
    error_squares = expected_squares = 0.0
    for start, a, e in _chunks(actual, expected64):
        if problem.dtype == "float16":
            e = np.where(np.abs(e) >= _OVERFLOW16, np.copysign(np.inf, e), e)
        same = (a == e) | (np.isnan(a) & np.isnan(e))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(a - e))
        error[np.isnan(error)] = np.inf
        magnitude = np.where(np.isfinite(e), np.abs(e), 0.0)
        excess = error - (floor + share * magnitude)
        wrong += int(np.count_nonzero(excess > 0))
        at = int(np.argmax(excess))
        if excess[at] > worst:
            worst, worst_at = float(excess[at]), start + at
        max_error = max(max_error, float(error.max()))
        nonzero_actual += int(np.count_nonzero(a))
        nonzero_expected += int(np.count_nonzero(e))
        error_squares += float(np.dot(error, error))
        expected_squares += float(np.dot(magnitude, magnitude))
    index = tuple(int(i) for i in np.unravel_index(worst_at, problem.output_shape))
    seen = f"at {index}: {actual[index].item()}, expected {expected64[index].item()}"
    if wrong:
        return CheckResult(
            False, max_error, f"{wrong} of {actual.size} outputs are wrong, worst {seen}"
        )
    if 2 * nonzero_actual < nonzero_expected:
        return CheckResult(
            False,
            max_error,
            f"{actual.size - nonzero_actual} of {actual.size} outputs are zero, "
            f"expected {actual.size - nonzero_expected}",
        )
    norm = sqrt(error_squares / expected_squares) if expected_squares else 0.0
    if norm > norm_limit:
        return CheckResult(
            False,
            max_error,
            f"relative error of all outputs {norm:.3g} is above {norm_limit:.3g}, worst {seen}",
        )
    return CheckResult(
        True, max_error, f"largest error {max_error:.3g}, relative over all {norm:.3g}"
    )


def _require_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed: {' or '.join(KINDS)}")


def _normal(
    stream: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0
) -> np.ndarray:
    values = stream.standard_normal(shape, np.float32)
    values *= np.float32(scale)
    return values.astype(dtype, copy=False)


def _integers(
    stream: np.random.Generator, shape: tuple[int, ...], largest: int, problem: ConvProblem
) -> np.ndarray:
    """Integers of 1 to ``largest`` in the problem's dtype, of either sign unless outputs are few.

    No zeros: a zero would hide a wrong weight.
    """
    values = stream.integers(1, largest + 1, shape, np.int8)
    if prod(problem.output_shape) >= _FEW_OUTPUTS:
        values *= 2 * stream.integers(0, 2, shape, np.int8) - 1
    return values.astype(problem.dtype)


def _integer_weights(stream: np.random.Generator, problem: ConvProblem) -> np.ndarray:
    largest_x, largest_w = _LARGEST[problem.dtype]
    room = _EXACT[problem.dtype] - 2 * _LARGEST_ADDEND
    products = room // (largest_x * largest_w)
    weights = _integers(stream, problem.weight_shape, largest_w, problem)
    if problem.k > products:
        rows = weights.reshape(problem.out_channels, problem.k)
        for row in rows:
            # Other places in every filter, so that together they cover all taps.
            row[stream.permutation(problem.k)[products:]] = 0
    return weights


def _laid_out(values: np.ndarray | None, problem: ConvProblem) -> np.ndarray | None:
    """Channels-first values in the problem's layout."""
    if values is None or not problem.channels_last:
        return values
    return np.ascontiguousarray(np.moveaxis(values, 1, -1))


def _chunks(
    actual: np.ndarray, expected64: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(first flat index, actual, expected) pieces as float64."""
    flat_actual, flat_expected = actual.reshape(-1), expected64.reshape(-1)
    for start in range(0, flat_actual.size, _CHECK_CHUNK):
        piece = slice(start, start + _CHECK_CHUNK)
        yield start, flat_actual[piece].astype(np.float64), flat_expected[piece]


def rounding_limits(problem: ConvProblem, scale: float, accuracy: str | None = None) -> Limits:
    """What rounding may do to outputs of :func:`fill`'s "normal" tensors.

    ``scale`` is the root mean square of the exact outputs, ``accuracy`` the kernel's class (None:
    the dtype's own). Raises AccuracyError for a class that the dtype does not have.
    """
    rounded = accepted(problem.dtype, accuracy)[0] == TF32
    # Rounding errors of a float32 sum walk at random. Added one product after the other their
    # deviation is some 0.15 eps sqrt(K) of the outputs' scale and the worst of 20000 sums is off
    # by a third of this limit; the errors of TF32 products are far outside.
    walk = 4 * _EPS32 * sqrt(problem.k)
    norm = 4 * _EPS32 + _EPS32 * sqrt(problem.k)
    if problem.dtype in _EPS:
        # One rounding of the output, and tensor cores cut partial sums off instead of rounding.
        eps, tiny = _EPS[problem.dtype], _TINY[problem.dtype]
        return Limits(2 * walk * scale + tiny, eps, 2 * norm + eps / 2)
    if rounded:
        # An operand loses up to _CUT of its value where bits are cut off, 0.36 of that in the mean;
        # rounded to nearest, up to half of _CUT and of either sign. A product loses what both do.
        # To the nearest, the errors of K products walk at random: relative norm 0.30 _CUT whatever
        # K is, and 2.93e-4 is what cuDNN's TF32 has. Cut off, every output loses 0.72 _CUT and
        # 0.32 _CUT of the scale walks: norm 0.79 _CUT. The limits of norm and share are the most
        # that one product loses; bfloat16 operands have a norm of 2.4 _CUT. Beyond its share the
        # worst of 200000 outputs is off by 2.4 _CUT of the scale with two products, by less with
        # more of them.
        return Limits((6 * _CUT + 2 * walk) * scale, 2 * _CUT, 2 * _CUT + 2 * norm)
    return Limits(walk * scale, 4 * _EPS32, norm)


def _limits(
    expected64: np.ndarray, problem: ConvProblem, kind: str, accuracy: str | None
) -> Limits:
    if kind == "integer":
        return Limits(0.0, 0.0, 0.0)
    squares, count = 0.0, 0
    for _, _, e in _chunks(expected64, expected64):
        finite = e[np.isfinite(e)]
        squares += float(np.dot(finite, finite))
        count += finite.size
    return rounding_limits(problem, sqrt(squares / count) if count else 0.0, accuracy)
