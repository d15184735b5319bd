"""Problems and configurations that the tests of `cuda_thin` try, here and on a device."""

import itertools
import random
from collections.abc import Iterator

from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem, ProblemError
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cuda_thin_fp32_tiles import SplitGeometry
from im2win_tvm.schedules.cuda_thin_tiles import Config, Geometry
from im2win_tvm.target import CudaTarget


class Few(CudaTarget):
    """A Hopper of two multiprocessors: a block takes many tiles, and rings go round."""

    multiprocessors = 2


FEW = Few("sm_90a")
FORMS = {"float16": "cuda_thin", "bfloat16": "cuda_thin", "float32": "cuda_thin_tf32"}
EPILOGUES = [
    Epilogue(*parts) for parts in itertools.product([False, True], [False, True], [None, "relu"])
]
FULL = Epilogue(True, True, "relu")
BASE = ConvProblem(2, 3, (21, 23), 40, 3, 2, 1, dtype="float16", layout="NHWC")


def config(problem: ConvProblem, more: int = 1, **fields) -> Config:
    """A configuration with `more` stages than the fewest."""
    whole = -(-problem.out_channels // 8) * 8
    chosen = dict(block_n=whole, warpgroups=2, channels=problem.in_channels, rows=1, steps=2)
    chosen |= fields
    most = Geometry(problem, Config(stages=2, **chosen)).most_rows
    chosen["rows"] = min(chosen["rows"], most)
    g = Geometry(problem, Config(stages=2, **chosen))
    return Config(stages=g.fewest_stages + more, **chosen)


P = BASE.replace
# What is tried -> on which problem, and fields of its configuration; in one of the three dtypes,
# see `cases`.
CASES = {
    "stride 4, 11x11": (
        P(input_size=(27, 31), out_channels=96, kernel_size=11, stride=4, padding=0),
        dict(warpgroups=3, rows=4, steps=4),
    ),
    "7x7 stem": (P(input_size=(24, 33), kernel_size=7, padding=3), dict(rows=3)),
    "stride 1": (P(stride=1, input_size=(9, 30)), dict(warpgroups=4, steps=1)),
    "stride 1, filled up": (P(stride=1, input_size=(9, 30)), dict(channels=4, rows=2)),
    "stride 3": (P(stride=3, kernel_size=5, padding=2, input_size=(21, 40)), dict(rows=2)),
    "patches": (P(stride=4, kernel_size=4, padding=0, input_size=(25, 42)), dict(rows=4)),
    "large patches": (
        P(stride=16, kernel_size=16, padding=0, input_size=(32, 80), batch=3, out_channels=20),
        dict(block_n=16, warpgroups=1, steps=4),
    ),
    "rows that no window reads": (P(stride=(5, 3), kernel_size=2, padding=0), dict(rows=2)),
    "dilation": (
        P(in_channels=4, dilation=(2, 3), padding=((3, 2), (4, 1)), stride=(1, 2)),
        dict(steps=3),
    ),
    "dilation, filled up": (P(dilation=(1, 2), padding=1, stride=1), dict(channels=4)),
    "uneven padding": (P(padding=((0, 2), (3, 1)), kernel_size=(2, 4)), dict(warpgroups=1)),
    "one channel": (P(in_channels=1, stride=1, kernel_size=5, padding=2), dict(rows=3)),
    "one channel, filled up": (P(in_channels=1, stride=1, kernel_size=5), dict(channels=2)),
    "two channels": (P(in_channels=2, stride=1, kernel_size=(1, 7), padding=(0, 3)), dict()),
    "twelve channels": (P(in_channels=12, input_size=(9, 14)), dict(steps=4)),
    "wide rows": (P(in_channels=12, input_size=(4, 420), out_channels=8, stride=3), dict()),
    "tiles of channels": (P(out_channels=100), dict(block_n=40, steps=1)),
    "eight channels at a time": (P(out_channels=24), dict(block_n=8)),
    "odd output channels": (P(out_channels=37), dict(rows=2)),
    "pairs of output channels": (P(out_channels=42), dict(rows=2)),
    "many small images": (P(batch=40, input_size=(5, 6), padding=0), dict(warpgroups=3)),
    "one pixel an image": (P(batch=70, input_size=(3, 3), padding=0), dict(steps=1)),
    "two blocks": (P(batch=3), dict(blocks=2)),
    "four blocks": (P(batch=5), dict(warpgroups=1, blocks=4, steps=1)),
    "many stages": (P(batch=3), dict(more=9)),
    "two producers": (P(batch=3, stride=1, input_size=(9, 30)), dict(producers=2, rows=2)),
    "two producers of elements": (P(batch=3, dilation=2), dict(producers=2, rows=2)),
    "in turns": (P(batch=3), dict(warpgroups=3, turns=True)),
    "one by one": (P(batch=3, padding=0), dict(warpgroups=1, turns=True, steps=1)),
    "more copiers than a tile has rows": (
        P(kernel_size=1, padding=0, stride=1, input_size=(9, 70), batch=3),
        dict(more=0, producers=2),
    ),
    "odd images": (P(input_size=(21, 21)), dict()),
    "pairs, 11x11 stride 4": (
        P(input_size=(31, 39), out_channels=96, kernel_size=11, stride=4, padding=0),
        dict(warpgroups=3, rows=4, steps=3, pairs=True),
    ),
    "pairs, 7x7 stem": (
        P(input_size=(24, 33), kernel_size=7, padding=3),
        dict(pairs=True, turns=True),
    ),
    "pairs, stride 1": (P(stride=1, input_size=(9, 30), batch=3), dict(pairs=True, steps=1)),
    "pairs, filled up": (P(stride=1, input_size=(8, 30)), dict(pairs=True, channels=4)),
    "pairs, whole fours": (
        P(kernel_size=5, in_channels=8, stride=(3, 1)),
        dict(pairs=True, producers=2),
    ),
    "pairs, half a word at the end of a four": (
        P(in_channels=3, kernel_size=(4, 5), input_size=(13, 40)),
        dict(pairs=True),
    ),
    "pairs, one word a row": (
        P(in_channels=1, kernel_size=(5, 2), stride=2, batch=3, input_size=(13, 40)),
        dict(pairs=True),
    ),
    "pairs, many small images": (
        P(batch=40, input_size=(5, 6), padding=0, stride=1),
        dict(pairs=True),
    ),
}


def cases() -> Iterator[tuple[str, ConvProblem, Config, Epilogue]]:
    """Each of the cases in one dtype and layout and with one epilogue, which take turns."""
    for turn, (name, (problem, fields)) in enumerate(CASES.items()):
        dtype, layout = tuple(FORMS)[turn % 3], ("NHWC", "NCHW")[turn // 3 % 2]
        layout = "NHWC" if fields.get("pairs") else layout
        yield name, *case(problem, fields, dtype, layout), EPILOGUES[turn % 8]


def case(problem: ConvProblem, fields: dict, dtype: str, layout: str):
    """A problem of CASES in another dtype and layout, and its configuration."""
    problem = problem.replace(dtype=dtype, layout=layout)
    if layout != "NHWC":
        fields = fields | dict(pairs=False)
    if dtype == "float32":
        fields = {k: v for k, v in fields.items() if k != "channels"}
    return problem, config(problem, **fields)


def drawn(seed: int, count: int, most_work: int = 2_000_000) -> Iterator:
    """Seeded problems, each with a configuration that takes it; no proposals, so anything goes."""
    chance = random.Random(seed)
    found = 0
    while found < count:
        dtype = tuple(FORMS)[found % 3]
        try:
            problem = _problem(chance, dtype)
        except ProblemError:  # a kernel larger than its input: draw again
            continue
        if problem.flops > 2 * most_work:
            continue
        chosen = _config(chance, problem)
        schedule = SCHEDULES[FORMS[dtype]]
        if (schedule.supports(problem, FEW) or schedule.check(chosen, problem, FEW)) is None:
            found += 1
            yield problem, chosen


def _problem(chance: random.Random, dtype: str) -> ConvProblem:
    kernel = chance.choice([1, 2, 3, 3, 4, 5, 7]), chance.choice([1, 2, 3, 3, 4, 5, 7, 11])
    return ConvProblem(
        batch=chance.choice([1, 2, 3, 5]),
        in_channels=chance.choice([1, 2, 3, 3, 3, 4, 5, 7, 12]),
        input_size=(chance.randint(1, 30), chance.choice([chance.randint(1, 40), 70, 150])),
        out_channels=chance.choice([1, 5, 8, 10, 16, 20, 24, 32, 40, 64, 72, 100]),
        kernel_size=kernel,
        stride=(chance.randint(1, 5), chance.randint(1, 5)),
        padding=tuple((chance.randint(0, k), chance.randint(0, k)) for k in kernel),
        dilation=(chance.randint(1, 3), chance.randint(1, 3)) if chance.random() < 0.4 else 1,
        dtype=dtype,
        layout=chance.choice(["NHWC", "NCHW"]),
    )


def _config(chance: random.Random, problem: ConvProblem) -> Config:
    whole = -(-problem.out_channels // 8)
    channels = problem.in_channels
    if problem.itemsize == 2 and chance.random() < 0.4:
        channels += channels % 2
    fields = dict(
        block_n=8 * chance.choice([whole, max(1, whole // 2), chance.randint(1, whole)]),
        warpgroups=chance.randint(1, 4),
        channels=channels,
        steps=chance.randint(1, 4),
        blocks=chance.choice([1, 1, 2, 3]),
        producers=chance.choice([1, 1, 2]),
        turns=chance.choice([False, True]),
        pairs=chance.random() < 0.3,
    )
    most = Geometry(problem, Config(rows=1, stages=2, **fields)).most_rows
    rows = chance.randint(1, min(8, most))
    return config(problem, chance.randint(0, 4), rows=rows, **fields)


def case_id(case) -> str:
    """A test's name for a drawn problem and its configuration."""
    problem, chosen = case
    fields = ",".join(f"{k}={v}" for k, v in vars(chosen).items())
    return f"{problem}-{problem.layout}-{problem.dtype}-{fields}"


def fp32_config(problem: ConvProblem, more: int = 1, **fields) -> Config:
    """For `cuda_thin_fp32`, with `more` stages than the fewest; what threads have no registers for
    is done by fewer of them."""
    whole = -(-problem.out_channels // 8) * 8
    chosen = dict(block_n=whole, warpgroups=2, channels=problem.in_channels, rows=1, steps=1)
    chosen |= fields | dict(channels=problem.in_channels, pairs=False)
    chosen["steps"] = min(2, chosen["steps"])
    most = SplitGeometry(problem, Config(stages=2, **chosen)).most_rows
    chosen["rows"] = min(chosen["rows"], most)
    fewest = SplitGeometry(problem, Config(stages=2, **chosen)).fewest_stages
    config = Config(stages=fewest + more, **chosen)
    reason = SCHEDULES["cuda_thin_fp32"].check(config, problem, FEW) or ""
    if "room for" in reason and config.warpgroups > 1:
        return fp32_config(problem, more, **chosen | dict(warpgroups=config.warpgroups - 1))
    return config


def fp32_case(name: str, layout: str) -> tuple[ConvProblem, Config]:
    """A problem of CASES in float32, and its configuration for `cuda_thin_fp32`."""
    problem, fields = CASES[name]
    problem = problem.replace(dtype="float32", layout=layout)
    return problem, fp32_config(problem, **fields)


def drawn_fp32(seed: int, count: int, most_work: int = 1_000_000) -> Iterator:
    """As `drawn`, for `cuda_thin_fp32`."""
    chance = random.Random(seed)
    schedule = SCHEDULES["cuda_thin_fp32"]
    found = 0
    while found < count:
        try:
            problem = _problem(chance, "float32")
        except ProblemError:  # a kernel larger than its input: draw again
            continue
        if problem.flops > 2 * most_work or schedule.supports(problem, FEW):
            continue
        whole = -(-problem.out_channels // 8)
        chosen = fp32_config(
            problem, chance.randint(0, 4),
            block_n=8 * chance.choice([whole, max(1, whole // 2), chance.randint(1, whole)]),
            warpgroups=chance.randint(1, 4), rows=chance.randint(1, 8),
            steps=chance.randint(1, 2), blocks=chance.choice([1, 1, 2]),
        )  # fmt: skip
        if schedule.check(chosen, problem, FEW) is None:
            found += 1
            yield problem, chosen
