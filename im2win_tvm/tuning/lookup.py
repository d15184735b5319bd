"""From a problem to its fastest tuning records, and why other records do not count.

Logs lie as `<place>/<device>/<name>.jsonl`. Places are asked in order: those of the environment
variable IM2WIN_TUNING_LOGS, then what ships with the package. The first that has a usable record
decides, since times from different places were not taken under the same conditions. A GPU without a
record of its own borrows from the others of its architecture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..environment import device_name, package_version, slug
from ..heuristic import heuristic
from ..problem import ConvProblem
from ..schedules import SCHEDULES, Schedule
from ..target import Target
from .code_version import code_version
from .records import Line, Record, RecordError, key_of, read, shown

__all__ = [
    "SHIPPED",
    "VARIABLE",
    "Found",
    "Match",
    "Miss",
    "arch_of",
    "configuration",
    "find",
    "lines",
    "named_places",
    "others",
    "places",
    "recorded",
    "shown_path",
    "stale",
]

#: The environment variable with further places, separated as in PATH; they come first.
VARIABLE = "IM2WIN_TUNING_LOGS"
#: The records that ship with the package.
SHIPPED = Path(__file__).parent.parent / "tuning_logs"
# What a configuration has to gain over the heuristic's: one kernel's medians within a run differ by
# about that, up to 1.4 % (docs/tuning.md).
_GAIN = 0.01


class Match(NamedTuple):
    """A usable record, its configuration as the schedule's Config, and where it is written."""

    record: Record
    config: Any
    path: Path
    line: int

    @property
    def rank(self) -> tuple:
        """Smaller is better: a time by the full protocol, then a shorter one.

        The time of a search is the smallest of many short measurements, and flatters.
        """
        return self.record.protocol != "full", self.record.time_us, str(self.path), self.line

    @property
    def seconds(self) -> float:
        """When it was measured, since 1970; 0 if the record does not tell."""
        try:
            return datetime.fromisoformat(self.record.date or "").timestamp()
        except (ValueError, OverflowError, OSError):  # whatever a log has there
            return 0.0


class Miss(NamedTuple):
    """A record that does not count: where it is, and why."""

    where: str
    reason: str


class Found(NamedTuple):
    """The best usable record of each schedule by its name, and what does not count."""

    matches: dict[str, Match]
    missed: tuple[Miss, ...]

    @property
    def best(self) -> Match | None:
        """The best record of all."""
        return min(self.matches.values(), key=lambda match: match.rank, default=None)


def named_places() -> list[Path]:
    """The folders with records that the environment names."""
    return [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]


def places() -> list[Path]:
    """The folders with records, in the order in which they are asked."""
    return [*named_places(), SHIPPED]


def lines(place: Path, device: str | None) -> Iterator[tuple[Path, Line]]:
    """Every line of a place about a device, or about any if it is None, in a fixed order."""
    folder = "*" if device is None else slug(device)
    for path in sorted(place.glob(f"{folder}/*.jsonl")):
        if os.path.isfile(path):  # never raises, as Path.is_file may
            for line in read(path):
                yield path, line


def find(problem: ConvProblem, target: Target, schedules: Mapping[str, Schedule]) -> Found:
    """The usable records of a problem for these schedules, which support it on the target.

    A target that names no device takes the records of every device of its architecture, and so does
    a GPU that has none in any place: what is fast on one is as a rule fast on its siblings.
    """
    device = device_name(target)
    found = _find(problem, target, device, schedules)
    if found.best is None and device is not None and target.kind == "cuda":
        borrowed = _find(problem, target, None, schedules)
        if borrowed.best is not None:
            return Found(borrowed.matches, found.missed)
    return found


def _find(
    problem: ConvProblem, target: Target, device: str | None, schedules: Mapping[str, Schedule]
) -> Found:
    """`find` among the records of one device, or of all if it is None."""
    missed: list[Miss] = []
    for place in places():
        if place != SHIPPED and not os.path.isdir(place):
            missed.append(Miss(str(place), f"{VARIABLE}: no such folder"))
        matches = _usable(place, problem, target, device, schedules, missed)
        if matches:
            return Found(matches, tuple(missed))
    return Found({}, tuple(missed))


