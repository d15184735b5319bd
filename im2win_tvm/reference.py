"""The convolution in float64 NumPy, kernel tap by kernel tap: what kernels are checked against."""

from __future__ import annotations

import math
from itertools import product
from math import prod

import numpy as np

from im2win_tvm.problem import ConvProblem

__all__ = ["conv2d"]

# Small enough for a last-level cache, which every tap goes over once more.
_CHUNK_BYTES = 16 << 20


def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    problem: ConvProblem,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: str | None = None,
) -> np.ndarray:
    """activation(conv(x, w) + bias + residual), accumulated in float64.

    ``x`` has ``problem.input_shape``, ``w`` has ``problem.weight_shape``, ``bias`` (Co,),
    ``residual`` ``problem.output_shape``; any real dtype. ``activation`` is None, "relu",
    "relu6" or "gelu". One to three spatial axes, despite the name. Returns float64 of
    ``problem.output_shape``.
    Temporaries take some 16 MiB, or what one image needs where that is more.

    Every tap counts, those on padding as a product with zero, so an infinite or NaN weight makes
    NaN at the border. Raises ValueError that names the argument.
    """
    _require_shape("x", x, problem.input_shape)
    _require_shape("w", w, problem.weight_shape)
    if bias is not None:
        _require_shape("bias", bias, (problem.out_channels,))
    if residual is not None:
        _require_shape("residual", residual, problem.output_shape)
    if activation not in (None, "relu", "relu6", "gelu"):
        raise ValueError(f"activation={activation!r}: allowed: None, 'relu', 'relu6' or 'gelu'")

    output = np.empty(problem.output_shape, np.float64)
    # Views with channels last, whatever the layout.
    source = x if problem.channels_last else np.moveaxis(x, 1, -1)
    target = output if problem.channels_last else np.moveaxis(output, 1, -1)
    weights = _weights_by_tap(w, problem)
    per_image = 8 * (
        prod(problem.padded_size) * problem.in_channels
        + prod(problem.output_size) * (problem.in_channels + 2 * problem.out_channels)
    )
    step = max(1, _CHUNK_BYTES // per_image)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, problem.batch, step):
            images = slice(start, start + step)
            target[images] = _convolve(source[images], weights, problem)
            if bias is not None:
                target[images] += np.asarray(bias, np.float64)
            if residual is not None:
                output[images] += residual[images]
            if activation == "gelu":
                output[images] *= 0.5 * (1 + _erf(output[images] / np.sqrt(2)))
            elif activation is not None:
                np.maximum(output[images], 0.0, out=output[images])
            if activation == "relu6":
                np.minimum(output[images], 6.0, out=output[images])
    return output


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _require_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise ValueError(f"{name} of shape {np.shape(array)}: allowed: {shape}")


def _weights_by_tap(w: np.ndarray, problem: ConvProblem) -> np.ndarray:
    """Weights as float64 (taps, groups, Ci / groups, Co / groups)."""
    groups = problem.groups
    filters, channels, *_ = problem.weight_shape
    split = np.asarray(w, np.float64).reshape(groups, filters // groups, channels, -1)
    return np.ascontiguousarray(split.transpose(3, 0, 2, 1))


def _convolve(images: np.ndarray, weights: np.ndarray, problem: ConvProblem) -> np.ndarray:
    """Convolution of channels-last ``images``; float64 (n, *output_size, Co)."""
    n, groups, sizes = len(images), problem.groups, problem.output_size
    pixels = n * prod(sizes)
    padded = np.zeros((n, *problem.padded_size, problem.in_channels), np.float64)
    interior = tuple(
        slice(before, before + size)
        for (before, _), size in zip(problem.padding, problem.input_size, strict=True)
    )
    padded[(slice(None), *interior)] = images
    total = np.zeros((groups, pixels, problem.out_channels // groups), np.float64)
    for tap, at in enumerate(product(*map(range, problem.kernel_size))):
        window = tuple(
            slice(u * dilation, u * dilation + (size - 1) * stride + 1, stride)
            for u, dilation, stride, size in zip(
                at, problem.dilation, problem.stride, sizes, strict=True
            )
        )
        seen = padded[(slice(None), *window)].reshape(pixels, groups, -1)
        total += np.matmul(seen.transpose(1, 0, 2), weights[tap])
    return total.transpose(1, 0, 2).reshape(n, *sizes, problem.out_channels)
