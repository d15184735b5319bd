"""The whole convolution as one graph of tensor expressions, with nothing scheduled."""

from typing import NamedTuple

from tvm import te

from ..epilogue import NONE, Epilogue
from ..problem import ConvProblem
from .convolution import convolution
from .epilogue import output
from .filter import filter_window
from .transform import transform


class Arguments(NamedTuple):
    """Placeholders under the names that every kernel of this project uses."""

    x: te.Tensor
    w: te.Tensor
    bias: te.Tensor | None
    residual: te.Tensor | None

    def extras(self) -> list[te.Tensor]:
        """The placeholders of the epilogue, in the order kernels take them."""
        return [tensor for tensor in (self.bias, self.residual) if tensor is not None]


def arguments(problem: ConvProblem, epilogue: Epilogue = NONE) -> Arguments:
    """Placeholders: x and residual in the problem's layout, w in OIHW, bias ``[Co]``."""
    dtype = problem.dtype
    return Arguments(
        te.placeholder(problem.input_shape, dtype, name="x"),
        te.placeholder(problem.weight_shape, dtype, name="w"),
        te.placeholder((problem.out_channels,), dtype, name="bias") if epilogue.bias else None,
        te.placeholder(problem.output_shape, dtype, name="residual") if epilogue.residual else None,
    )


def graph(problem: ConvProblem, epilogue: Epilogue = NONE) -> list[te.Tensor]:
    """``[x, w, (bias), (residual), y]``: transform, filter, convolution and epilogue in one."""
    args = arguments(problem, epilogue)
    iw, fw = transform(args.x, problem), filter_window(args.w, problem)
    y = output(convolution(iw, fw, problem), problem, epilogue, args.bias, args.residual)
    return [args.x, args.w, *args.extras(), y]
