"""What the fp32 class is measured by: data that is hard to add up, and a chain of fma."""

import numpy as np

DATA = {
    "normal": lambda r, x, w: (x, w),
    "relu": lambda r, x, w: (np.maximum(x, 0), w),
    "positive": lambda r, x, w: (np.abs(x), np.abs(w)),
    "cancellation": lambda r, x, w: (1 + x / 256, w - w.mean(axis=(1, 2, 3), keepdims=True)),
    "2^+-20 over elements": lambda r, x, w: (x * np.exp2(r.integers(-10, 11, x.shape)), w),
    "2^+-20 over images": lambda r, x, w: (x * np.exp2(r.integers(-20, 21, (len(x), 1, 1, 1))), w),
    "2^+-40 over images": lambda r, x, w: (x * np.exp2(r.integers(-40, 41, (len(x), 1, 1, 1))), w),
    "2^+-40 over outputs": lambda r, x, w: (x, w * np.exp2(r.integers(-40, 41, (len(w), 1, 1, 1)))),
    "times 1e36": lambda r, x, w: (x * 1e36, w * 1e-2),
    "times 1e-33": lambda r, x, w: (x * 1e-33, w),
    "denormal": lambda r, x, w: (x * 1e-39, w),
}


def data(kind: str, problem, seed: int = 0):
    """x and w of a problem in NHWC, float32."""
    chance = np.random.default_rng(seed)
    x = chance.standard_normal(problem.input_shape)
    w = chance.standard_normal(problem.weight_shape) / problem.k**0.5
    x, w = DATA[kind](chance, x, w)
    return x.astype(np.float32), w.astype(np.float32)


def fma_chain(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b^T of float32 rows, by one fma after the other: a product of two is exact in float64."""
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        products = np.outer(a[:, k].astype(np.float64), b[:, k].astype(np.float64))
        total = (total.astype(np.float64) + products).astype(np.float32)
    return total


def windows(x: np.ndarray, problem) -> np.ndarray:
    """The rows of the im2win matrix of NHWC, ``[N Ho Wo, C Hf Wf]``; stride, padding, no groups."""
    (top, bottom), (left, right) = problem.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(padded, problem.kernel_size, axis=(1, 2))
    views = views[:, :: problem.stride[0], :: problem.stride[1]]
    return np.ascontiguousarray(views).reshape(-1, problem.k)


def rms(error: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.square(error).sum() / np.square(exact).sum()))


# --- The arithmetic of the kernel on tensor cores as they add: truncating


def halves(x: np.ndarray, axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """high, low and scale of blocks along an axis."""
    largest = np.abs(x).max(axis=axis, keepdims=True)
    exponents = np.maximum(largest.view(np.uint32) >> 23, 15).astype(np.float64)
    scale = np.exp2(exponents - 127 - 14)
    value = x / scale
    high = value.astype(np.float16).astype(np.float64)
    return high, (value - high).astype(np.float16).astype(np.float64), scale


def add_truncating(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """total + a b^T over 16 products, as an H100's wgmma: all aligned to the largest, two bits
    more than the 24 kept, the rest cut off; then cut to 24 bits. Fitted to measured errors."""
    products = a[:, None, :] * b[None, :, :]
    largest = np.maximum(np.abs(products).max(axis=2), np.abs(total))
    unit = np.exp2(np.floor(np.log2(np.maximum(largest, 1e-300))) - 25)
    result = (np.trunc(products / unit[..., None]).sum(axis=2) + np.trunc(total / unit)) * unit
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(result), 1e-300))) - 23)
    return np.trunc(result / unit) * unit


def as_the_kernel(a: np.ndarray, b: np.ndarray, by_patch: bool = False) -> np.ndarray:
    """a b^T by three products of halves over 32, promoted by a fma that rounds."""
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(0, a.shape[1], 32):
        (ah, al, sa) = halves(a[:, k : k + 32], None if by_patch else 1)
        (bh, bl, sb) = halves(b[:, k : k + 32], 1)
        part = np.zeros(total.shape)
        for left, right in ((al, bh), (ah, bl), (ah, bh)):
            for j in range(0, left.shape[1], 16):
                part = add_truncating(part, left[:, j : j + 16], right[:, j : j + 16])
        scale = (sa * sb.T).astype(np.float32).astype(np.float64)  # no float32 below 2^-149
        total = (total.astype(np.float64) + part * scale).astype(np.float32)
    return total


def thin_halves(x: np.ndarray, count: int, axis) -> tuple[list[np.ndarray], np.ndarray]:
    """As `cuda_thin_fp32` splits blocks along an axis: halves, the first one first, and scale."""
    rounded, low, scale = halves(x, axis)
    if count == 2:
        return [rounded, low], scale
    value = x / scale
    first = (value.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    first = first.astype(np.float16).astype(np.float64)
    second = (value - first).astype(np.float16).astype(np.float64)
    return [first, second, (value - first - second).astype(np.float16).astype(np.float64)], scale


def as_the_thin_kernel(a: np.ndarray, b: np.ndarray, steps: int = 1) -> np.ndarray:
    """a b^T as `cuda_thin_fp32`: all of a has one scale, K in its order.

    Of two halves so many steps of 16 as K allows are added up before they are promoted; of three
    the products of the first ones have sums of their own.
    """
    k = a.shape[1]
    count, period = (2, max(1, (3 if k >= 320 else 2 if k >= 128 else 1) // steps))
    if k < 96:
        count, period = 3, k
    left, scale_a = thin_halves(a, count, None)
    right, scale_b = thin_halves(b, count, 1)
    whole = -(-k // 16) * 16
    left, right = ([np.pad(h, ((0, 0), (0, whole - k))) for h in side] for side in (left, right))
    groups = [range(i, min(i + 16 * steps, whole), 16) for i in range(0, whole, 16 * steps)]
    total = np.zeros((len(a), len(b)))
    for first in range(0, len(groups), period):
        part = np.zeros(total.shape)
        for group in groups[first : first + period]:
            for i, j in ((1, 0), (0, 1), (0, 0)) if count == 2 else _SIX[:-1]:
                for at in group:
                    part = add_truncating(part, left[i][:, at : at + 16], right[j][:, at : at + 16])
            if count == 3:
                for at in group:
                    total = add_truncating(
                        total, left[0][:, at : at + 16], right[0][:, at : at + 16]
                    )
        total = (total + part).astype(np.float32).astype(np.float64)
    return (total * (scale_a * scale_b.T).astype(np.float32)).astype(np.float32)


_SIX = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))
