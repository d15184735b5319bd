"""Tuning sessions: from the command to the records, and from these to the selection."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from tuning_records import CPU, H100, PROBLEM, failed, make, write
from typer.testing import CliRunner

import im2win_tvm
from im2win_tvm import Epilogue, environment, toolchain
from im2win_tvm.bench import timing
from im2win_tvm.cli import app
from im2win_tvm.cli.tune import _check_lock
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget
from im2win_tvm.tuning import lookup, plan, session
from im2win_tvm.tuning.measuring import Measurement, Measurer, TuningError
from im2win_tvm.tuning.records import Record, key_of, read
from im2win_tvm.tuning.result import Result
from im2win_tvm.tuning.search import Listed, RandomThenClimb, Trial

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)
TEXT = str(PROBLEM)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where records go and are looked for; the full protocol is a brief one."""
    monkeypatch.setattr(session, "limits_for", lambda target: BRIEF)
    monkeypatch.setattr(session, "SEARCH", BRIEF)
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv(lookup.VARIABLE, str(folder))
    return folder


@pytest.fixture
def tune():
    """Runs `im2win tune` in this process."""

    def run(*arguments):
        return CliRunner().invoke(app, ["tune", *map(str, arguments), "--target", "llvm"])

    return run


@pytest.fixture
def instant(monkeypatch):
    """Kernels are built, and take no time to be measured: all are right."""
    right = Measurement(None, True, 1e-7, "", {"warm": timing.Times(10.0, 0.1, 5)})
    monkeypatch.setattr(Measurer, "measure", lambda self, p, paths, limits: [right] * len(paths))


def _records(place):
    (path,) = place.glob("*/*.jsonl")
    found = [line.record for line in read(path)]
    assert all(isinstance(record, Record) for record in found), found
    return found


def test_tune_from_the_command_to_the_selection(tune, place, tmp_path):
    summary = tmp_path / "new" / "summary.json"
    result = tune(TEXT, "--trials", 5, "--json", summary)
    assert result.exit_code == 0, result.output
    records = _records(place)
    searched = [record for record in records if record.protocol == "search"]
    again = [record for record in records if record.protocol == "full"]
    assert len(searched) == 5
    heuristic = asdict(SCHEDULES["cpu_blocked"].default(PROBLEM, CPU))
    assert searched[0].config == heuristic
    assert heuristic in [record.config for record in again]
    assert session.FINALISTS <= len(again) <= session.FINALISTS + 1
    like = make()
    for record in records:
        assert record.passed
        assert record.relative_error < 1e-6
        assert record.times["warm"]["n"] >= 3
        assert (record.key, record.device, record.target) == (like.key, like.device, like.target)
        assert record.versions == record.versions | like.versions
        assert record.date is not None
    fastest = min(again, key=lambda record: record.time_us)
    choice = select(PROBLEM, CPU)
    assert (asdict(choice.config), choice.origin.kind) == (fastest.config, "record")
    assert choice.missed == ()
    (entry,) = json.loads(summary.read_text())
    assert entry["best"] == {
        "config": fastest.config,
        "time_us": fastest.time_us,
        "protocol": "full",
    }
    assert (entry["tried"], entry["wrong"], entry["errors"]) == (5, [], {})
    first, config, where = result.stdout.splitlines()
    assert first.startswith(f"{TEXT} float32 NCHW  cpu_blocked: 5 tried, best ")
    assert " us, heuristic " in first
    assert config.startswith("  lanes=")
    assert where == f"records: {next(place.glob('*/*.jsonl'))}"


def test_tune_again_measures_what_is_recorded(tune, place, tmp_path):
    """Records of another version become current ones, the fastest first."""
    stale = {"code": "0123", "apache-tvm": "0.1"}
    write(
        place,
        make(5.0, changed={"unroll": 2}, versions=stale),
        make(9.0, changed={"unroll": 3}, versions=stale),
        make(7.0, changed={"unroll": 4}, versions=stale),
        make(1.0, changed={"lanes": 3}, versions=stale),
    )
    assert select(PROBLEM, CPU).origin.kind == "heuristic"
    out = tmp_path / "out"
    result = tune("--again", "--trials", 3, "--out", out)
    assert result.exit_code == 0, result.output
    searched = [record for record in _records(out) if record.protocol == "search"]
    assert [record.config["unroll"] for record in searched] == [1, 2, 4]
    assert result.stdout.splitlines()[-1] == f"to use them: export IM2WIN_TUNING_LOGS={out}"
    for arguments in (["mb2" + TEXT[3:]], ["--dtype", "float16", TEXT]):
        refused = tune("--again", *arguments)
        assert refused.exit_code == 2
        assert "--again: no record of these problems on this device" in refused.stderr


