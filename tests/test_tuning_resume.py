"""Sessions that end at any moment, and go on from their log alone."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tuning_records import CPU, PROBLEM, failed, make, write
from typer.testing import CliRunner

import im2win_tvm
from im2win_tvm.bench import timing
from im2win_tvm.cli import app
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.tuning import lookup, session
from im2win_tvm.tuning.measuring import Measurement
from im2win_tvm.tuning.plan import proposer
from im2win_tvm.tuning.records import Record, read

ROOT = Path(im2win_tvm.__file__).parents[1]
TRIALS = 12
SCHEDULE = SCHEDULES["cpu_blocked"]
CONFIGS = list(SCHEDULE.configs(PROBLEM, CPU))


class Power(BaseException):
    """The end of the process: no handler of a session is for it."""


@pytest.fixture
def made_up(monkeypatch):
    """Sessions without kernels: what is built and measured is made up, the rest is as ever."""
    measured = []

    def build(self, asked):
        return [session._Candidate(*pair, RuntimeError("made up")) for pair in asked]

    def measure(self, problem, candidates, limits):
        measured.extend(candidate.config for candidate in candidates)
        return [_made_up(candidate.config) for candidate in candidates]

    monkeypatch.setattr(session.Builder, "begin", lambda self: None)
    monkeypatch.setattr(session.Session, "_build", build)
    monkeypatch.setattr(session.Session, "_measure", measure)
    return measured


def _made_up(config):
    """A time that has nothing to do with chance; every seventh hangs, every fifth is wrong."""
    index = CONFIGS.index(config)
    if index % 7 == 3:
        return Measurement("hangs: no answer within 60 s")
    if index % 5 == 2:
        return Measurement(None, False, None, "3 of 9 outputs are wrong")
    us = 20.0 + 7 * (index * 31 % 17) + index / 1024
    return Measurement(None, True, 1e-7, "", {"warm": timing.Times(us, 0.1, 5)})


def _run(place, resume):
    with session.Session(CPU, place, jobs=3, resume=resume) as running:
        searching = proposer(PROBLEM, SCHEDULE.name, CPU, TRIALS, seed=1)
        (result,) = running.tune(PROBLEM, {SCHEDULE.name: searching}, TRIALS)
    return result


def _log(place):
    return [
        (record.config, record.protocol, record.times, record.error, record.passed)
        for path in place.glob("*/*.jsonl")
        for record in (line.record for line in read(path))
        if isinstance(record, Record)
    ]


@pytest.mark.parametrize("torn", [False, True])
def test_a_session_that_dies_anywhere_goes_on_as_if_it_had_not(
    made_up, tmp_path, monkeypatch, torn
):
    """At every record in turn: the log is that of a session which nothing stopped."""
    whole = _run(tmp_path / "whole", False)
    wanted = _log(tmp_path / "whole")
    assert {config[3] for config in wanted} == {None, "hangs: no answer within 60 s"}
    assert whole.wrong
    right = session.append
    for last in range(len(wanted)):
        place = tmp_path / str(last)
        written = []

        def append(path, record, last=last, written=written):
            if len(written) < last:
                written.append(record)
                return right(path, record)
            if torn:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as file:
                    file.write(record.line()[:-40])
            raise Power

        with monkeypatch.context() as patch:
            patch.setattr(session, "append", append)
            with pytest.raises(Power):
                _run(place, False)
        made_up.clear()
        resumed = _run(place, True)
        assert _log(place) == wanted
        assert resumed.best().config == whole.best().config
        assert resumed.replayed == min(last, TRIALS)
        # What is measured again is the last round, which is one measurement, and no more.
        assert len(made_up) == len(wanted) - last


def test_the_same_log_gives_the_same_choice_and_nothing_is_measured(made_up, tmp_path):
    first = _run(tmp_path, False)
    (path,) = tmp_path.glob("*/*.jsonl")
    before = path.read_bytes()
    made_up.clear()
    second = _run(tmp_path, True)
    assert made_up == []
    assert path.read_bytes() == before
    assert (second.best(), second.wrong) == (first.best(), [
        (config, "its output was wrong") for config, _ in first.wrong
    ])  # fmt: skip
    assert second.errors == first.errors
    assert second.failures() == first.failures()
    # Without it, all is measured anew.
    _run(tmp_path, False)
    assert len(path.read_bytes().splitlines()) == 2 * len(before.splitlines())


def test_what_was_measured_otherwise_does_not_count(made_up, tmp_path):
    """With other code, another TVM or on another device."""
    record = make(1.0, protocol="search")
    for changes in (
        dict(versions=record.versions | {"code": "0123"}),
        dict(versions=record.versions | {"apache-tvm": "0.1"}),
        dict(device="Another"),
    ):
        place = tmp_path / repr(changes)[:20]
        path = write(place, record)
        path.write_bytes(replace(record, **changes).line())
        assert _run(place, True).replayed == 0


def test_of_several_records_the_last_counts_and_a_wrong_output_before_all(made_up, tmp_path):
    path = write(tmp_path, make(9.0, protocol="search"), make(5.0, protocol="search"))
    result = _run(tmp_path, True)
    assert result.records[0].time_us == 5.0
    path.unlink()
    write(tmp_path, failed(protocol="search"), make(5.0, protocol="search"))
    result = _run(tmp_path, True)
    assert result.wrong[0][0] == asdict(SCHEDULE.default(PROBLEM, CPU))
    assert result.best(result.heuristic) is None


def _tune(*arguments):
    arguments = ["tune", str(PROBLEM), *map(str, arguments), "--target", "llvm"]
    return CliRunner().invoke(app, arguments)


def test_a_full_disk_ends_a_session_and_costs_no_configuration(tmp_path, monkeypatch):
    """Every build fails for want of room, and none of them is told to be no good."""
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))
    write(tmp_path, make(5.0, protocol="search"))
    right = type(SCHEDULE).schedule

    def full(self, problem, config, target, epilogue):
        raise OSError(errno.ENOSPC, "No space left on device")

    space = namedtuple("Space", "total used free")(1 << 40, 1 << 40, 0)
    with monkeypatch.context() as patch:
        patch.setattr(type(SCHEDULE), "schedule", full)
        patch.setattr(shutil, "disk_usage", lambda folder: space)
        result = _tune("--trials", 3, "--resume")
    assert result.exit_code == 2
    assert "no room to build kernels" in result.stderr
    assert len(_log(tmp_path)) == 1
    assert type(SCHEDULE).schedule is right


def test_a_record_that_cannot_be_written_ends_a_session(made_up, tmp_path, monkeypatch):
    monkeypatch.setenv(lookup.VARIABLE, str(tmp_path))
    write(tmp_path, make(5.0, protocol="search"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: len(data) - 1)
        result = _tune("--trials", 3, "--resume")
    assert result.exit_code == 2
    assert "written in part only: the disk is full" in result.stderr
    assert _tune("--trials", 3, "--resume").exit_code in (0, 1)
    assert [entry[1] for entry in _log(tmp_path)].count("search") == 3


@pytest.mark.parametrize(
    ("kills", "trials", "jobs"),
    [(1, 2, 1), pytest.param(20, 24, 2, marks=pytest.mark.slow)],
)
def test_kill_and_resume(kills, trials, jobs):
    options = {"--kills": kills, "--trials": trials, "--jobs": jobs}
    command = [sys.executable, "scripts/kill_and_resume.py"]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"PASS {kills} kills" in done.stdout
