"""The convolution over I' and F', in three shapes that schedules start from.

All three compute ``sum_k I'[window of (n, m, q)][k] * F'[o][k]`` in float32; they differ in which
axes are side by side. Rounded-up axes hold values that the output never reads.
"""

from typing import NamedTuple

from tvm import te, tirx

from ..problem import ConvProblem
from .filter import KAxes, window_position
from .transform import window_columns


def _strip_index(problem: ConvProblem, q, v, u):
    """Position of tap (u, v) of output column q within a row of I' (its `col * Hf + u` axis)."""
    (hf, _), (_, sw), (_, dw) = problem.kernel_size, problem.stride, problem.dilation
    return (q * sw + v * dw) * hf + u


def _strip_read(iw: te.Tensor, problem: ConvProblem, n, c, m, q, v, u):
    position = _strip_index(problem, q, v, u)
    return iw[n, m, position, c] if problem.channels_last else iw[n, c, m, position]


def convolution(iw: te.Tensor, fw: te.Tensor, problem: ConvProblem) -> te.Tensor:
    """The paper's form: ``[N, Co, Ho, Wo]`` from I' and F' ``[Co, K]``, float32."""
    hf, wf = problem.kernel_size
    channels = problem.in_channels // problem.groups
    per_group = problem.out_channels // problem.groups
    axes = {
        "c": te.reduce_axis((0, channels), "c"),
        "v": te.reduce_axis((0, wf), "v"),
        "u": te.reduce_axis((0, hf), "u"),
    }
    c, v, u = axes.values()
    order = "vuc" if problem.channels_last else "cvu"
    k = (v * hf + u) * channels + c if problem.channels_last else (c * wf + v) * hf + u

    def element(n, o, m, q):
        value = _strip_read(iw, problem, n, o // per_group * channels + c, m, q, v, u)
        return te.sum(
            value.astype("float32") * fw[o, k].astype("float32"), axis=[axes[a] for a in order]
        )

    shape = (problem.batch, problem.out_channels, *problem.output_size)
    return te.compute(shape, element, name="conv")


def convolution_blocked(
    iw: te.Tensor, packed: te.Tensor, problem: ConvProblem, rows: int, outputs: int
) -> te.Tensor:
    """``[N, G, blocks, rows, outputs, block]``: one vector of channels for every output pixel.

    `packed` is `pack_filter`'s in window order. Where columns are not dilated, a window (in NCHW:
    of one channel) is one contiguous run of I', and its reduction is one axis over that run.
    """
    hf, wf = problem.kernel_size
    channels = problem.in_channels // problem.groups
    groups, blocks, _, _, block = (int(extent) for extent in packed.shape)
    c = te.reduce_axis((0, channels), "c")
    if problem.dilation[1] == 1:
        run = te.reduce_axis((0, hf * wf), "run")
        taps, tap, v, u = [run], run, run // hf, run % hf
    else:
        v, u = te.reduce_axis((0, wf), "v"), te.reduce_axis((0, hf), "u")
        taps, tap = [v, u], v * hf + u
    axes = [*taps, c] if problem.channels_last else [c, *taps]
    k = tap * channels + c if problem.channels_last else c * (hf * wf) + tap

    def element(n, g, b, m, q, i):
        if problem.dilation[1] == 1:
            position = q * (problem.stride[1] * hf) + tap
        else:
            position = _strip_index(problem, q, v, u)
        channel = g * channels + c
        index = (m, position, channel) if problem.channels_last else (channel, m, position)
        value = iw[(n, *index)]
        return te.sum(value.astype("float32") * packed[g, b, 0, k, i].astype("float32"), axis=axes)

    return te.compute((problem.batch, groups, blocks, rows, outputs, block), element, name="conv")


class GemmSizes(NamedTuple):
    """The convolution as ``groups`` products [M, K] x [K, P]: channels by output pixels."""

    groups: int
    m: int
    k: int
    p: int


def gemm_sizes(problem: ConvProblem) -> GemmSizes:
    """M = Co / G, K = C / G * Hf * Wf, P = N * Ho * Wo."""
    height, width = problem.output_size
    return GemmSizes(
        problem.groups,
        problem.out_channels // problem.groups,
        problem.k,
        problem.batch * height * width,
    )


def window(iw: te.Tensor, problem: ConvProblem, axes: KAxes, p_padded: int) -> te.Tensor:
    """The windows of I' side by side, ``[G, *axes, p_padded]``; zero outside the window and P.

    A schedule stages tiles of it in shared memory and never stores the whole.
    """
    sizes = gemm_sizes(problem)
    height, width = problem.output_size
    channels = problem.in_channels // problem.groups

    def element(g, outer, inner, p):
        c, v, u, inside = window_position(problem, axes, outer, inner)
        n, m, q = p // (height * width), p // width % height, p % width
        value = _strip_read(iw, problem, n, g * channels + c, m, q, v, u)
        if p_padded > sizes.p:
            inside = [*inside, p < sizes.p]
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, iw.dtype))

    shape = (sizes.groups, axes.outer, axes.inner, p_padded)
    return te.compute(shape, element, name="window")


