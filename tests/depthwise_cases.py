"""Problems and configurations that the tests of `cuda_depthwise` and its tensor-core form try."""

import itertools
import random

from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem, ProblemError
from im2win_tvm.schedules.cuda_depthwise_mma_tiles import Config as MmaConfig
from im2win_tvm.schedules.cuda_depthwise_tiles import Config

DTYPES = ("float16", "float32", "bfloat16")
EPILOGUES = [
    Epilogue(*parts) for parts in itertools.product([False, True], [False, True], [None, "relu"])
]
FULL = Epilogue(True, True, "relu")


def cycled(problem: ConvProblem, turn: int) -> ConvProblem:
    """The problem in one of three dtypes."""
    return problem.replace(dtype=DTYPES[turn % 3])


# Nothing round about it: 13 channels, tails everywhere, padding that differs on all sides.
ODD = ConvProblem(3, 13, (9, 11), 13, 3, 1, ((1, 0), (2, 1)), 1, 13, "float16", "NCHW")
# Whole vectors of channels.
EVEN = ConvProblem(2, 16, (10, 9), 16, 3, 1, 1, 1, 16, "float16", "NHWC")
STEPS = ODD.replace(kernel_size=(3, 2), stride=(2, 3), dilation=(4, 2), padding=((5, 3), (1, 2)))
GROUPS = ConvProblem(2, 12, (7, 9), 24, (2, 3), (2, 1), ((1, 0), (1, 2)), (1, 2), 3, layout="NHWC")
WIDE = ODD.replace(in_channels=3, out_channels=3, groups=3, kernel_size=(5, 9), padding=4)

# What is tried -> on which problem, in one of the three dtypes.
CASES = {
    "one output a thread": (EVEN, Config(1, 1)),
    "a tile of rows": (EVEN, Config(4, 1, 2)),
    "a tile of columns": (EVEN, Config(1, 7, 2)),
    "vectors of four": (EVEN, Config(3, 2, 4, threads=64)),
    "larger tiles than the output": (EVEN, Config(12, 11, 1, threads=32)),
    "taps read as they go": (EVEN, Config(3, 4, 2, resident=False)),
    "odd channels": (ODD.replace(layout="NHWC"), Config(2, 3)),
    "strides and dilation": (STEPS.replace(layout="NHWC"), Config(2, 2)),
    "strides and dilation, taps as they go": (
        STEPS.replace(layout="NHWC"),
        Config(2, 3, resident=False),
    ),
    "a multiplier": (EVEN.replace(out_channels=48), Config(2, 3)),
    "a multiplier, vectors": (EVEN.replace(out_channels=64), Config(2, 3, 4)),
    "groups": (GROUPS, Config(2, 2, 4)),
    "groups, taps as they go": (GROUPS, Config(3, 2, 2, resident=False)),
    "a wide window": (WIDE.replace(layout="NHWC"), Config(2, 5, resident=False)),
    "planes": (ODD, Config(2, 3)),
    "planes of several groups": (ODD, Config(3, 4, groups=4, threads=64)),
    "planes of several images": (ODD, Config(9, 5, groups=20, threads=32)),
    "all planes": (ODD, Config(9, 5, groups=64, threads=32)),
    "more outputs than threads": (ODD, Config(1, 2, groups=5, threads=32)),
    "bands": (ODD, Config(2, 3, band=4)),
    "bands of one row": (ODD, Config(1, 3, band=1, resident=False)),
    "bands that do not divide among threads": (ODD, Config(2, 5, band=3, threads=64)),
    "planes, strides and dilation": (STEPS, Config(2, 2, groups=3)),
    "bands, strides and dilation": (STEPS, Config(1, 2, band=3, resident=False)),
    "planes of a multiplier": (ODD.replace(out_channels=39), Config(2, 3, groups=2)),
    "planes of groups": (GROUPS.replace(layout="NCHW"), Config(2, 3, groups=2)),
    "bands of groups": (GROUPS.replace(layout="NCHW"), Config(2, 3, band=2)),
    "planes, a wide window": (WIDE, Config(2, 5, resident=False, groups=2)),
}

