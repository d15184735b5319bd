"""What records gain over heuristics, by the times that logs have."""

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tuning_records import H100, PROBLEM, make, write

from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.select import untuned
from im2win_tvm.tuning import lookup

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "recorded_gains.py"
NAME = untuned(PROBLEM, H100).schedule.name
DEFAULT = SCHEDULES[NAME].default(PROBLEM, H100)
OTHER = asdict(next(c for c in SCHEDULES[NAME].configs(PROBLEM, H100) if c != DEFAULT))


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path)
    spec = importlib.util.spec_from_file_location("recorded_gains", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for schedule in SCHEDULES.values():  # the times here are made up
        monkeypatch.setattr(type(schedule), "microseconds", lambda *_: None)
    return module


def _record(us, day, changed=None):
    date = f"2026-01-{day:02}T00:00:00+00:00"
    return make(us, target=H100, schedule=NAME, changed=changed, date=date)


def test_a_gain_is_over_the_heuristics_record_of_the_day(script, tmp_path):
    assert script.gain(PROBLEM, H100, None) is None
    write(tmp_path, _record(9.0, 1), name=NAME)
    assert script.gain(PROBLEM, H100, None) == (1.0, None)
    write(tmp_path, _record(12.0, 8), _record(8.0, 9, OTHER), name=NAME)
    assert script.gain(PROBLEM, H100, None) == (1.5, NAME)
    row = script.row([PROBLEM, PROBLEM.replace(batch=7)], H100, None)
    assert row == ["1 of 2", "1", "1.50x", "1.50x", f"{NAME} 1"]
