"""What a tuning session and a measuring server tell each other: JSON, checked field by field.

A server that answers anything else is of no use, and no answer of one can do more harm than that.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..bench.timing import Limits, Times
from ..problem import ConvProblem
from .measuring import Measurement

__all__ = ["DESCRIBE", "MEASURE", "Asked", "Description", "MessageError", "answer", "results"]

#: Names of the functions that a server offers.
DESCRIBE, MEASURE = "im2win.describe", "im2win.measure"


class MessageError(ValueError):
    """A message that is none; the text says which field is wrong."""


@dataclass(frozen=True)
class Description:
    """A server: where it is, and on what it measures.

    host and process: for messages to people. kind and arch: of its target, as in a tuning record.
    device: its name in records. driver: the GPU's, None on a CPU. version: of this package.
    """

    host: str
    process: int
    kind: str
    arch: str
    device: str
    driver: str | None
    version: str

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Description:
        """From JSON. Raises MessageError, with the reason where the server has no device."""
        data = _object(text)
        if "refused" in data:
            raise MessageError(_take(data, "refused", str))
        strings = {
            name: _take(data, name, str) for name in ("host", "kind", "arch", "device", "version")
        }
        driver = _take(data, "driver", str | None)
        return cls(process=_take(data, "process", int), driver=driver, **strings)


@dataclass(frozen=True)
class Asked:
    """Kernels to measure: exported ones of a problem, by the names of their uploaded files."""

    problem: ConvProblem
    libraries: list[str]
    limits: Limits

    def text(self) -> str:
        """As JSON."""
        problem = self.problem
        return json.dumps(
            {
                "problem": str(problem),
                "dtype": problem.dtype,
                "layout": problem.layout,
                "libraries": self.libraries,
                "limits": asdict(self.limits),
            }
        )

    @classmethod
    def of(cls, text: str) -> Asked:
        """From JSON. Raises MessageError, and ProblemError where that is what is wrong."""
        data = _object(text)
        name, dtype, layout = (_take(data, field, str) for field in ("problem", "dtype", "layout"))
        libraries = _take(data, "libraries", list)
        for library in libraries:
            # In the folder of the session, where the client put it, and nowhere else.
            if not isinstance(library, str) or "/" in library or library in ("", ".", ".."):
                raise MessageError(f"libraries={library!r}: allowed: the name of an uploaded file")
        limits = _take(data, "limits", dict)
        seconds = {name: _number(limits, name) for name in ("warmup", "seconds")}
        calls = {name: _take(limits, name, int) for name in ("least", "most")}
        problem = ConvProblem.parse(name, dtype=dtype, layout=layout)
        return cls(problem, libraries, Limits(**seconds, **calls))


def answer(measured: list[Measurement] | str) -> str:
    """Measurements as JSON, or why the problem cannot be measured there."""
    if isinstance(measured, str):
        return json.dumps({"refused": measured})
    return json.dumps({"measurements": [asdict(entry) for entry in measured]}, allow_nan=False)


def results(text: str, count: int) -> list[Measurement] | str:
    """The measurements of `count` kernels, or why there are none. Raises MessageError."""
    data = _object(text)
    if "refused" in data:
        return _take(data, "refused", str)
    entries = _take(data, "measurements", list)
    if len(entries) != count:
        raise MessageError(f"measurements: {len(entries)} of them: allowed: {count}")
    return [_measurement(entry) for entry in entries]


def _measurement(data: Any) -> Measurement:
    data = _checked(data, "measurements", dict)
    error, relative = _take(data, "error", str | None), data.get("relative_error")
    passed, message = _take(data, "passed", bool), _take(data, "message", str)
    times = {}
    for state, entry in _take(data, "times", dict).items():
        entry = _checked(entry, f"times: {state}", dict)
        values = (_number(entry, name) for name in ("median_us", "iqr_us"))
        times[state] = Times(*values, n=_take(entry, "n", int))
    if error is None and passed and not times:
        raise MessageError("times={}: allowed: those of a right output")
    return Measurement(
        error,
        passed,
        None if relative is None else _number(data, "relative_error"),
        message,
        times,
    )


def _object(text: str) -> dict[str, Any]:
    try:
        return _checked(json.loads(text), "message", dict)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not a message: {str(error)[:80]}") from None


def _take(data: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in data:
        raise MessageError(f"{name}: is missing")
    return _checked(data[name], name, kind)


def _checked(value: Any, name: str, kind: Any) -> Any:
    # JSON's true is an int to Python, and none to anybody else.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        allowed = getattr(kind, "__name__", kind)
        raise MessageError(f"{name}={str(value)[:80]!r}: allowed: {allowed}")
    return value


def _number(data: dict[str, Any], name: str) -> float:
    value = _take(data, name, int | float)
    if not (math.isfinite(value) and value >= 0):
        raise MessageError(f"{name}={value}: allowed: finite numbers from 0")
    return float(value)
