"""Models in files, where commands take them instead of problems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

__all__ = ["MODEL_FILES", "chosen_dtype", "model_in", "refuse"]

#: As `im2win_tvm.relax.models` has them, which a command that only shows its help does not import.
_SUFFIXES = (".onnx", ".pt2")
MODEL_FILES = "MODEL.onnx, or MODEL.pt2 by torch.export.save"


def model_in(arguments: Sequence[str]) -> Path | None:
    """The model that arguments name; None for problems. Raises BadParameter for both together."""
    named = [argument for argument in arguments if Path(argument).suffix in _SUFFIXES]
    if named and len(arguments) > 1:
        raise typer.BadParameter(f"{named[0]}: a model is allowed alone, without other arguments")
    return Path(named[0]) if named else None


def chosen_dtype(context: typer.Context, dtype: str) -> str | None:
    """That of --dtype if it was given: a model has its own."""
    return dtype if _was_given(context, "dtype") else None


def refuse(context: typer.Context, what: str, names: Sequence[str]) -> None:
    """Raise BadParameter for options that were given."""
    for name in names:
        if _was_given(context, name):
            option = next(p.opts[-1] for p in context.command.params if p.name == name)
            raise typer.BadParameter(f"{option}: not allowed with {what}, which has its own")


def _was_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name == "COMMANDLINE"