def test_a_gpu_begins_with_what_others_of_its_architecture_have_on_record(place):
    """After the heuristic's configuration in a search, and as all there is with --again."""
    h200 = CudaTarget("sm_90a", "NVIDIA H200")
    schedule = SCHEDULES["cuda_simt"]
    default, configs = schedule.default(PROBLEM, h200), list(schedule.configs(PROBLEM, h200))
    theirs = [config for config in configs if config != default][:5]
    write(
        place,
        *(
            make(9.0 - i, target=H100, schedule="cuda_simt", changed=asdict(config))
            for i, config in enumerate(theirs)
        ),
        make(1.0, target=CudaTarget("sm_80", "NVIDIA A100"), schedule="cuda_simt"),
    )
    mine = make(99.0, target=h200, schedule="cuda_simt", changed=asdict(configs[-1]))
    write(place, mine)
    known = plan.elsewhere([PROBLEM], h200, [place])
    assert known == {(key_of(PROBLEM), "cuda_simt"): theirs[:1:-1]}
    search = plan.proposer(PROBLEM, "cuda_simt", h200, 16, seed=0, known=known)
    assert search.propose(4, []) == [default, *theirs[:1:-1]]
    found = plan.again([PROBLEM], h200, [place])[1]
    assert found == {(key_of(PROBLEM), "cuda_simt"): [configs[-1], *reversed(theirs)]}
    assert plan.elsewhere([PROBLEM], CPU, [place]) == {}
    # What this device measures of theirs changes nothing: a session that goes on begins as before.
    write(place, make(50.0, target=h200, schedule="cuda_simt", changed=asdict(theirs[-1])))
    assert plan.elsewhere([PROBLEM], h200, [place]) == known


def test_wrong_outputs_are_told_recorded_and_never_chosen(tune, place, monkeypatch):
    schedule = SCHEDULES["cpu_blocked"]
    right = type(schedule).schedule

    def wrong(self, problem, config, target, epilogue):
        spoilt = config != self.default(problem, target)
        epilogue = Epilogue(activation="relu") if spoilt else epilogue
        return right(self, problem, config, target, epilogue)

    monkeypatch.setattr(type(schedule), "schedule", wrong)
    result = tune(TEXT, "--trials", 3)
    assert result.exit_code == 1
    assert result.stdout.count("  WRONG lanes=") == 2
    assert sorted(record.passed for record in _records(place)) == [False, False, True, True]
    choice = select(PROBLEM, CPU)
    assert choice.config == schedule.default(PROBLEM, CPU)
    assert choice.origin.kind == "record"


def test_a_candidate_that_cannot_be_built_is_lost_alone(tune, place, instant, monkeypatch):
    schedule = SCHEDULES["cpu_blocked"]
    right = type(schedule).schedule
    built = []

    def second_fails(self, problem, config, target, epilogue):
        built.append(config)
        if len(built) == 2:
            raise RuntimeError("no\nway")
        return right(self, problem, config, target, epilogue)

    monkeypatch.setattr(type(schedule), "schedule", second_fails)
    result = tune(TEXT, "--trials", 3)
    assert result.exit_code == 0, result.output
    assert "  1 not built: RuntimeError: no" in result.stdout
    assert ": 3 tried, best " in result.stdout
    searched = [record for record in _records(place) if record.protocol == "search"]
    assert [record.error for record in searched] == [None, "not built: RuntimeError: no", None]
    assert [record.passed for record in searched] == [True, False, True]


def test_nothing_right_is_a_failure(tune, place, monkeypatch):
    monkeypatch.setattr(Measurer, "measure", lambda self, p, paths, limits: [Measurement("no")])
    result = tune(TEXT, "--trials", 2)
    assert result.exit_code == 1
    assert "2 tried, none right" in result.stdout
    assert "2 lost: no" in result.stdout


def test_a_wrong_output_in_the_end_outweighs_right_ones(place):
    """A race that the search did not see: its configuration is no longer the best."""
    record = make(1.0)
    result = Result(PROBLEM, "cpu_blocked", record.config)
    other = make(2.0, changed={"unroll": 2})
    result.add(replace(record, protocol="search"))
    result.add(other)
    assert result.best() == other
    result.add(record)
    assert result.best() == record
    result.add(failed(), "1 of 9 outputs are wrong")
    assert result.wrong == [(record.config, "1 of 9 outputs are wrong")]
    assert (result.best(), result.best(record.config)) == (other, None)


