"""The command `im2win`: one file a command."""

from __future__ import annotations

import typer

from . import bench, compile, env, export, inspect, logs, tune, verify
from .errors import Group

__all__ = ["app", "main"]

app = typer.Typer(
    name="im2win",
    cls=Group,
    help="Im2win convolutions: measure, verify, tune, export and inspect kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    bench.bench,
    verify.verify,
    tune.tune,
    compile.compile,
    export.export,
    inspect.inspect,
    env.env,
):
    app.command()(command)
app.add_typer(logs.app, name="logs")


def main() -> None:
    """Entry point of the installed command."""
    app(prog_name="im2win")
