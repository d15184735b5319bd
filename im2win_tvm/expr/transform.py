"""The im2win transform: I' repeats the rows that windows share and keeps columns in place."""

from tvm import te, tirx

from ..problem import ConvProblem


def window_columns(problem: ConvProblem, outputs: int | None = None) -> int:
    """Columns of the padded input that the windows of `outputs` output columns reach.

    `outputs` is the output width by default; a schedule that rounds the width up asks for more.
    """
    outputs = problem.output_size[1] if outputs is None else outputs
    reach = (problem.kernel_size[1] - 1) * problem.dilation[1] + 1
    return (outputs - 1) * problem.stride[1] + reach


def transform(
    x: te.Tensor,
    problem: ConvProblem,
    *,
    rows: int | None = None,
    outputs: int | None = None,
    dtype: str | None = None,
) -> te.Tensor:
    """I' of arXiv 2306.14316, equation (2), with padding and dilation.

    NCHW: ``I'[n, c, m, col * Hf + u] = x[n, c, m * sh + u * dh - top, col - left]``,
    shape ``[N, C, rows, window_columns * Hf]``.
    NHWC: ``I'[n, m, col * Hf + u, c]``, shape ``[N, rows, window_columns * Hf, C]``.

    Elements outside the input are zero: convolution padding, and whatever `rows` (output rows,
    Ho by default) and `outputs` (output columns, Wo by default) ask for beyond the real output,
    so that a schedule may round both up and read without a bounds check.
    """
    (hf, _), (sh, _), (dh, _) = problem.kernel_size, problem.stride, problem.dilation
    (top, _), (left, _) = problem.padding
    height, width = problem.input_size
    rows = problem.output_size[0] if rows is None else rows
    columns = window_columns(problem, outputs)
    dtype = problem.dtype if dtype is None else dtype
    # A condition is written only where it can fail: a layer without padding pays for none.
    last_row = (rows - 1) * sh + (hf - 1) * dh - top
    last_column = columns - 1 - left

    def element(n, m, k, c):
        h, w = m * sh + (k % hf) * dh - top, k // hf - left
        inside = []
        if top > 0:
            inside.append(h >= 0)
        if last_row >= height:
            inside.append(h < height)
        if left > 0:
            inside.append(w >= 0)
        if last_column >= width:
            inside.append(w < width)
        value = x[n, h, w, c] if problem.channels_last else x[n, c, h, w]
        value = value.astype(dtype)
        if not inside:
            return value
        return tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, dtype))

    if problem.channels_last:
        shape = (problem.batch, rows, columns * hf, problem.in_channels)
        return te.compute(shape, element, name="im2win")
    shape = (problem.batch, problem.in_channels, rows, columns * hf)
    return te.compute(shape, lambda n, c, m, k: element(n, m, k, c), name="im2win")
