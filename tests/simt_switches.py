"""Configurations of the CUDA-core schedules that tests try, and the problems they try them on."""

from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules.cuda_simt import Config
from im2win_tvm.target import CudaTarget

TARGET = CudaTarget("sm_90")
FORMS = ("cuda_simt", "cuda_simt_explicit")
# No extent is a multiple of a tile: 66 pixels an image, 35 or 36 products, 11 channels a group.
RAGGED = ConvProblem(3, 6, (11, 13), 22, (3, 4), (2, 1), ((1, 2), (0, 1)), (1, 1), 2)
# Every extent is a whole number of vectors.
WHOLE = ConvProblem(2, 8, (8, 8), 16, 3, padding=1)
BASE = dict(block_m=32, block_p=64, block_k=8, thread_m=4, thread_p=4)

# Every switch alone, then tiles of all shapes: tall, flat, odd, larger than the problem.
SWITCHES = {
    "all on": {},
    "single buffer": dict(double_buffer=False),
    "no prefetch": dict(prefetch=False),
    "single buffer, no prefetch": dict(double_buffer=False, prefetch=False),
    "no shared memory": dict(shared=False, double_buffer=False, prefetch=False),
    "no shared memory, no vectors": dict(
        shared=False, double_buffer=False, prefetch=False, vector=1
    ),
    "vectors of two": dict(vector=2),
    "no vectors": dict(vector=1),
    "no micro-kernel": dict(block_m=16, block_p=16, thread_m=1, thread_p=1),
    "1x8 outputs a thread": dict(block_m=8, thread_m=1, thread_p=8),
    "8x1 outputs a thread": dict(block_m=64, block_p=32, thread_m=8, thread_p=1),
    "2x2 outputs a thread": dict(thread_m=2, thread_p=2),
    "8x8 outputs a thread": dict(block_m=64, block_p=128, thread_m=8, thread_p=8),
    "8x16 outputs a thread": dict(block_m=64, block_p=128, thread_m=8, thread_p=16),
    "128x128 tile": dict(block_m=128, block_p=128, thread_m=8, thread_p=8),
    "odd tile": dict(block_m=24, block_p=36, block_k=5, thread_m=3, thread_p=3, vector=1),
    "one product a tile": dict(block_k=1),
    "one channel a tile": dict(block_m=1, block_p=128, thread_m=1),
    "K in one tile": dict(block_k=48),
    "channels of a tap": dict(taps=True),
    "more channels of a tap than there are": dict(taps=True, block_k=16),
    "table": dict(table=True),
    "table, single buffer": dict(table=True, double_buffer=False),
    "table, no prefetch": dict(table=True, prefetch=False),
}


def config_of(**switches):
    return Config(**{**BASE, **switches})