def window_offsets(problem: ConvProblem, axes: KAxes, explicit: bool) -> te.Tensor:
    """Distance in elements of each position of a window from its first one, ``[*axes]`` int32.

    In I' if `explicit`, otherwise in the input itself; zero where the axes hold nothing. The same
    for every window, so that a kernel can look it up instead of dividing.
    """
    (hf, _), (dh, dw) = problem.kernel_size, problem.dilation
    channels, (height, width) = problem.in_channels, problem.input_size

    def element(outer, inner):
        c, v, u, inside = window_position(problem, axes, outer, inner)
        if explicit:
            row, plane = v * dw * hf + u, problem.output_size[0] * window_columns(problem) * hf
        else:
            row, plane = u * dh * width + v * dw, height * width
        distance = row * channels + c if problem.channels_last else c * plane + row
        return tirx.if_then_else(tirx.all(*inside), distance, 0) if inside else distance

    return te.compute((axes.outer, axes.inner), element, name="offsets")


def window_by_offset(
    source: te.Tensor,
    offsets: te.Tensor,
    problem: ConvProblem,
    axes: KAxes,
    p_padded: int,
    explicit: bool,
) -> te.Tensor:
    """`window`, from I' (`explicit`) or from an input without padding, through `window_offsets`.

    The distance is added to the innermost index: an element beyond the end of an axis is the one
    that memory holds there.
    """
    sizes = gemm_sizes(problem)
    height, width = problem.output_size
    channels = problem.in_channels // problem.groups
    sh, sw = (1, problem.stride[1] * problem.kernel_size[0]) if explicit else problem.stride

    def element(g, outer, inner, p):
        n, m, q = p // (height * width), p // width % height, p % width
        step = offsets[outer, inner]
        if problem.channels_last:
            value = source[n, m * sh, q * sw, g * channels + step]
        else:
            value = source[n, g * channels, m * sh, q * sw + step]
        inside = [inner * axes.outer < problem.k] if axes.inner * axes.outer > problem.k else []
        if p_padded > sizes.p:
            inside.append(p < sizes.p)
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, source.dtype))

    shape = (sizes.groups, axes.outer, axes.inner, p_padded)
    return te.compute(shape, element, name="window")


def convolution_gemm(windows: te.Tensor, packed: te.Tensor) -> te.Tensor:
    """``[G, M, p_padded]`` from `window`'s and `pack_filter`'s with one block of M, float32."""
    groups, _, outer, inner, m_padded = (int(extent) for extent in packed.shape)
    a, b = te.reduce_axis((0, outer), "a"), te.reduce_axis((0, inner), "b")
    return te.compute(
        (groups, m_padded, int(windows.shape[3])),
        lambda g, o, p: te.sum(
            windows[g, a, b, p].astype("float32") * packed[g, 0, a, b, o].astype("float32"),
            axis=[a, b],
        ),
        name="conv",
    )
