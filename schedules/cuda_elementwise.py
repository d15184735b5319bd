"""CUDA: kernels that only move data, one element a thread."""

from tvm import s_tir, te

from ..expr import arguments, transform, window_columns
from ..problem import ConvProblem

# Enough threads of a block to hide latency, few enough to waste little at the end.
THREADS = 256


def elementwise(tensors: list[te.Tensor], block: str):
    """The function of `tensors`, inputs first, whose one stage is `block`."""
    sch = s_tir.Schedule(te.create_prim_func(tensors))
    loop = sch.fuse(*sch.get_loops(sch.get_sblock(block)))
    blocks, threads = sch.split(loop, [None, THREADS])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    return sch.mod["main"]


def write_im2win(problem: ConvProblem):
    """x -> I' in global memory."""
    x = arguments(problem).x
    return elementwise([x, transform(x, problem)], "im2win")


def im2win_elements(problem: ConvProblem) -> int:
    """Elements of I'."""
    columns = window_columns(problem) * problem.kernel_size[0]
    return problem.batch * problem.in_channels * problem.output_size[0] * columns
