"""Measuring on several servers: nothing is lost with one that dies, hangs or is another device."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from tuning_records import CPU, PROBLEM
from typer.testing import CliRunner

import im2win_tvm
from im2win_tvm import environment
from im2win_tvm.bench import timing
from im2win_tvm.cli import app
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget
from im2win_tvm.tuning import fleet as fleets
from im2win_tvm.tuning import messages, records, remote, server, session
from im2win_tvm.tuning.fleet import Fleet
from im2win_tvm.tuning.lookup import arch_of
from im2win_tvm.tuning.measuring import Measurement, TuningError, first_line
from im2win_tvm.tuning.result import Watcher
from im2win_tvm.tuning.search import Listed

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)
TIMES = timing.Times(10.0, 1.0, 3)
HERE = messages.Description(
    "here", 1, "llvm", arch_of(CPU), environment.device_name(CPU), None, im2win_tvm.__version__
)


class Fake:
    """A place with one server in this process; `behave` is what it does with its n-th task."""

    def __init__(self, name, behave=lambda n, libraries: None, description=HERE):
        self.name, self.behave, self.description = name, behave, description
        self.measured = []

    def offers(self, offer):
        offer((self.name, lambda: self))

    def measure(self, problem, libraries, limits):
        self.measured.append(libraries)
        told = self.behave(len(self.measured), libraries)
        if isinstance(told, Exception):
            raise told
        return told or [Measurement(None, True, 0.0, str(b), {"warm": TIMES}) for b in libraries]

    def close(self):
        """Nothing to end: it has no process."""


@pytest.fixture
def paths(tmp_path):
    made = [tmp_path / f"{index}.so" for index in range(6)]
    for index, path in enumerate(made):
        path.write_bytes(bytes([index]))
    return made


def _each(fleet, paths):
    return [result.error or result.message for result in fleet.each(PROBLEM, paths, BRIEF)]


ALL = [str(bytes([index])) for index in range(6)]


def _slowly(n, libraries):
    time.sleep(0.05 if n == 1 else 0.0)


def test_results_come_in_order_and_all_servers_work(paths):
    slow, fast = Fake("slow", _slowly), Fake("fast", _slowly)
    with Fleet(CPU, [slow, fast]) as fleet:
        while len(fleet._idle()) < 2:
            fleet._happen()
        assert _each(fleet, paths) == ALL
        together = fleet.measure(PROBLEM, paths, BRIEF)
        assert fleet.driver is None
    assert [result.message for result in together] == ALL
    assert min(len(slow.measured), len(fast.measured)) > 0
    assert sorted(map(len, [*slow.measured, *fast.measured])) == [1] * 6 + [6]


def test_nothing_is_asked_for_before_somebody_can_measure_it(paths):
    """What is built ahead is for processes that build to decide."""
    asked, before, answer = [], [], threading.Event()

    def libraries():
        for path in paths:
            asked.append(path)
            yield path

    def both_wait():
        before.append(len(asked))
        answer.set()

    places = [Fake(name, lambda n, libraries: answer.wait(10.0) and None) for name in "ab"]
    with Fleet(CPU, places) as fleet:
        while len(fleet._idle()) < 2:
            fleet._happen()
        results = fleet.each(PROBLEM, libraries(), BRIEF)
        timer = threading.Timer(0.2, both_wait)
        timer.start()
        assert next(results).message == ALL[0]
        assert before == [2]
        results.close()
        # What was under way belongs to nobody, and the next search gets its own.
        assert _each(fleet, paths) == ALL


@pytest.mark.parametrize("way", ["dies", "hangs", "refuses"])
def test_what_a_lost_server_had_goes_to_another(paths, way):
    ended = threading.Event()

    def behave(n, libraries):
        if n < 2:
            return None
        if way == "hangs":
            ended.wait(30.0)
        return "no room for it" if way == "refuses" else OSError("connection reset")

    bad, good = Fake("bad", behave), Fake("good", _slowly)
    with Fleet(CPU, [bad, good], patience=0.05, preparation=0.1) as fleet:
        while len(fleet._idle()) < 2:
            fleet._happen()
        assert _each(fleet, paths) == ALL
        assert fleet.width == 2
        (lost,) = fleet.lost
        ended.set()
    reasons = {"dies": "OSError: connection", "hangs": "does not answer", "refuses": "no room"}
    assert lost.startswith(f"bad: {reasons[way]}")


def test_a_kernel_that_loses_servers_is_given_up(paths):
    def behave(n, libraries):
        return OSError("gone") if b"\x02" in libraries else None

    places = [Fake(name, behave) for name in "abc"]
    with Fleet(CPU, places) as fleet:
        while len(fleet._idle()) < 3:
            fleet._happen()
        results = _each(fleet, paths)
        assert results[2].startswith("lost its server 2 times: ")
        assert results[:2] + results[3:] == ALL[:2] + ALL[3:]
        assert len(fleet.lost) == 2


def test_without_servers_there_is_an_error_that_says_why(paths):
    with Fleet(CPU, [Fake("only", lambda n, libraries: OSError("gone"))]) as fleet:
        with pytest.raises(TuningError, match=r"no measuring server is left: only: OSError: gone"):
            _each(fleet, paths)
    with Fleet(CPU, [Fake("only", lambda n, libraries: "no room for it")]) as fleet:
        with pytest.raises(TuningError, match="only: no room for it"):
            _each(fleet, paths)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"device": "another"}, "device='another': the fleet measures with"),
        ({"kind": "cuda"}, "kind='cuda'"),
        ({"arch": "other"}, "arch='other'"),
        ({"version": "0"}, "version='0'"),
    ],
)
def test_a_server_of_another_kind_is_left_out(changed, reason):
    with pytest.raises(TuningError, match=f"no measuring server is left: it: {reason}"):
        Fleet(CPU, [Fake("it", description=replace(HERE, **changed))])


def test_a_target_without_a_device_gets_that_of_the_first_server():
    there = replace(HERE, kind="cuda", arch="sm_90", device="NVIDIA H100", driver="580.1")
    with Fleet(CudaTarget("sm_90a"), [Fake("it", description=there)]) as fleet:
        assert fleet.target == CudaTarget("sm_90a", "NVIDIA H100")
        assert fleet.driver == "580.1"
        other = replace(there, driver="590.2")
        assert fleet._unlike(other).startswith("driver='590.2'")
        assert fleet._unlike(replace(there, device="NVIDIA H200")).startswith("device=")


def test_messages():
    limits = timing.Limits(0.5, 1.0, 2, 7)
    asked = messages.Asked(PROBLEM, ["a.so"], limits)
    assert messages.Asked.of(asked.text()) == asked
    measured = [
        Measurement(None, True, 1e-7, "fine", {"warm": TIMES}),
        Measurement("hangs"),
        Measurement(None, False, None, "3 outputs are wrong"),
    ]
    assert messages.results(messages.answer(measured), 3) == measured
    assert messages.results(messages.answer("no room"), 3) == "no room"
    assert messages.Description.of(HERE.text()) == HERE


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.clear(), "error: is missing"),
        (lambda m: m.update(passed=1), "passed='1': allowed: bool"),
        (lambda m: m.update(times={}), "times={}: allowed: those of a right output"),
        (lambda m: m["times"]["warm"].update(median_us="1"), "median_us='1'"),
        (lambda m: m["times"]["warm"].update(median_us=-1.0), "median_us=-1.0: allowed: finite"),
        (lambda m: m["times"]["warm"].update(n=True), "n='True': allowed: int"),
        (lambda m: m.update(relative_error=float("nan")), "relative_error=nan"),
    ],
)
def test_an_answer_that_is_none_is_refused(spoil, reason):
    entry = asdict(Measurement(None, True, 1e-7, "fine", {"warm": TIMES}))
    spoil(entry)
    with pytest.raises(messages.MessageError, match=reason):
        messages.results(json.dumps({"measurements": [entry]}), 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"measurements": []}'])
def test_other_text_than_an_answer_is_refused(text):
    with pytest.raises(messages.MessageError):
        messages.results(text, 1)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.so", "..", "", 3])
def test_a_server_loads_what_was_uploaded_and_nothing_else(name):
    text = messages.Asked(PROBLEM, [name], BRIEF).text()
    with pytest.raises(messages.MessageError, match="allowed: the name of an uploaded file"):
        messages.Asked.of(text)


def test_a_server_without_a_device_says_so(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    answer = server.Service("cuda").describe()
    with pytest.raises(messages.MessageError, match="there is no CUDA device here"):
        messages.Description.of(answer)


def test_an_error_that_announces_others_is_told_with_the_last():
    error = RuntimeError("Error caught from RPC call:\nTraceback:\n  TargetError: arch=None")
    assert first_line(error) == ("RuntimeError: Error caught from RPC call: TargetError: arch=None")
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_an_address_is_a_host_and_a_port(text):
    with pytest.raises(ValueError, match="allowed: host:port"):
        server.address(text)


def test_addresses():
    assert server.address("10.0.0.1:9190") == ("10.0.0.1", 9190)
    assert server.address("[::1]:9190") == ("::1", 9190)


def test_gpus(monkeypatch):
    monkeypatch.setattr(remote.cuda_driver, "device_name", lambda i: "GPU" if i < 3 else None)
    assert remote.gpus("all") == [0, 1, 2]
    assert remote.gpus("2, 0") == [2, 0]
    for text in ("3", "0,0", "", "a"):
        with pytest.raises(TuningError, match="allowed: 'all', or some of 0,1,2"):
            remote.gpus(text)
    monkeypatch.setattr(remote.cuda_driver, "device_name", lambda i: None)
    with pytest.raises(TuningError, match="allowed: nothing: no GPU is here"):
        remote.gpus("all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tracker", "host:1"], "--tracker and --device-key: allowed: both or none"),
        (["--local-gpus", "all"], "--local-gpus: target=llvm: allowed: cuda"),
        (["--tracker", "host", "--device-key", "k"], "allowed: host:port"),
        (["--tracker", "127.0.0.1:1", "--device-key", "k"], "tracker=127.0.0.1:1: cannot be"),
    ],
)
def test_the_command_refuses(options, message):
    result = CliRunner().invoke(app, ["tune", str(PROBLEM), "--target", "llvm", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def _serve(*arguments):
    command = [sys.executable, "-m", "im2win_tvm.tuning.server", "--kind", "llvm", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, **quiet)


def test_of_two_local_servers_one_is_killed(tmp_path):
    """Real ones: they measure as a Measurer does, and end with their fleet."""
    kernel = im2win_tvm.compile(PROBLEM, "llvm", schedule="cpu_blocked", config={})
    path = kernel.export(tmp_path / "kernel.so")
    local = [remote.LocalServer("llvm") for _ in range(2)]
    with Fleet(CPU, local) as fleet:
        while len(fleet._idle()) < 2:
            fleet._happen()
        results = fleet.each(PROBLEM, [path] * 4, BRIEF)
        # Both are measuring, or starting to.
        first = next(results)
        os.killpg(local[0].process.pid, signal.SIGKILL)
        measured = [first, *results, *fleet.each(PROBLEM, [path], BRIEF)]
        assert len(fleet.lost) == 1
    for result in measured:
        assert (result.error, result.passed) == (None, True)
        assert 0 < result.relative_error < 1e-6
        assert result.times["warm"].n >= 3
    assert len(measured) == 5
    assert [server.process.returncode for server in local] == [-signal.SIGKILL, 0]


@pytest.mark.slow
def test_a_session_on_a_tracker_loses_servers_and_nothing_else(tmp_path, monkeypatch):
    """A real tracker and three servers: one is killed and one stops, in the middle of a search."""
    pytest.importorskip("tornado", reason="TVM's tracker needs tornado")
    from tvm.rpc.tracker import Tracker

    monkeypatch.setattr(session, "SEARCH", BRIEF)
    tracker = Tracker("127.0.0.1", 9190, 9290, silent=True)
    at = f"127.0.0.1:{tracker.port}"
    servers = [_serve("--tracker", at, "--key", "cpu") for _ in range(3)]
    default = SCHEDULES["cpu_blocked"].default(PROBLEM, CPU)
    configs = [replace(default, unroll=unroll) for unroll in range(1, 13)]
    faults = {4: (servers[0], signal.SIGKILL), 7: (servers[1], signal.SIGSTOP)}
    seen = []

    class Ends(Listed):
        def propose(self, count, trials):
            seen.append(len(trials))
            return super().propose(1 if len(trials) < 8 else count, trials)

    class Faulty(Watcher):
        def trial(self, result, record, replayed):
            if fault := faults.pop(len(seen), None):
                os.killpg(fault[0].pid, fault[1])

    try:
        fleet = Fleet(CPU, [remote.Tracker(server.address(at), "cpu")])
        while len(fleet._idle()) < 3:
            fleet._happen()
        # Their processes have started and have tensors: from here on no answer takes long.
        kernel = im2win_tvm.compile(PROBLEM, "llvm", schedule="cpu_blocked", config={})
        path = kernel.export(tmp_path / "first.so")
        assert all(result.passed for result in fleet.each(PROBLEM, [path] * 3, BRIEF))
        fleet._patience = 3.0
        with session.Session(CPU, tmp_path / "logs", 1, limits=BRIEF, measurer=fleet) as running:
            running.watcher = Faulty()
            (result,) = running.tune(PROBLEM, {"cpu_blocked": Ends(configs)}, 12)
    finally:
        for process in servers:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        tracker.terminate()
    assert not faults
    assert len(fleet.lost) == 2, fleet.lost
    assert "does not answer" in fleet.lost[1]
    assert (result.tried, result.errors, result.wrong) == (12, {}, [])
    (log,) = tmp_path.glob("logs/*/cpu_blocked.jsonl")
    written = [record for _, record in records.read(log)]
    assert all(isinstance(record, records.Record) and record.passed for record in written)
    searched = [record.config for record in written if record.protocol == "search"]
    assert searched == [asdict(config) for config in configs]


def test_a_session_of_a_fleet_builds_what_can_be_built(tmp_path, monkeypatch):
    """Kernels that cannot be built keep their place in the order."""
    schedule = SCHEDULES["cpu_blocked"]
    right, default = type(schedule).schedule, schedule.default(PROBLEM, CPU)

    def odd_only(self, problem, config, target, epilogue):
        if config.unroll % 2 == 0:
            raise RuntimeError("no way")
        return right(self, problem, config, target, epilogue)

    monkeypatch.setattr(type(schedule), "schedule", odd_only)
    configs = [replace(default, unroll=unroll) for unroll in (2, 1, 4, 6, 3, 8)]
    with session.Session(CPU, tmp_path, 1, BRIEF, measurer=Fleet(CPU, [Fake("it")])) as running:
        (result,) = running.tune(PROBLEM, {"cpu_blocked": Listed(configs)}, 6)
    ((reason, count),) = result.errors.items()
    assert (reason.endswith("RuntimeError: no way"), count) == (True, 4)
    searched = [r for r in result.records if r.passed and r.protocol == "search"]
    assert [record.config["unroll"] for record in searched] == [1, 3]
    assert fleets.LOSSES == 2
