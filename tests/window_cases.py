"""Problems and configurations that the tests of `cuda_window` try, here and on a device."""

import itertools
import random
from collections.abc import Iterator

from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem, ProblemError
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cuda_window_tiles import Config
from im2win_tvm.target import CudaTarget


class Few(CudaTarget):
    """A Hopper of two multiprocessors: a block takes many tiles, and rings go round."""

    multiprocessors = 2


FEW = Few("sm_90a")
FORMS = {"float16": "cuda_window", "bfloat16": "cuda_window", "float32": "cuda_window_tf32"}
EPILOGUES = [
    Epilogue(*parts) for parts in itertools.product([False, True], [False, True], [None, "relu"])
]
BASE = ConvProblem(2, 72, (3, 10), 72, 3, 1, 1, dtype="float16", layout="NHWC")
P = BASE.replace
IMAGES = P(batch=9, input_size=(3, 4))
STRIDED = P(
    in_channels=16, input_size=(11, 17), kernel_size=(5, 4), stride=(3, 2), padding=((2, 1), (0, 3))
)
GROUPS = P(in_channels=80, out_channels=160, groups=2)

# What is tried -> on which problem; in one of the three dtypes, see `cases`.
CASES = {
    "columns": (BASE, Config(1, 2, 8)),
    "columns of two images": (P(batch=7, in_channels=16, out_channels=70), Config(2, 2, 8)),
    "a wide row": (P(input_size=(3, 30), in_channels=80), Config(1, 1, 24, pixel_stages=3)),
    "images": (IMAGES, Config(8, 1, 2, True)),
    "rows of images": (
        P(batch=7, input_size=(4, 5), padding=((0, 1), (2, 0))),
        Config(8, 2, 3, True, filter_stages=2),
    ),
    "sixteens of images": (P(batch=48, in_channels=40, input_size=(2, 3)), Config(16, 1, 2, True)),
    "two along channels": (P(out_channels=136), Config(1, 2, 8, along_m=2)),
    "three along channels": (
        P(out_channels=136, input_size=(2, 20)),
        Config(1, 1, 16, along_m=3, filter_stages=3),
    ),
    "four along channels": (P(in_channels=16, out_channels=200), Config(1, 2, 8, along_m=4)),
    "two along rows": (BASE, Config(1, 2, 8, along_p=2, pixel_stages=3)),
    "three along rows": (P(in_channels=16), Config(2, 1, 8, along_m=1, along_p=3, taps="row")),
    "three along rows of eight": (P(in_channels=16, input_size=(9, 8)), Config(1, 2, 8, along_p=3)),
    "two along columns": (P(input_size=(2, 30)), Config(1, 1, 16, along_p=2)),
    "three along columns": (P(input_size=(2, 30)), Config(1, 1, 8, along_p=3, pixel_stages=5)),
    "two rows of images": (IMAGES, Config(8, 1, 3, True, along_p=2)),
    "three rows of images": (P(batch=9, input_size=(7, 2)), Config(8, 2, 2, True, along_p=3)),
    "two by two": (P(out_channels=100), Config(1, 1, 8, along_m=2, along_p=2)),
    "turns": (BASE, Config(1, 2, 8, turns=True, pixel_stages=3, filter_stages=5)),
    "turns of images": (IMAGES, Config(8, 1, 2, True, turns=True, taps="row", pixel_stages=4)),
    "resident": (BASE, Config(1, 2, 8, filter_stages=0)),
    "resident, of many channels": (
        P(in_channels=32, out_channels=200),
        Config(1, 2, 8, along_m=2, filter_stages=0, pixel_stages=3),
    ),
    "resident, by turns": (
        P(in_channels=32, out_channels=144),
        Config(1, 2, 8, turns=True, filter_stages=0, pixel_stages=3),
    ),
    "resident, by turns, in groups": (GROUPS, Config(1, 2, 8, turns=True, filter_stages=0)),
    "taps of a row": (BASE, Config(1, 2, 8, taps="row", pixel_stages=4)),
    "one tap": (BASE, Config(1, 2, 8, taps="tap", pixel_stages=5, filter_stages=3)),
    "stride": (STRIDED, Config(1, 2, 8)),
    "stride 4": (STRIDED.replace(stride=4), Config(1, 1, 8, turns=True)),
    "stride, images": (
        STRIDED.replace(batch=9, input_size=(7, 9)),
        Config(8, 2, 2, True, taps="row"),
    ),
    "dense rows": (STRIDED, Config(1, 2, 8, dense=True)),
    "dense rows by turns": (STRIDED.replace(stride=2), Config(1, 2, 8, dense=True, turns=True)),
    "dense images": (
        STRIDED.replace(batch=9, input_size=(9, 7)),
        Config(8, 2, 2, True, dense=True, along_p=2),
    ),
    "dense columns of images": (
        STRIDED.replace(batch=8, input_size=(6, 11), stride=(2, 3)),
        Config(8, 1, 2, True, dense=True, taps="row"),
    ),
    "split in 2": (BASE, Config(1, 3, 8, split=2)),
    "split in 3": (P(in_channels=160), Config(1, 2, 8, split=3)),
    "split in 4": (P(batch=1, out_channels=130), Config(1, 3, 8, taps="row", along_m=2, split=4)),
    "split in 8": (P(batch=1), Config(1, 5, 8, taps="tap", split=8, pixel_stages=3)),
    "split, images": (IMAGES, Config(8, 1, 3, True, taps="tap", along_p=2, split=3)),
    "two blocks": (BASE, Config(1, 2, 8, blocks=2, filter_stages=3)),
    "three blocks": (P(in_channels=96), Config(1, 2, 8, blocks=3, taps="tap", filter_stages=3)),
    "dilation": (P(dilation=(2, 3), padding=(3, 2)), Config(1, 2, 8)),
    "dilation, images": (
        P(batch=9, input_size=(7, 8), dilation=(3, 2), stride=(1, 2), padding=((2, 4), (1, 2))),
        Config(8, 2, 2, True, dense=True),
    ),
    "groups of 16": (P(batch=1, in_channels=32, out_channels=32, groups=2), Config(1, 2, 8)),
    "groups of 40": (GROUPS.replace(out_channels=80), Config(2, 1, 8, turns=True)),
    "whole vectors are filled up": (P(in_channels=100), Config(1, 2, 8, along_p=2)),
    "200 channels": (P(batch=1, in_channels=200), Config(1, 5, 8, filter_stages=6)),
    "NCHW": (P(in_channels=50, layout="NCHW"), Config(1, 2, 8, along_m=2)),
    "NCHW, images": (IMAGES.replace(layout="NCHW"), Config(8, 1, 2, True, turns=True)),
    "pixels": (P(in_channels=136, kernel_size=1, padding=0), Config(1, 1, 32, turns=True)),
    "pixels, split": (P(in_channels=200, kernel_size=1, padding=0), Config(1, 1, 40, split=2)),
    "every fourth pixel": (P(kernel_size=1, padding=0, stride=2), Config(1, 2, 8)),
}  # fmt: skip

