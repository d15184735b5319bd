"""CUDA: kernels that only move data, one element a thread."""

from tvm import s_tir, te

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
