"""Tuning records: append-only JSON lines, one measured configuration each.

A line is data and nothing else: it is parsed as JSON and checked field by field, so that a log from
a stranger can at worst be useless. What cannot be read is a miss with its reason, never an error.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..problem import ConvProblem

__all__ = [
    "FORMAT",
    "PROTOCOLS",
    "STATES",
    "Line",
    "Record",
    "RecordError",
    "append",
    "key_of",
    "read",
    "shown",
]

#: Version of the record's schema.
FORMAT = 1
#: How a time was taken: in passing during a search, or by the protocol of `im2win bench`.
PROTOCOLS = ("search", "full")
#: The cache state whose time counts, by kind of target.
STATES = {"cuda": "cold", "llvm": "warm"}
# A line is about 800 bytes; a longer one than this is no record, and is not read to its end.
_LONGEST = 1 << 16
_SHOWN = 60


class RecordError(ValueError):
    """A line that is no record, or a configuration that is none of its schedule's."""


def key_of(problem: ConvProblem) -> ConvProblem:
    """The problem that its descriptor gives: the same for all that compute the same outputs."""
    return ConvProblem.parse(str(problem), dtype=problem.dtype, layout=problem.layout)


@dataclass(frozen=True)
class Record:
    """One configuration of one problem, measured on one device.

    config: fields of the schedule's Config as JSON has them. target: kind, and arch (an LLVM
    processor's name on llvm). device: its name. versions: `code` (see `code_version`),
    `apache-tvm`, and what else was there. times: by cache state `median_us`, `iqr_us` and `n`;
    empty where the check failed. relative_error: of all outputs; None where one is not finite.
    error: why the kernel could not be built or run, which says nothing of its outputs.
    """

    problem: ConvProblem
    schedule: str
    config: dict[str, Any]
    target: dict[str, str]
    device: str
    versions: dict[str, str | None]
    protocol: str
    passed: bool
    relative_error: float | None
    times: dict[str, dict[str, float]]
    epilogue: dict[str, Any] = field(default_factory=dict)
    driver: str | None = None
    commit: str | None = None
    date: str | None = None
    error: str | None = None

    @functools.cached_property
    def key(self) -> ConvProblem:
        """What the problem is found by; see `key_of`."""
        return key_of(self.problem)

    @property
    def time_us(self) -> float:
        """The median that counts, in microseconds; infinite where there is no right output."""
        return self.times[STATES[self.target["kind"]]]["median_us"] if self.passed else math.inf

    def line(self) -> bytes:
        """The record as one line of JSON."""
        problem = self.problem
        data = {
            "format": FORMAT,
            "problem": str(problem),
            "dtype": problem.dtype,
            "layout": problem.layout,
            **{name: value for name, value in asdict(self).items() if name in _ORDER},
            "check": {"passed": self.passed, "relative_error": self.relative_error},
            **({} if self.error is None else {"error": self.error}),
        }
        return json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Record:
        """The record of a line. Raises RecordError that says what is wrong with which field."""
        try:
            data = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"not JSON: {shown(error)}") from None
        if not isinstance(data, dict):
            raise RecordError(f"allowed: a JSON object, not {shown(data)}")
        if data.get("format") != FORMAT or isinstance(data["format"], bool):
            raise RecordError(f"format={shown(data.get('format'))}: this version reads {FORMAT}")
        check = _take(data, "check", dict)
        passed = _take(check, "passed", bool)
        target = _take(data, "target", dict)
        target = {name: _take(target, name, str) for name in ("kind", "arch")}
        if target["kind"] not in STATES:
            raise RecordError(f"kind={shown(target['kind'])}: allowed: {', '.join(STATES)}")
        protocol = _take(data, "protocol", str)
        if protocol not in PROTOCOLS:
            raise RecordError(f"protocol={shown(protocol)}: allowed: {', '.join(PROTOCOLS)}")
        times = _times(_take(data, "times", dict))
        if passed and STATES[target["kind"]] not in times:
            raise RecordError(f"times: {STATES[target['kind']]} is missing")
        versions = _take(data, "versions", dict)
        error = _text(data.get("error"), "error")
        if passed and error is not None:
            raise RecordError(f"error={shown(error)}: allowed: none where the check passed")
        return cls(
            problem=_problem(data),
            schedule=_take(data, "schedule", str),
            config=_config(data),
            target=target,
            device=_take(data, "device", str),
            versions={name: _text(value, name) for name, value in versions.items()},
            protocol=protocol,
            passed=passed,
            relative_error=_error(check),
            times=times,
            epilogue=_take(data, "epilogue", dict),
            **{name: _text(data.get(name), name) for name in ("driver", "commit", "date")},
            error=error,
        )


