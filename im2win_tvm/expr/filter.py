"""The filter in window order, plain (the paper's F') and packed for a kernel's inner loop."""

from tvm import te, tirx

from ..problem import ConvProblem


def window_position(problem: ConvProblem, k):
    """Decode position `k` of a window into (channel within the group, column v, row u).

    NCHW windows run over (c, v, u), NHWC windows over (v, u, c): the order of I' in memory.
    """
    hf, wf = problem.kernel_size
    channels = problem.in_channels // problem.groups
    if problem.channels_last:
        return k % channels, k // (channels * hf), k // channels % hf
    return k // (hf * wf), k % (hf * wf) // hf, k % hf


def filter_window(w: te.Tensor, problem: ConvProblem) -> te.Tensor:
    """F' of arXiv 2306.14316: ``F'[o, k] = w[o, c, u, v]``, shape ``[Co, K]``, k in window order.

    `w` is PyTorch's OIHW whatever the layout of the input.
    """

    def element(o, k):
        c, v, u = window_position(problem, k)
        return w[o, c, u, v]

    return te.compute((problem.out_channels, problem.k), element, name="filter")


def pack_filter(
    w: te.Tensor, problem: ConvProblem, block: int, k_multiple: int = 1, dtype: str | None = None
) -> te.Tensor:
    """F' with `block` output channels of one group side by side for every k.

    ``P[g, b, k, i] = F'[g * Og + b * block + i, k]``, shape ``[G, ceil(Og / block), Kp, block]``
    with Og = Co / G and Kp = K rounded up to `k_multiple`; zero outside, so that a kernel reads
    whole vectors and whole K tiles without a bounds check.
    """
    per_group = problem.out_channels // problem.groups
    blocks = -(-per_group // block)
    k_padded = -(-problem.k // k_multiple) * k_multiple
    dtype = problem.dtype if dtype is None else dtype

    def element(g, b, k, i):
        o = b * block + i
        c, v, u = window_position(problem, k)
        inside = []
        if blocks * block > per_group:
            inside.append(o < per_group)
        if k_padded > problem.k:
            inside.append(k < problem.k)
        value = w[g * per_group + o, c, u, v].astype(dtype)
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, dtype))

    return te.compute((problem.groups, blocks, k_padded, block), element, name="packed")
