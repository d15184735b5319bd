"""What a log has already: trials that a resumed session takes over instead of measuring them.

A session is resumed from its log alone. Its searches draw the same configurations from the same
seed and the same times, so that one which finds every trial up to some point in the log goes on
from there as if it had never stopped. There is no other state that could be lost or disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..target import Target
from .lookup import stale
from .records import Record, key_of, read

__all__ = ["Replay"]


class Replay:
    """The records of a log that were measured with today's code on the target's device.

    logs: by schedule. device: its name. They are read here, once: what is measured from now on
    is no part of it. Of several records of a configuration the last counts, and a wrong output
    before any time, as in the selection.
    """

    def __init__(self, logs: Iterable[Path], target: Target, device: str) -> None:
        self._known: dict[tuple, Record] = {}
        for path in logs:
            for _, record in read(path):
                if isinstance(record, Record) and not stale(record, target, device, SCHEDULES):
                    key = _key(record.schedule, record.key, record.config, record.protocol)
                    if not _is_wrong(self._known.get(key)):
                        self._known[key] = record

    def get(
        self, schedule: str, problem: ConvProblem, config: dict[str, Any], protocol: str
    ) -> Record | None:
        """The record of a configuration; None where it is still to be measured."""
        return self._known.get(_key(schedule, key_of(problem), config, protocol))


def _is_wrong(record: Record | None) -> bool:
    return record is not None and record.error is None and not record.passed


def _key(schedule: str, problem: ConvProblem, config: dict[str, Any], protocol: str) -> tuple:
    return schedule, problem, json.dumps(config, sort_keys=True), protocol
