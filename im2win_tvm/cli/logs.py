"""`im2win logs`: what is recorded of a problem, and folders of records merged and pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .metadata import fields
from .options import (
    PROBLEM_HELP,
    ArchOption,
    BatchSizeOption,
    DtypeOption,
    LayoutOption,
    TargetOption,
    parse_problem,
)

if TYPE_CHECKING:
    from ..problem import ConvProblem
    from ..target import Target
    from ..tuning.logs import Refused

app = typer.Typer(no_args_is_help=True, help="Find, merge and prune tuning records.")


@app.command()
def find(
    problem: Annotated[str, typer.Argument(metavar="PROBLEM", help=PROBLEM_HELP)],
    target: TargetOption = None,
    arch: ArchOption = None,
    dtype: DtypeOption = "float32",
    layout: LayoutOption = None,
    batch: BatchSizeOption = None,
    place: Annotated[
        list[Path] | None,
        typer.Option("--in", metavar="FOLDER", help="Default: the folders that `compile` reads."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the records of a problem, the fastest first, and why some do not count here."""
    from ..target import resolve
    from ..tuning import lookup

    _, wanted = parse_problem(problem, dtype, layout, batch)
    rows = _rows(wanted, resolve(target, arch=arch), place or lookup.places())
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        note = "" if row["unusable"] is None else f"  not used: {row['unusable']}"
        print(f"{row['result']:>12} {row['protocol']:6} {row['schedule']:20} {row['where']}{note}")
        print(f"{'':13}{fields(row['config'])}")
    print(f"{wanted} {wanted.dtype} {wanted.layout}: {len(rows)} records")


def _rows(problem: ConvProblem, target: Target, places: list[Path]) -> list[dict[str, Any]]:
    from ..bench.units import microseconds
    from ..environment import device_name
    from ..schedules import SCHEDULES
    from ..tuning import lookup
    from ..tuning.records import Record, RecordError, key_of
    from ..tuning.result import cause

    found = []
    for place in places:
        for path, (number, record) in lookup.lines(place, None):
            if not isinstance(record, Record) or record.key != key_of(problem):
                continue
            reason = lookup.stale(record, target, device_name(target), SCHEDULES)
            if reason is None:
                try:
                    schedule = SCHEDULES[record.schedule]
                    lookup.configuration(record, schedule, problem, target)
                except RecordError as error:
                    reason = str(error)
            row = {
                "where": f"{lookup.shown_path(path)}:{number}",
                "schedule": _safe(record.schedule),
                "config": {_safe(name): _safe(value) for name, value in record.config.items()},
                "result": f"{microseconds(record.time_us)} us" if record.passed else cause(record),
                "protocol": record.protocol,
                "device": _safe(record.device),
                "unusable": reason,
            }
            found.append((record.time_us, row))
    return [row for _, row in sorted(found, key=lambda pair: (pair[0], pair[1]["where"]))]


def _safe(value: Any) -> Any:
    """What a log says, fit for a terminal."""
    from ..tuning.records import shown

    return shown(value) if isinstance(value, str) and not value.isprintable() else value


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Taken from.")],
    out: Annotated[Path, typer.Option("--into", metavar="FOLDER", help="Added to.")],
) -> None:
    """Add the records of other folders to one, each once.

    Lines that are no records are left out and told, and make the command exit with 1.
    """
    from ..tuning import logs

    _require_folders(sources)
    added, had, refused = logs.merge(sources, out)
    print(f"{added} records added to {out}, which had {had} of them")
    _tell(refused)


@app.command()
def prune(
    place: Annotated[Path, typer.Argument(metavar="FOLDER", help="Changed in place.")],
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Configurations of each problem and schedule.")
    ] = 4,
) -> None:
    """Keep the fastest configurations of each problem, schedule, device and version.

    Wrong ones stay, too. Not while a session writes there. Lines that are no records go and are
    told, and make the command exit with 1.
    """
    from ..tuning import logs

    _require_folders([place])
    stay, went, refused = logs.prune(place, keep)
    print(f"{stay} records stay in {place}, {went} went")
    _tell(refused)


def _require_folders(places: list[Path]) -> None:
    for place in places:
        if not place.is_dir():
            raise typer.BadParameter(f"{place}: there is no such folder")


def _tell(refused: list[Refused]) -> None:
    for line in refused:
        print(f"refused {line}")
    if refused:
        raise typer.Exit(1)