def test_seconds_end_a_search(tune, place, instant):
    result = tune(TEXT, "--trials", 50, "--seconds", 0.001)
    assert result.exit_code == 0, result.output
    assert ": 1 tried, " in result.stdout


def test_an_interrupt_that_was_swallowed_counts(place, instant):
    """As TVM does in a callback: the search ends before the next trial."""
    asked = []

    class Counting(Listed):
        def propose(self, count, trials):
            asked.append(len(trials))
            return super().propose(count, trials)

    default = SCHEDULES["cpu_blocked"].default(PROBLEM, CPU)
    configs = [default, replace(default, unroll=2), replace(default, unroll=3)]
    with session.Session(CPU, place, interrupted=lambda: len(asked) == 2) as running:
        with pytest.raises(KeyboardInterrupt):
            running.tune(PROBLEM, {"cpu_blocked": Counting(configs)}, 3)
    assert len(_records(place)) == 2
    assert running.results[0].tried == 2


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    """A real signal, to the whole group of processes as a terminal sends it."""
    command = [sys.executable, "-m", "im2win_tvm", "tune", "paper:conv9", "--mb", "1"]
    running = subprocess.Popen(
        [*command, "--target", "llvm", "--trials", "500", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(im2win_tvm.__file__).parents[1],
    )
    until = time.monotonic() + 60
    # What is said of a trial comes after its record, and so before the record of the next one.
    log = tmp_path / environment.slug(environment.device_name(CPU)) / "cpu_blocked.jsonl"
    while len(read(log)) < 2 and time.monotonic() < until:
        assert running.poll() is None, running.communicate()
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err and "Error" not in err
    assert re.search(r"cpu_blocked 1/500: best [0-9.]+ us, 1.00x the heuristic", err)
    assert "interrupted; what was measured is recorded" in out
    assert ", best " in out
    assert _records(tmp_path)[0].passed
    with pytest.raises(ProcessLookupError):  # nobody is left, or will be once it has noticed
        for _ in range(100):
            os.killpg(running.pid, 0)
            time.sleep(0.1)


def test_schedules_of_a_gpu_meet_in_one_last_round(place, monkeypatch):
    """Without a GPU: what is built and measured is made up, all between is what runs there."""
    monkeypatch.setattr(toolchain, "nvcc_version", lambda: "13.0")
    rounds, slow = [], {}

    def build(self, asked):
        return [session._Candidate(*pair, RuntimeError()) for pair in asked]

    def measure(self, problem, candidates, limits):
        rounds.append([c.result.schedule for c in candidates])
        cold = [700.0 - c.config.block_m - 150 * c.result.schedule.count("_") for c in candidates]
        if slow:
            cold = [
                us * slow.get(c.result.schedule, 1) for us, c in zip(cold, candidates, strict=True)
            ]
        return [
            Measurement(None, True, 1e-7, "", {
                "cold": timing.Times(us, 0.12345, 9), "hot": timing.Times(us / 2, 0.1, 9)
            })
            for us in cold
        ]  # fmt: skip

    monkeypatch.setattr(session.Builder, "begin", lambda self: None)
    monkeypatch.setattr(session.Session, "_build", build)
    monkeypatch.setattr(session.Session, "_measure", measure)
    for schedule in SCHEDULES.values():  # the times here are made up
        monkeypatch.setattr(type(schedule), "microseconds", lambda *_: None)
    names = ["cuda_simt", "cuda_simt_explicit"]
    proposers = {}
    for name in names:
        schedule = SCHEDULES[name]
        default, configs = schedule.default(PROBLEM, H100), schedule.configs(PROBLEM, H100)
        proposers[name] = RandomThenClimb([default], configs, 10)
    with session.Session(H100, place, jobs=4) as running:
        running.tune(PROBLEM, proposers, 20, patient=True)
    # The first of each, as many more as are built together, and then one search after the other.
    first, second = (["cuda_simt"], ["cuda_simt_explicit"])
    assert rounds[:-1] == [second] + [first] * 20 + [second] * 19
    assert set(rounds[-1]) == set(names)
    choice = select(PROBLEM, H100)
    assert choice.schedule.name == "cuda_simt_explicit"
    assert choice.origin.file.endswith("nvidia-h100/cuda_simt_explicit.jsonl")
    assert choice.rejected["cuda_simt"].endswith(" us by its own record (full)")
    record = read(Path(choice.origin.file))[0].record
    assert record.versions["nvcc"] == "13.0"
    assert record.times["cold"]["iqr_us"] == 0.123
    assert list(record.times) == ["cold", "hot"]
    # A schedule without hope has no second trial, and no part in the end.
    rounds.clear()
    slow["cuda_simt_explicit"] = 9.0
    proposers = {
        name: RandomThenClimb([SCHEDULES[name].default(PROBLEM, H100)], [], 10) for name in names
    }
    with session.Session(H100, place / "other", jobs=4) as running:
        results = running.tune(PROBLEM, proposers, 20)
        assert [result.tried for result in results] == [1, 1]
        assert rounds == [second, first, first]
        rounds.clear()
        proposers = {
            name: RandomThenClimb([SCHEDULES[name].default(PROBLEM, H100)], [], 10)
            for name in names
        }
        running.tune(PROBLEM, proposers, 20, patient=True)
        assert set(rounds[-1]) == set(names)
    # One that is behind after a quarter of its trials has no more, and the other has its time.
    slow["cuda_simt_explicit"] = 2.3
    proposers = {
        name: RandomThenClimb(
            [SCHEDULES[name].default(PROBLEM, H100)], SCHEDULES[name].configs(PROBLEM, H100), 10
        )
        for name in names
    }
    with session.Session(H100, place / "behind", jobs=4) as running:
        results = running.tune(PROBLEM, proposers, 20)
        assert [result.tried for result in results] == [20, 5]


def test_seconds_of_a_schedule_are_not_spent_by_others(place, monkeypatch):
    """The preferred schedule is searched last where it is the fastest."""
    clock, given = [100.0], {}
    names = ["cuda_simt", "cuda_simt_explicit"]

    def opened(self, searches, trials):
        clock[0] += 1
        for each, time_us in zip(searches, (1.0, 1.5), strict=True):
            each.trials.append(Trial(None, time_us))

    def searched(self, each, trials, seconds, bound):
        given[each.result.schedule] = seconds
        clock[0] += seconds

    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(session.Builder, "begin", lambda self: None)
    monkeypatch.setattr(session.Session, "_open", opened)
    monkeypatch.setattr(session.Session, "_search", searched)
    with session.Session(H100, place, jobs=1) as running:
        running.tune(PROBLEM, dict.fromkeys(names), 20, seconds=10.0)
    assert list(given.items()) == [(names[1], 10.0), (names[0], 9.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to tune"),
        ((TEXT, "--seconds", 0), "seconds=0.0: allowed: more than 0"),
        ((TEXT, "--time-limit", -1), "time-limit=-1.0: allowed: more than 0"),
        (("gone.onnx",), "gone.onnx: there is no such file"),
        (("gone.onnx", "--mb", 2), "--mb: not allowed with a model"),
        (("gone.onnx", TEXT), "a model is allowed alone"),
        ((TEXT, "--trials", 0), "--trials"),
        ((TEXT, "--schedule", "cuda_simt"), "allowed for llvm: cpu_blocked"),
        (("mb1ic4iw9oc4kw3",), "no schedule for llvm"),
        (("ic3",), "oc is missing"),
        (("--again",), "--again: no record of these problems on this device, or of "),
    ],
)
def test_refusals(tune, place, arguments, message):
    result = tune(*arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.output)
    assert not list(place.iterdir())


def test_tuning_needs_the_device():
    with pytest.raises(TuningError, match=r"target='cuda \(sm_90\)': tuning measures"):
        session.Session(CudaTarget("sm_90"), Path("."))


def test_a_lock_that_says_nothing_or_cannot_be_is_refused(tune, tmp_path):
    lock, gpu = tmp_path / "lock", CudaTarget("sm_90a")

    def said(*arguments):
        result = tune(TEXT, "--lock", lock, *arguments)
        assert result.exit_code == 2
        return " ".join(result.stderr.replace("│", " ").split())

    assert "--lock: target=llvm: allowed: cuda" in said()
    assert "--lock: allowed without --verify-logs" in said("--verify-logs")
    with pytest.raises(typer.BadParameter, match="--lock: allowed without --tracker and --local-"):
        _check_lock(lock, gpu, True)
    with pytest.raises(typer.BadParameter, match=f"--lock={tmp_path}: Is a directory"):
        _check_lock(tmp_path, gpu, False)
    assert list(tmp_path.iterdir()) == []
    _check_lock(lock, gpu, False)
    assert lock.read_bytes() == b""