# Of each kind one that keeps all of a device busy.
WIDE = ConvProblem(32, 128, (28, 28), 256, 3, 1, 1, dtype="float16", layout="NHWC")
BUSY = {
    "turns, resident": (
        WIDE.replace(in_channels=64),
        Config(1, 14, 8, turns=True, filter_stages=0, pixel_stages=3),
    ),
    "along channels": (WIDE, Config(1, 14, 8, along_m=2, pixel_stages=3, filter_stages=5)),
    "along rows": (WIDE, Config(1, 14, 8, along_p=2, pixel_stages=2, filter_stages=6)),
    "split": (
        WIDE.replace(batch=8, input_size=(7, 7), in_channels=256),
        Config(1, 7, 8, taps="row", split=4, pixel_stages=4),
    ),
    "images": (WIDE.replace(input_size=(7, 7)), Config(32, 1, 7, True, taps="row")),
    "dense": (WIDE.replace(stride=2), Config(1, 7, 8, dense=True, along_m=2)),
    "tf32": (WIDE.replace(dtype="float32"), Config(1, 14, 8, pixel_stages=3, filter_stages=6)),
    "tf32, dense images": (
        WIDE.replace(dtype="float32", stride=2, input_size=(14, 14)),
        Config(8, 1, 7, True, dense=True),
    ),
}


