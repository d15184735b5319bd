"""What happens to an accumulator before it is stored: bias, residual, activation, rounding."""

from tvm import te, tirx

from ..epilogue import NONE, Epilogue
from ..problem import ConvProblem


def output(
    accumulator,
    problem: ConvProblem,
    epilogue: Epilogue = NONE,
    bias: te.Tensor | None = None,
    residual: te.Tensor | None = None,
) -> te.Tensor:
    """The result in the problem's layout and dtype.

    `accumulator(n, o, m, q)` gives the float32 sum of output pixel (m, q), channel o, image n.
    """

    def element(n, o, m, q, index):
        value = accumulator(n, o, m, q)
        if epilogue.bias:
            value = value + bias[o].astype("float32")
        if epilogue.residual:
            value = value + residual[index].astype("float32")
        if epilogue.activation == "relu":
            # Written as a comparison, so that a NaN stays a NaN as in PyTorch.
            value = tirx.if_then_else(value < tirx.const(0, "float32"), tirx.const(0, "float32"), value)
        return value.astype(problem.dtype)

    if problem.channels_last:
        return te.compute(
            problem.output_shape, lambda n, m, q, o: element(n, o, m, q, (n, m, q, o)), name="y"
        )
    return te.compute(
        problem.output_shape, lambda n, o, m, q: element(n, o, m, q, (n, o, m, q)), name="y"
    )
