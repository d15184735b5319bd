"""What happens to a sum before it is stored: bias, residual, activation, rounding."""

from collections.abc import Sequence

from tvm import te, tirx

from ..epilogue import NONE, Epilogue
from ..problem import ConvProblem


def finish(
    total: tirx.Expr,
    channel: tirx.Expr,
    index: Sequence[tirx.Expr],
    problem: ConvProblem,
    epilogue: Epilogue,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
) -> tirx.Expr:
    """The output element of a float32 sum: `channel` picks the bias, `index` the residual."""
    value = total
    if epilogue.bias:
        value = value + bias[channel].astype("float32")
    if epilogue.residual:
        value = value + residual[tuple(index)].astype("float32")
    if epilogue.activation == "relu":
        # A comparison and not max(), so that a NaN stays a NaN as in PyTorch.
        zero = tirx.const(0, "float32")
        value = tirx.if_then_else(value < zero, zero, value)
    return value.astype(problem.dtype)


def output(
    conv: te.Tensor,
    problem: ConvProblem,
    epilogue: Epilogue = NONE,
    bias: te.Tensor | None = None,
    residual: te.Tensor | None = None,
) -> te.Tensor:
    """The result in the problem's layout and dtype, from float32 sums ``[N, Co, Ho, Wo]``."""

    def element(*index):
        n, m, q, o = index if problem.channels_last else (index[0], *index[2:], index[1])
        return finish(conv[n, o, m, q], o, index, problem, epilogue, bias, residual)

    return te.compute(problem.output_shape, element, name="y")
