"""Folders of logs: merged, and pruned to the best of each problem.

Records are written as this version writes them. A line that is none stays behind and is told; where
a record goes follows from its own fields and never from the name of the file that it came in.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..environment import device_name, slug
from ..heuristic import heuristic
from ..schedules import SCHEDULES
from ..target import CudaTarget, resolve
from .lookup import arch_of, lines
from .records import Record, read

__all__ = ["Refused", "merge", "prune"]

# A schedule's name, and so a file's: no path.
_NAME = re.compile(r"[a-z0-9_]{1,64}")


class Refused(NamedTuple):
    """A line that was left out: its file, its number, and why."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.reason}"


def merge(sources: Iterable[Path], place: Path) -> tuple[int, int, list[Refused]]:
    """Append the records of other places to `place`, those that it has already left out.

    How many were added, how many it had, and the lines that are no records. `place` is written file
    by file, each whole or not at all. Raises OSError.
    """
    known: dict[Path, set[bytes]] = {}
    added: dict[Path, list[bytes]] = {}
    had, refused = 0, []
    for source in sources:
        for path, number, record in _records(source, refused):
            name = slug(record.device)
            if not name or not _NAME.fullmatch(record.schedule):
                reason = "device and schedule: allowed are names of letters and digits"
                refused.append(Refused(path, number, reason))
                continue
            log = place / name / f"{record.schedule}.jsonl"
            if log not in known:
                records = (entry for _, entry in read(log) if isinstance(entry, Record))
                known[log] = {entry.line() for entry in records}
            line = record.line()
            if line in known[log]:
                had += 1
            else:
                known[log].add(line)
                added.setdefault(log, []).append(line)
    for log, fresh in added.items():
        before = log.read_bytes() if log.exists() else b""
        if before and not before.endswith(b"\n"):
            before += b"\n"
        _replace(log, before + b"".join(fresh))
    return sum(map(len, added.values())), had, refused


def prune(place: Path, keep: int) -> tuple[int, int, list[Refused]]:
    """Keep the fastest `keep` configurations of each problem, schedule, device and version.

    And the heuristic's of today, with which selection compares the others; a CPU's on that CPU.
    All records of a configuration stay or go together: the search's and the full one. Those with a
    wrong output stay, so that nobody takes them for untried; those that could not be measured go.
    How many records stay, how many go, and the lines that are no records, which go too. Not for a
    place that a session writes to meanwhile. Raises OSError.
    """
    stay, went, refused = 0, 0, []
    for path in sorted(place.glob("*/*.jsonl")):
        bad = [Refused(path, n, reason) for n, reason in read(path) if isinstance(reason, str)]
        if any(entry.number == 0 for entry in bad):  # not a file that can be read
            refused += bad
            continue
        records = [record for _, record in read(path) if isinstance(record, Record)]
        kept = _best(records, keep)
        if len(kept) < len(records) or bad:
            _replace(path, b"".join(record.line() for record in kept))
        stay, went = stay + len(kept), went + len(records) - len(kept)
        refused += bad
    return stay, went, refused


def _best(records: list[Record], keep: int) -> list[Record]:
    """Of each problem and version the fastest configurations and the wrong ones, in their order."""
    groups: dict[tuple, dict[str, list[Record]]] = {}
    for record in records:
        configs = groups.setdefault(_group(record), {})
        configs.setdefault(json.dumps(record.config, sort_keys=True), []).append(record)
    kept: set[int] = set()
    for configs in groups.values():
        wrong = [c for c in configs.values() if any(not r.passed and r.error is None for r in c)]
        timed = [c for c in configs.values() if c not in wrong and any(r.passed for r in c)]
        timed.sort(key=lambda of_one: min((r.protocol != "full", r.time_us) for r in of_one))
        usual = _heuristics(timed[0][0]) if len(timed) > keep else None
        timed = [of_one for n, of_one in enumerate(timed) if n < keep or of_one[0].config == usual]
        kept.update(id(record) for of_one in [*wrong, *timed] for record in of_one)
    return [record for record in records if id(record) in kept]


def _heuristics(record: Record) -> dict | None:
    """The configuration that its schedule's heuristic has for its problem on its device."""
    arch = record.target["arch"]
    try:
        if record.target["kind"] == "cuda":
            # Records do not tell sm_90a from sm_90; what is for the former alone asks for it.
            target = CudaTarget("sm_90a" if arch == "sm_90" else arch, record.device)
        else:
            target = resolve("llvm")
        if arch_of(target) != arch or device_name(target) != record.device:
            return None
        config = heuristic(SCHEDULES[record.schedule], record.problem, target)
    except Exception:  # none for what a stranger wrote
        return None
    return json.loads(json.dumps(asdict(config)))


def _group(record: Record) -> tuple:
    versions = record.versions.get("code"), record.versions.get("apache-tvm")
    target = record.target["kind"], record.target["arch"]
    return record.key, record.schedule, record.device, target, versions


def _records(place: Path, refused: list[Refused]) -> Iterator[tuple[Path, int, Record]]:
    for path, (number, record) in lines(place, None):
        if isinstance(record, Record):
            yield path, number, record
        else:
            refused.append(Refused(path, number, record))


def _replace(path: Path, text: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
