"""The distinct convolutions of a model, and how often it has each."""

from __future__ import annotations

from collections import Counter

import tvm

from ..problem import ConvProblem
from ..select import Choice
from ..target import Target
from .use_im2win import UseIm2win

__all__ = ["convolutions"]


def convolutions(
    module: tvm.IRModule,
    target: Target,
    *,
    layout: str | None = "NHWC",
    accuracy: str | None = None,
) -> dict[ConvProblem, int]:
    """The problems that `UseIm2win` would replace, with their numbers, in the model's order.

    Arguments as for `UseIm2win`. Nothing is compiled.
    """
    seen: list[ConvProblem] = []

    def count(problem: ConvProblem, choice: Choice) -> str:
        seen.append(problem)
        return "only counted"

    UseIm2win(target, layout=layout, accuracy=accuracy, keep=count)(module)
    return dict(Counter(seen))