def _usable(
    place: Path,
    problem: ConvProblem,
    target: Target,
    device: str | None,
    schedules: Mapping[str, Schedule],
    missed: list[Miss],
) -> dict[str, Match]:
    """The best record of each schedule in one place; misses are added to `missed`.

    What was searched has no part where another schedule is faster: to check a trace for tensor
    cores takes TVM's intrinsics, whose import takes seconds.
    """
    newest: dict[tuple[str, str, Path], Match] = {}
    usual: list[tuple[tuple[str, str], Match]] = []  # of heuristics' configurations
    wrong = set()
    wanted = key_of(problem)
    for path, (number, record) in sorted(lines(place, device), key=_is_searched):
        reason = record if isinstance(record, str) else None
        if isinstance(record, Record):
            if not _concerns(record, wanted, target, device, schedules):
                continue
            reason = stale(record, target, device, schedules)
        if reason is None and record.passed and schedules[record.schedule].searched:
            reason = _beaten(record, (m for key, m in newest.items() if key[:2] not in wrong))
        if reason is None:
            schedule = schedules[record.schedule]
            key = record.schedule, json.dumps(record.config, sort_keys=True)
            try:
                match = Match(
                    record, configuration(record, schedule, problem, target), path, number
                )
            except RecordError as error:
                reason = str(error)
            else:
                if record.error is not None:
                    reason = f"it was not measured: {shown(record.error)}"
                elif not record.passed:
                    wrong.add(key)
                    reason = "its output was wrong"
                else:
                    # A later time replaces an earlier one of the same kind, faster or not; not
                    # that of another device.
                    known = newest.get((*key, path))
                    if known is None or known.rank[0] >= match.rank[0]:
                        newest[(*key, path)] = match
                    if match.config == heuristic(schedule, problem, target):
                        usual.append((key, match))
        if reason is not None:
            missed.append(Miss(f"{shown_path(path)}:{number}", reason))
    # One wrong output outweighs any number of right ones: it may be a race.
    right = [(key[:2], match) for key, match in newest.items() if key[:2] not in wrong]
    return {
        name: _fastest(
            [match for key, match in right if key[0] == name],
            [match for key, match in usual if key[0] == name and key not in wrong],
        )
        for name in dict.fromkeys(key[0] for key, _ in right)
    }


def _is_searched(entry: tuple[Path, Line]) -> bool:
    record = entry[1].record
    return isinstance(record, Record) and getattr(SCHEDULES.get(record.schedule), "searched", False)


def _beaten(record: Record, matches: Iterable[Match]) -> str | None:
    """Which record of another schedule is as fast or faster; None if there is none."""
    others = (match for match in matches if match.record.schedule != record.schedule)
    best = min(others, key=lambda match: match.rank, default=None)
    if best is None or (record.protocol != "full", record.time_us) < best.rank[:2]:
        return None
    theirs = best.record
    return f"its {record.time_us:.2f} us are no less than {theirs.schedule}'s {theirs.time_us:.2f}"


def _fastest(matches: list[Match], usual: list[Match]) -> Match:
    """The best record of one schedule; usual: all of its heuristic's configuration."""
    protocol = min(match.rank[0] for match in matches)
    matches, usual = ([m for m in each if m.rank[0] == protocol] for each in (matches, usual))
    logs = dict.fromkeys(match.path for match in matches)
    best = [
        _fastest_of_log(*([m for m in each if m.path == path] for each in (matches, usual)))
        for path in logs
    ]
    return min(best, key=lambda match: match.rank)


def _fastest_of_log(matches: list[Match], usual: list[Match]) -> Match:
    """The best of one file.

    The same kernel's times differ from one day to another by more than configurations do. So each
    is compared with the heuristic's that is next to it in time, by turns with which it was measured
    as a rule, and less than `_GAIN` is no reason to leave the heuristic.
    """
    if not usual:
        return min(matches, key=lambda match: match.rank)

    def beside(match: Match) -> Match:
        when = match.seconds
        return min(usual, key=lambda u: (abs(u.seconds - when), abs(u.line - match.line)))

    def share(match: Match) -> float:
        return match.record.time_us / beside(match).record.time_us

    fastest = min(matches, key=lambda match: (share(match), match.rank))
    return fastest if share(fastest) <= 1 - _GAIN else beside(fastest)


def _concerns(
    record: Record,
    wanted: ConvProblem,
    target: Target,
    device: str | None,
    schedules: Mapping[str, Schedule],
) -> bool:
    """Whether a record is about what is asked for, usable or not."""
    if record.key != wanted:
        return False
    if device is None and record.target != {"kind": target.kind, "arch": arch_of(target)}:
        return False  # from the folder of another device
    return record.schedule in schedules or record.schedule not in SCHEDULES


