"""The filter as threads of `cuda_depthwise` read it: a tap's channels side by side."""

from tvm import te

from ..problem import ConvProblem
from .cuda_depthwise_tiles import Config, Geometry
from .cuda_elementwise import elementwise


def prepare(problem: ConvProblem):
    """The filter in float32, ``[Ci / groups, taps, Co]``. Runs once.

    Threads that are neighbours have neighbouring channels or one and the same: one load of a warp.
    """
    g = Geometry(problem, Config(1, 1))
    w = te.placeholder(problem.weight_shape, problem.dtype, name="w")
    packed = te.compute(
        (g.group_in, g.taps, g.out_channels),
        lambda i, tap, o: w[o, i, tap // g.w.taps, tap % g.w.taps].astype("float32"),
        name="packed",
    )
    return elementwise([w, packed], "packed")
