"""The problems that `im2win tune` is asked for, each with how often it is wanted."""

from __future__ import annotations

from pathlib import Path

from ..problem import ConvProblem
from ..suites import suite
from ..target import Target
from .options import parse_problem

__all__ = ["named", "of_model"]


def named(
    texts: list[str], suite_name: str | None, batch: int | None, dtype: str, layout: str | None
) -> dict[ConvProblem, int]:
    """The distinct problems of arguments and of a suite, once each.

    Raises ProblemError or SuiteError.
    """
    chosen = [parse_problem(text, dtype, layout, batch)[1] for text in texts]
    if suite_name is not None:
        chosen += suite(suite_name, batch, dtype, layout).values()
    return dict.fromkeys(chosen, 1)


def of_model(
    path: Path, dtype: str | None, layout: str | None, target: Target, accuracy: str | None
) -> dict[ConvProblem, int]:
    """The distinct convolutions of a model, with their numbers; dtype as in `relax.read`.

    Raises ModelError.
    """
    from ..relax.convolutions import convolutions
    from ..relax.models import ModelError, read

    found = convolutions(read(path, dtype), target, layout=layout or "NHWC", accuracy=accuracy)
    if not found:
        raise ModelError(f"{path}: no convolution in it that a schedule takes")
    return found