def stale(
    record: Record, target: Target, device: str | None, schedules: Mapping[str, Schedule]
) -> str | None:
    """What about a record is not as it is here; None if everything is.

    device: the name of the one that is meant; None takes any.
    """
    if record.schedule not in schedules:
        return f"schedule={shown(record.schedule)}: there is no such schedule"
    here = {
        "kind": (record.target["kind"], target.kind),
        "arch": (record.target["arch"], arch_of(target)),
        "device": (record.device, record.device if device is None else device),
        "apache-tvm": (record.versions.get("apache-tvm"), package_version("apache-tvm")),
        "code": (record.versions.get("code"), code_version(schedules[record.schedule])),
    }
    for name, (theirs, ours) in here.items():
        if theirs is None or theirs != ours:
            return f"{name}={shown(theirs)}: here it is {ours!r}"
    return None


def recorded(
    where: list[Path],
    target: Target,
    problems: Collection[ConvProblem] = (),
    but: str | None = None,
) -> dict[tuple[ConvProblem, str], list[Match]]:
    """By problem and schedule, what was measured: on the target's device first, then elsewhere.

    Elsewhere: on other GPUs of its architecture. Each the fastest first and each configuration
    once, whatever version its record is of; those that the schedule of today does not take are left
    out. problems: as `key_of` has them; none of them takes all. but: a device whose records do not
    count.
    """
    found: dict[tuple[ConvProblem, str], dict[Any, Match]] = {}
    here, device = {"kind": target.kind, "arch": arch_of(target)}, device_name(target)

    def order(match: Match) -> tuple:
        return match.record.device != device, match.rank

    for place in where:
        for path, (number, record) in lines(place, None if target.kind == "cuda" else device):
            if isinstance(record, str) or not record.passed or record.schedule not in SCHEDULES:
                continue
            schedule, problem = SCHEDULES[record.schedule], record.key
            if record.target != here or record.device == but:
                continue
            if problems and problem not in problems:
                continue
            if target.kind != "cuda" and record.device != device:
                continue
            if schedule.supports(problem, target) is not None:
                continue
            try:
                config = configuration(record, schedule, problem, target)
            except RecordError:
                continue
            match = Match(record, config, path, number)
            known = found.setdefault((problem, record.schedule), {})
            if config not in known or order(match) < order(known[config]):
                known[config] = match
    return {key: sorted(known.values(), key=order) for key, known in found.items()}


def others(where: list[Path], target: Target) -> Iterator[Record]:
    """Right records of other GPUs of the target's architecture, whatever version they are of."""
    if target.kind != "cuda":
        return
    here, device = {"kind": target.kind, "arch": arch_of(target)}, device_name(target)
    for place in where:
        for _, (_, record) in lines(place, None):
            if (
                isinstance(record, Record)
                and record.passed
                and record.target == here
                and record.device != device
                and record.schedule in SCHEDULES
            ):
                yield record


def configuration(record: Record, schedule: Schedule, problem: ConvProblem, target: Target) -> Any:
    """A record's configuration as `schedule`'s Config.

    Raises RecordError unless it has exactly the fields of one, with values of their types, that
    the schedule's `check` accepts.
    """
    default = heuristic(schedule, problem, target)
    known = {entry.name: getattr(default, entry.name) for entry in fields(default)}
    for name in [*known, *record.config]:
        if (name in known) != (name in record.config):
            what = "missing" if name in known else "unknown"
            raise RecordError(f"config: field {shown(name)} is {what}")
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in record.config.items()
    }
    for name, value in values.items():
        kinds = type(value), type(known[name])
        if type(None) not in kinds and kinds[0] is not kinds[1]:
            raise RecordError(f"config: {name}={shown(value)}: allowed: {kinds[1].__name__}")
    try:
        config = type(default)(**values)
        reason = schedule.check(config, problem, target)
    except Exception as error:  # whatever a schedule does not expect: its record is of no use
        reason = f"{type(error).__name__}: {shown(error)}"
    if reason is not None:
        raise RecordError(f"config: {reason}")
    return config


def arch_of(target: Target) -> str:
    """What a record calls the architecture: LLVM's name of the processor, or sm_90 (and sm_90a)."""
    return target.arch.removesuffix("a") if target.kind == "cuda" else target.cpu


def shown_path(path: Path) -> str:
    """The path of a log, without the package's own place."""
    if path.is_relative_to(SHIPPED):
        return str(Path(SHIPPED.name) / path.relative_to(SHIPPED))
    return str(path)