# For tensor cores: one channel a group, stride 1.
SQUARE = ConvProblem(3, 13, (9, 11), 13, 5, 1, 2, 1, 13, "float16", "NCHW")
TALL = SQUARE.replace(input_size=(21, 35), kernel_size=(7, 9), padding=((3, 2), (0, 5)))
LARGE = SQUARE.replace(batch=1, input_size=(20, 40), kernel_size=(13, 31), padding=(6, 15))
LAST = SQUARE.replace(
    in_channels=24, out_channels=24, groups=24, layout="NHWC", kernel_size=(4, 9), padding=(2, 4)
)
MMA_CASES = {
    "one image": (SQUARE, MmaConfig(4, 1, 2)),
    "several images": (SQUARE, MmaConfig(2, 2, 2)),
    "more images than there are": (SQUARE, MmaConfig(8, 4, 2)),
    "one warp": (SQUARE, MmaConfig(1, 1, 1)),
    "bands": (TALL, MmaConfig(4, 1, 1)),
    "bands of several images": (TALL, MmaConfig(4, 2, 2)),
    "a large window": (LARGE, MmaConfig(8, 1, 3)),
    "bands of a large window": (LARGE, MmaConfig(4, 1, 2)),
    "rows of 8 bytes": (SQUARE.replace(input_size=(9, 12)), MmaConfig(4, 2, 2)),
    "rows of 16 bytes": (SQUARE.replace(input_size=(9, 16)), MmaConfig(4, 1, 1)),
    "one row": (
        SQUARE.replace(input_size=(1, 37), kernel_size=(1, 25), padding=(0, 12)),
        MmaConfig(4, 1, 1),
    ),
    "one column": (
        SQUARE.replace(input_size=(37, 1), kernel_size=(25, 1), padding=(12, 0)),
        MmaConfig(4, 1, 2),
    ),
    "wider padding than the window": (
        SQUARE.replace(padding=((7, 6), (9, 8))),
        MmaConfig(4, 1, 3),
    ),
    "channels last": (LAST, MmaConfig(8, 1, 2)),
    "channels last, several images": (LAST, MmaConfig(16, 2, 2)),
    "channels last, bands": (
        LAST.replace(in_channels=8, out_channels=8, groups=8, input_size=(21, 35)),
        MmaConfig(8, 1, 1),
    ),
}


def cases():
    """(name, problem, config) with the dtypes by turns."""
    for turn, (name, (problem, config)) in enumerate(CASES.items()):
        yield name, cycled(problem, turn), config


def drawn(seed: int, count: int, *, most_work: int = 200_000) -> list[ConvProblem]:
    """`count` random problems of few channels a group; dtypes and layouts take turns."""
    chance = random.Random(seed)
    found: list[ConvProblem] = []
    while len(found) < count:
        turn = len(found)
        each = chance.choice([1, 1, 1, 2, 4, chance.randint(1, 15)])
        filters = chance.choice([each, each, chance.randint(1, 6)])
        groups = chance.randint(2, 19)
        kernel = chance.choice([(3, 3), (3, 3), (5, 5), (7, 7), (1, 5), (2, 3), (9, 4), (1, 1)])
        try:
            problem = ConvProblem(
                chance.choice([1, 2, 3, 5]),
                groups * each,
                (chance.randint(1, 23), chance.randint(1, 23)),
                groups * filters,
                kernel,
                chance.choice([1, 1, 2, (2, 3), (3, 1)]),
                tuple((chance.randint(0, k), chance.randint(0, k)) for k in kernel),
                chance.choice([1, 1, 2, (1, 3), (4, 2)]),
                groups,
                DTYPES[turn % 3],
                ("NHWC", "NCHW")[turn // 3 % 2],
            )
        except ProblemError:  # a window larger than its input
            continue
        if problem.flops <= 2 * most_work and problem not in found:
            found.append(problem)
    return found
