"""Records replayed: each configuration built again, its output checked, its time compared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..bench import timing
from ..builds import Builder, Request
from ..environment import device_name
from ..kernel import Kernel
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..target import Target
from .lookup import arch_of, configuration, lines, shown_path, stale
from .measuring import Measurement, Measurer, TuningError, first_line
from .records import STATES as COUNTED
from .records import Record, RecordError, key_of

__all__ = ["STATES", "Verdict", "verify"]

#: What may come of a line. `refused`: no record. `stale`, `elsewhere`: not verified, of other
#: versions, or of another device. `built`: no such device is here. `wrong`, `failed`: as told.
STATES = ("refused", "stale", "elsewhere", "failed", "wrong", "built", "right")


class Verdict(NamedTuple):
    """What came of one line, where it is (file:line), and what there is to say.

    faster: how many times as fast as recorded, where it was timed again.
    """

    where: str
    state: str
    text: str = ""
    faster: float | None = None


@dataclass
class _Case:
    """A configuration to replay, and the records of it with their places."""

    problem: ConvProblem
    schedule: str
    config: Any
    records: list[tuple[str, Record]] = field(default_factory=list)


def verify(
    places: Iterable[Path],
    target: Target,
    limits: timing.Limits,
    jobs: int,
    problems: Iterable[ConvProblem] = (),
    schedule: str | None = None,
    timed: bool = False,
) -> Iterator[Verdict]:
    """A verdict for every line of these places, refused ones first.

    Lines of other problems and schedules than those named are left out, once they were read.
    limits: of each measurement. timed: its time counts as well, against that of records of the
    full protocol. Nothing is written.
    """
    wanted = {key_of(problem) for problem in problems}
    cases: dict[tuple, _Case] = {}
    for place in places:
        for path, (number, record) in lines(place, None):
            where = f"{shown_path(path)}:{number}"
            if isinstance(record, str):
                yield Verdict(where, "refused", record)
            elif (not wanted or record.key in wanted) and schedule in (None, record.schedule):
                found = _case(record, target)
                if isinstance(found, Verdict):
                    yield found._replace(where=where)
                else:
                    key = found.problem, found.schedule, json.dumps(record.config, sort_keys=True)
                    cases.setdefault(key, found).records.append((where, record))
    here = device_name(target) is not None
    # Those of a problem together: tensors and reference are made once.
    waiting = iter(sorted(cases.values(), key=lambda case: str(case.problem)))
    with Builder(jobs) as builder, Measurer(target.kind) as measurer:
        # Nothing is built while something is measured: builds take every processor.
        while some := list(islice(waiting, max(jobs, 1))):
            requests = [_request(case, target) for case in some]
            for case, kernel in zip(some, list(builder.build(requests)), strict=True):
                came = _came(case, kernel, measurer if here else None, limits)
                for where, record in case.records:
                    yield _verdict(where, record, came, timed)


def _case(record: Record, target: Target) -> _Case | Verdict:
    """What to replay of a record, or why it is not."""
    device = device_name(target)
    if record.target != {"kind": target.kind, "arch": arch_of(target)} or (
        device is not None and record.device != device
    ):
        return Verdict("", "elsewhere", f"of {record.device!r}")
    reason = stale(record, target, device, SCHEDULES)
    if reason is not None:
        return Verdict("", "stale", reason)
    schedule, problem = SCHEDULES[record.schedule], record.key
    reason = schedule.supports(problem, target)
    if reason is None:
        try:
            config = configuration(record, schedule, problem, target)
            return _Case(problem, record.schedule, config)
        except RecordError as error:
            reason = str(error)
    return Verdict("", "refused", reason)


def _request(case: _Case, target: Target) -> Request:
    accuracy = SCHEDULES[case.schedule].accuracy(case.problem)
    return Request(case.problem, target, case.schedule, case.config, accuracy=accuracy)


def _came(
    case: _Case, kernel: Kernel | Exception, measurer: Measurer | None, limits: timing.Limits
) -> Measurement | None:
    """The measurement of a kernel; None of one that cannot be run here."""
    if isinstance(kernel, Exception):
        return Measurement(f"not built: {first_line(kernel)}")
    if measurer is None:
        return None
    with tempfile.TemporaryDirectory(prefix="im2win-") as folder:
        library = kernel.export(Path(folder) / "kernel.so")
        try:
            return measurer.measure(case.problem, [library], limits)[0]
        except TuningError as error:
            return Measurement(str(error))


def _verdict(where: str, record: Record, came: Measurement | None, timed: bool) -> Verdict:
    if came is None:
        return Verdict(where, "built")
    if came.error is not None:
        # What failed before may fail: its record says so.
        expected = record.error is not None
        return Verdict(where, "right" if expected else "failed", came.error)
    if not came.passed:
        expected = record.error is None and not record.passed
        return Verdict(where, "right" if expected else "wrong", came.message)
    if not record.passed:
        return Verdict(where, "right", "its output is right today")
    if not timed or record.protocol != "full":
        return Verdict(where, "right")
    now = came.times[COUNTED[record.target["kind"]]].median_us
    return Verdict(where, "right", "", record.time_us / now)
