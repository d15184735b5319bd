"""The filter in window order, plain (the paper's F') and packed for a kernel's inner loop."""

import math
from typing import NamedTuple

from tvm import te, tirx

from ..problem import ConvProblem


class KAxes(NamedTuple):
    """The order of a kernel's reduction over a window, as two axes ``[outer, inner]``.

    "window": one outer step, and inside it the window as it lies in I' (NCHW: (c, v, u), NHWC:
    (v, u, c)). "rows": the same as it lies in the input (NCHW: (c, u, v), NHWC: (u, v, c)).
    "taps": one outer step for each tap (v, u), and inside it its channels. "blocks": `inner`
    channels of one tap, then of the next tap in the input's order (u, v), and after all taps the
    next channels. The inner axis may be longer than what it holds; the rest is zero.
    """

    outer: int
    inner: int
    order: str


def k_axes(problem: ConvProblem, multiple: int = 1, order: str = "window") -> KAxes:
    """The axes for this problem, the inner one rounded up to a multiple ("blocks": equal to it)."""
    taps = math.prod(problem.kernel_size)
    if order == "blocks":
        return KAxes(-(-problem.k // taps // multiple) * taps, multiple, order)
    outer = taps if order == "taps" else 1
    return KAxes(outer, -(-problem.k // outer // multiple) * multiple, order)


def window_position(problem: ConvProblem, axes: KAxes, a, b):
    """Decode ``[a, b]``: channel within the group, column v, row u, and conditions to be inside."""
    hf, wf = problem.kernel_size
    channels, taps = problem.in_channels // problem.groups, hf * wf
    if axes.order == "blocks":
        c = a // taps * axes.inner + b
        inside = [c < channels] if channels % axes.inner else []
        return c, a % wf, a % taps // wf, inside
    held = problem.k // axes.outer
    inside = [b < held] if axes.inner > held else []
    if axes.order == "taps":
        return b, a // hf, a % hf, inside
    if problem.channels_last:
        c, tap = b % channels, b // channels
    else:
        c, tap = b // taps, b % taps
    v, u = (tap % wf, tap // wf) if axes.order == "rows" else (tap // hf, tap % hf)
    return c, v, u, inside


def filter_window(w: te.Tensor, problem: ConvProblem) -> te.Tensor:
    """F' of arXiv 2306.14316: ``F'[o, k] = w[o, c, u, v]``, shape ``[Co, K]``, k in window order.

    `w` is PyTorch's OIHW whatever the layout of the input.
    """
    axes = k_axes(problem)

    def element(o, k):
        c, v, u, _ = window_position(problem, axes, 0, k)
        return w[o, c, u, v]

    return te.compute((problem.out_channels, problem.k), element, name="filter")


def pack_filter(
    w: te.Tensor,
    problem: ConvProblem,
    block: int,
    axes: KAxes | None = None,
    dtype: str | None = None,
) -> te.Tensor:
    """F' with `block` output channels of one group side by side for every position of the window.

    ``P[g, b, outer, inner, i] = F'[g * Og + b * block + i, (outer, inner)]``, shape
    ``[G, ceil(Og / block), *axes, block]`` with Og = Co / G; zero outside, so that a kernel reads
    whole vectors and whole K tiles without a bounds check. axes: the window order by default.
    """
    per_group = problem.out_channels // problem.groups
    blocks = -(-per_group // block)
    axes = k_axes(problem) if axes is None else axes
    dtype = problem.dtype if dtype is None else dtype

    def element(g, b, outer, inner, i):
        c, v, u, inside = window_position(problem, axes, outer, inner)
        o = b * block + i
        if blocks * block > per_group:
            inside = [*inside, o < per_group]
        value = w[g * per_group + o, c, u, v].astype(dtype)
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, dtype))

    shape = (problem.groups, blocks, axes.outer, axes.inner, block)
    return te.compute(shape, element, name="packed")