# Fields of a line that are fields of a Record, in their order on the line.
_ORDER = ("schedule", "config", "target", "device", "versions", "protocol", "times", "epilogue",
          "driver", "commit", "date")  # fmt: skip


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def shown(value: Any) -> str:
    """A value from a log, fit for a terminal: escaped, and cut off where it is long."""
    text = repr(str(value) if isinstance(value, Exception) else value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _take(data: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in data:
        raise RecordError(f"{name}: missing")
    if not isinstance(data[name], kind):
        raise RecordError(f"{name}={shown(data[name])}: allowed: a JSON {_WORDS[kind]}")
    return data[name]


_WORDS = {dict: "object", str: "string", bool: "boolean"}


def _text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RecordError(f"{name}={shown(value)}: allowed: a JSON string or null")
    return value


def _number(value: Any, name: str, least: float) -> float:
    """A finite number of at least `least`. JSON's integers may be too large for a float."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            if math.isfinite(float(value)) and value >= least:
                return value
    raise RecordError(f"{name}={shown(value)}: allowed: a finite number from {least:g}")


def _times(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    times = {}
    for state, value in data.items():
        if not isinstance(value, dict):
            raise RecordError(f"times={shown(data)}: allowed: an object for each cache state")
        times[state] = {
            "median_us": _number(value.get("median_us"), "median_us", 0),
            "iqr_us": _number(value.get("iqr_us"), "iqr_us", 0),
            "n": _number(value.get("n"), "n", 1),
        }
        if not times[state]["median_us"]:
            raise RecordError("median_us=0: allowed: more than 0")
    return times


def _error(check: dict[str, Any]) -> float | None:
    value = check.get("relative_error")
    return None if value is None else _number(value, "relative_error", 0)


def _config(data: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration: scalars, and lists of them."""
    config = _take(data, "config", dict)
    for name, value in config.items():
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, dict | list) for entry in entries):
            raise RecordError(f"config: {shown(name)}: allowed: a scalar or a list of scalars")
    return config


def _problem(data: dict[str, Any]) -> ConvProblem:
    text, dtype, layout = (_take(data, name, str) for name in ("problem", "dtype", "layout"))
    try:
        return _parsed(text, dtype, layout)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"problem={shown(text)}: {shown(error)}") from None


@functools.lru_cache(maxsize=1024)
def _parsed(text: str, dtype: str, layout: str) -> ConvProblem:
    """The problem of a descriptor, read once: a log has some lines of each."""
    return ConvProblem.parse(text, dtype=dtype, layout=layout)


class Line(NamedTuple):
    """One line of a file: its number from 1, and its record or why there is none."""

    number: int
    record: Record | str


def read(path: Path) -> tuple[Line, ...]:
    """The lines of a log, blank ones left out; a file that cannot be read is one bad line 0."""
    try:
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_size, state.st_ino)
    except OSError as error:
        return (Line(0, f"cannot be read: {error.strerror}"),)


@functools.lru_cache(maxsize=256)
def _read(path: Path, *_state: int) -> tuple[Line, ...]:
    """`read`, once for each state of the file."""
    lines = []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST + 1):
            number += 1
            if len(line) > _LONGEST:
                lines.append(Line(number, f"longer than {_LONGEST} bytes"))
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST)
            elif line.strip():
                lines.append(Line(number, _record(line)))
    return tuple(lines)


def _record(line: bytes) -> Record | str:
    try:
        return Record.parse(line)
    except RecordError as error:
        return str(error)
    except RecursionError:  # in showing what json just managed to read
        return "not a record: nested too deeply"


def append(path: Path, record: Record) -> None:
    """Add a record to a log, which is made with its folders where there is none.

    The line goes out in one write at the end of the file, so that several processes may append
    to one log, and is on the disk when this returns. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        line = record.line()
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line  # somebody died while writing: only that line is lost
        if os.write(handle, line) != len(line):
            raise OSError(f"{path}: written in part only: the disk is full")
        os.fsync(handle)
    finally:
        os.close(handle)
    if not size:
        _keep_name(path.parent)


def _keep_name(folder: Path) -> None:
    """Bring the name of a new file to the disk, too: a power cut may lose it otherwise."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
