"""The convolutions of a model that `im2win tune` is asked for, each with how often it has it."""

from __future__ import annotations

from pathlib import Path

from ..problem import ConvProblem
from ..target import Target

__all__ = ["of_model"]


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
