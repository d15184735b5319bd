"""What `cuda_thin` and `cuda_thin_fp32` do alike with the arrays of an epilogue."""

# Bodies of inline functions are parsed as TIRx.

from tvm import tirx
from tvm.script import tirx as T

from ..epilogue import Epilogue
from .base import ALIGNMENT
from .cuda_thin_tiles import Geometry


@T.inline
def load_bias(g, bias, added, first_channel, thread):
    """The bias of a block's channels into shared memory, zeros beyond the last; by all threads."""
    width, threads = T.meta_var((g.config.block_n, g.config.threads))
    for i in T.unroll((width + threads - 1) // threads):
        channel: T.let = i * threads + thread
        if channel < width:
            added[channel] = T.if_then_else(
                first_channel + channel < g.out_channels,
                T.Cast("float32", bias[T.min(first_channel + channel, g.out_channels - 1)]),
                T.float32(0),
            )


def with_arrays_of(epilogue: Epilogue, function: tirx.PrimFunc, g: Geometry) -> tirx.PrimFunc:
    """The kernel with the parameters that it needs, and how y and the residual are aligned."""
    unused = ("" if epilogue.bias else "bias", "" if epilogue.residual else "residual")
    parameters = [p for p in function.params if p.name not in unused]
    function = tirx.PrimFunc(parameters, function.body, function.ret_type, function.attrs)
    wide = g.vector * g.problem.itemsize
    return function.with_attr(ALIGNMENT, {"y": wide, "residual": wide})
