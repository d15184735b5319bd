"""Which convolutions the tests try: random but seeded ones, and those at the edges."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from math import prod

from im2win_tvm.problem import ConvProblem, ProblemError

DTYPES = ("float32", "float16")
LAYOUTS = ("NCHW", "NHWC")

# The edges of the problem space, one a line; every one is tried in every layout and dtype.
EDGES = {
    "one of everything": ConvProblem(1, 1, (1, 1), 1, 1),
    "one output": ConvProblem(1, 3, (5, 7), 4, (5, 7)),
    "one row": ConvProblem(2, 3, (1, 19), 5, (1, 3)),
    "one column": ConvProblem(2, 3, (19, 1), 5, (3, 1), 2),
    "1x1 kernel with stride": ConvProblem(3, 7, (9, 8), 6, 1, (4, 3)),
    "11x11 kernel": ConvProblem(1, 3, (27, 31), 9, 11, 4),
    "wide flat kernel": ConvProblem(1, 2, (6, 25), 3, (1, 11), 1, (0, 5)),
    "tall thin kernel": ConvProblem(1, 2, (25, 6), 3, (11, 1), 1, (5, 0)),
    "even kernel, uneven padding": ConvProblem(2, 3, (6, 7), 4, (2, 4), 1, ((0, 1), (1, 2))),
    "padding before only": ConvProblem(1, 3, (7, 5), 4, 3, 2, ((3, 0), (2, 0))),
    "padding after only": ConvProblem(1, 3, (7, 5), 4, 3, 2, ((0, 3), (0, 2))),
    "windows wholly in padding": ConvProblem(1, 2, (3, 2), 3, 2, 2, 5),
    "rows and columns never read": ConvProblem(1, 2, (12, 13), 3, 2, 5),
    "dilation wider than the input": ConvProblem(1, 2, (3, 4), 3, 2, 1, 3, (5, 7)),
    "dilation of rows only": ConvProblem(1, 4, (13, 9), 5, 3, (2, 1), 1, (3, 1)),
    "dilation of columns only": ConvProblem(1, 4, (9, 13), 5, 3, (1, 2), 1, (1, 3)),
    "groups": ConvProblem(2, 6, (8, 9), 9, 3, 1, 1, 1, 3),
    "depthwise": ConvProblem(2, 13, (8, 9), 13, 3, 2, 1, 1, 13),
    "depthwise with multiplier": ConvProblem(1, 5, (8, 9), 15, (3, 5), 1, 2, 1, 5),
    "groups of one input channel": ConvProblem(1, 3, (7, 7), 51, 3, groups=3),
    "prime channels": ConvProblem(1, 31, (7, 9), 37, 3, 1, 1),
    "one output channel": ConvProblem(2, 17, (9, 9), 1, 5, 1, 2),
    "K of thousands": ConvProblem(1, 515, (4, 5), 3, 3, 1, 1),
    "long batch": ConvProblem(37, 2, (3, 3), 3, 2),
    "more channels than a tile": ConvProblem(1, 3, (4, 3), 201, 2),
}


# For tensor cores: 40 channels of the input and 38 of the output a group, all tails, padding and
# steps that differ.
HALVES_RAGGED = ConvProblem(
    3, 80, (9, 11), 76, (3, 2), (1, 2), ((0, 1), (1, 0)), (1, 2), 2, "float16", "NHWC"
)


def edge_problems() -> Iterator[tuple[str, ConvProblem]]:
    """(name, problem) of every edge in every layout and dtype."""
    for name, problem in EDGES.items():
        for layout in LAYOUTS:
            for dtype in DTYPES:
                yield f"{name}-{layout}-{dtype}", problem.replace(layout=layout, dtype=dtype)


def odd_problems(seed: int, count: int, *, most_work: int = 4_000_000) -> list[ConvProblem]:
    """`count` different problems with nothing round about them, the same for the same seed.

    Strides 1 to 4, uneven padding, dilation 1 to 3, groups from one to depthwise with a channel
    multiplier, kernels from 1x1 to 11x11, K from 1 to thousands; layouts and dtypes take turns.
    most_work bounds the multiply-adds, and so the time a reference takes.
    """
    chance = random.Random(seed)
    found: list[ConvProblem] = []
    while len(found) < count:
        turn = len(found)
        try:
            problem = _draw(chance, LAYOUTS[turn % 2], DTYPES[turn // 2 % 2])
        except ProblemError:  # a kernel larger than its input: draw again
            continue
        elements = prod(problem.input_shape) + prod(problem.output_shape)
        if problem.flops <= 2 * most_work and elements <= 200_000 and problem not in found:
            found.append(problem)
    return found


def _draw(chance: random.Random, layout: str, dtype: str) -> ConvProblem:
    kernel = chance.choice(
        [(1, 1), (3, 3), (3, 3), (2, 5), (5, 5), (1, 7), (7, 1), (4, 2), (7, 7), (11, 11)]
    )
    kind = chance.choice(["dense", "dense", "deep", "groups", "depthwise", "multiplier"])
    groups, per_group_in, per_group_out = 1, chance.randint(1, 40), chance.randint(1, 70)
    if kind == "deep":
        per_group_in, per_group_out = chance.randint(100, 600), chance.randint(1, 20)
    elif kind == "groups":
        groups = chance.randint(2, 6)
        per_group_in, per_group_out = chance.randint(1, 9), chance.randint(1, 19)
    elif kind in ("depthwise", "multiplier"):
        groups, per_group_in = chance.randint(2, 40), 1
        per_group_out = 1 if kind == "depthwise" else chance.randint(2, 5)
    return ConvProblem(
        batch=chance.choice([1, 1, 2, 3, 7]),
        in_channels=groups * per_group_in,
        input_size=(chance.randint(1, 29), chance.randint(1, 29)),
        out_channels=groups * per_group_out,
        kernel_size=kernel,
        stride=(chance.randint(1, 4), chance.randint(1, 4)) if chance.random() < 0.6 else 1,
        padding=tuple(
            (chance.randint(0, extent), chance.randint(0, extent))
            if chance.random() < 0.6
            else (extent // 2, extent // 2)
            for extent in kernel
        ),
        dilation=(chance.randint(1, 3), chance.randint(1, 3)) if chance.random() < 0.4 else 1,
        groups=groups,
        dtype=dtype,
        layout=layout,
    )


def halves(problems: Iterable[ConvProblem]) -> list[ConvProblem]:
    """The problems in float16 and bfloat16 by turns, each once.

    Of three, one has eights of input channels a group and is in NHWC: what tensor cores like.
    """
    found = {}
    for turn, problem in enumerate(dict.fromkeys(p.replace(dtype="float16") for p in problems)):
        if turn % 3 == 0:
            channels = -(-problem.in_channels // problem.groups // 8) * 8 * problem.groups
            problem = problem.replace(in_channels=channels, layout="NHWC")
        found[problem.replace(dtype=("float16", "bfloat16")[turn % 2])] = None
    return list(found)


def problem_id(problem: ConvProblem) -> str:
    """A test's name for a problem: enough to run it again."""
    return f"{problem}-{problem.layout}-{problem.dtype}"