def cases() -> Iterator[tuple[str, ConvProblem, Config, Epilogue]]:
    """Each of the cases in one dtype and with one epilogue, which take turns."""
    for turn, (name, (problem, config)) in enumerate(CASES.items()):
        dtype, epilogue = tuple(FORMS)[turn % 3], EPILOGUES[turn % 8]
        yield name, problem.replace(dtype=dtype), config, epilogue


def drawn(seed: int, count: int, most_work: int = 2_000_000) -> list[tuple[ConvProblem, Config]]:
    """Seeded problems, each with a configuration that takes it; no proposals, so anything goes."""
    chance = random.Random(seed)
    found = []
    while len(found) < count:
        try:
            problem = _problem(chance, tuple(FORMS)[len(found) % 3])
        except ProblemError:  # a kernel larger than its input: draw again
            continue
        config = _config(chance)
        schedule = SCHEDULES[FORMS[problem.dtype]]
        refused = schedule.supports(problem, FEW) or schedule.check(config, problem, FEW)
        if problem.flops <= 2 * most_work and refused is None:
            found.append((problem, config))
    return found


def _problem(chance: random.Random, dtype: str) -> ConvProblem:
    groups = chance.choice([1, 1, 1, 2, 3])
    kernel = chance.randint(1, 5), chance.randint(1, 5)
    return ConvProblem(
        batch=chance.choice([1, 2, 7, 9, 17]),
        in_channels=groups * chance.choice([3, 16, 32, 40, 64, 72, 96, 100]),
        input_size=(chance.randint(1, 14), chance.randint(1, 20)),
        out_channels=groups * chance.choice([5, 16, 40, 64, 72, 136]),
        kernel_size=kernel,
        stride=(chance.randint(1, 4), chance.randint(1, 4)) if chance.random() < 0.6 else 1,
        padding=tuple((chance.randint(0, k), chance.randint(0, k)) for k in kernel),
        dilation=(chance.randint(1, 3), chance.randint(1, 3)) if chance.random() < 0.4 else 1,
        groups=groups,
        dtype=dtype,
        layout=chance.choice(["NHWC", "NHWC", "NCHW"]),
    )


def _config(chance: random.Random) -> Config:
    order = chance.choice(["images", "row", "rows"])
    n, h, w = {
        "images": (chance.choice([8, 8, 16, 24]), chance.randint(1, 3), chance.randint(1, 4)),
        "row": (chance.randint(1, 3), 1, chance.randint(1, 4) * 8),
        "rows": (chance.randint(1, 3), chance.randint(2, 4), 8),
    }[order]
    turns = chance.random() < 0.3
    split = chance.choice([1, 1, 2, 3, 4, 8])
    return Config(
        n, h, w, order == "images",
        along_m=1 if turns else chance.choice([1, 1, 2, 3, 4]),
        along_p=1 if turns else chance.choice([1, 1, 2, 3]),
        turns=turns,
        taps=chance.choice(["window", "window", "row", "tap"]),
        dense=chance.random() < 0.5,
        pixel_stages=chance.randint(2, 5),
        filter_stages=chance.choice([0, 2, 3, 4, 7]),
        split=1 if turns else split,
        blocks=chance.choice([1, 1, 1, 2, 3]),
    )  # fmt: skip


def case_id(case) -> str:
    """A test's name for a drawn problem and its configuration."""
    problem, config = case
    fields = ",".join(f"{k}={v}" for k, v in vars(config).items())
    return f"{problem}-{problem.layout}-{problem.dtype}-{fields}"
