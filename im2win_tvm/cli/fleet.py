"""Options of `im2win tune` for measuring on other devices than the first one here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..target import Target
    from ..tuning.fleet import Fleet

__all__ = ["DeviceKeyOption", "LocalGpusOption", "TrackerOption", "fleet"]

_PANEL = "Measuring on several GPUs"

TrackerOption = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="HOST:PORT",
        help="Measure on the servers of a TVM RPC tracker; they run python -m "
        "im2win_tvm.tuning.server. On a trusted network only: who reaches a tracker can run code "
        "on its servers. Needs --device-key; where no such GPU is here, --arch too.",
        rich_help_panel=_PANEL,
    ),
]
DeviceKeyOption = Annotated[
    str | None,
    typer.Option(
        "--device-key",
        metavar="KEY",
        help="Of the servers at the tracker, such as h100.",
        rich_help_panel=_PANEL,
    ),
]
LocalGpusOption = Annotated[
    str | None,
    typer.Option(
        "--local-gpus",
        metavar="LIST",
        help="Measure on these GPUs of this machine, too: all, or indices such as 0,1.",
        rich_help_panel=_PANEL,
    ),
]


def fleet(
    context: typer.Context,
    target: Target,
    tracker: str | None,
    device_key: str | None,
    local_gpus: str | None,
) -> Fleet | None:
    """The devices that the options name, given back when the command ends; None: they name none.

    Raises TuningError where none of them can be had.
    """
    if (tracker is None) != (device_key is None):
        raise typer.BadParameter("--tracker and --device-key: allowed: both or none")
    if tracker is None and local_gpus is None:
        return None
    if local_gpus is not None and target.kind != "cuda":
        raise typer.BadParameter(f"--local-gpus: target={target.kind}: allowed: cuda")
    from ..tuning.fleet import Fleet
    from ..tuning.remote import LocalServer, Tracker, gpus
    from ..tuning.server import address

    indices = [] if local_gpus is None else gpus(local_gpus)
    try:
        at = None if tracker is None else address(tracker)
    except ValueError as error:
        raise typer.BadParameter(f"--tracker: {error}") from None
    places = [] if at is None else [Tracker(at, device_key)]
    places += [LocalServer("cuda", index) for index in indices]
    return context.with_resource(Fleet(target, places))
