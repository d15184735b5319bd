"""Building and measuring candidates: outputs are checked, and one that crashes is lost alone."""

import fcntl
import multiprocessing
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import failing_build
import numpy as np
import pytest
from tuning_records import CPU, PROBLEM

import im2win_tvm
from im2win_tvm import artifact, builds, toolchain
from im2win_tvm.bench import timing
from im2win_tvm.bench.operands import HostOperands, TorchOperands
from im2win_tvm.tuning import measuring
from im2win_tvm.tuning.measuring import Measurement, Measurer, TuningError
from im2win_tvm.turns import turn

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=5)


@pytest.fixture(scope="module")
def kernel():
    return im2win_tvm.compile(PROBLEM, "llvm", schedule="cpu_blocked", config={})


@pytest.fixture
def measurer():
    with Measurer("llvm") as made:
        yield made


def _spoiled(kernel, path, body):
    """A library that passes for `kernel` until it is loaded, and then runs `body`."""
    source = path.with_suffix(".c")
    text = artifact.metadata_source(kernel.metadata)
    includes = "#include <stdlib.h>\n#include <unistd.h>\n"
    source.write_text(f"{includes}{text}__attribute__((constructor)) void f(void) {{ {body} }}\n")
    toolchain.run([toolchain.find_cc(), "-shared", "-fPIC", "-o", str(path), str(source)])
    artifact.seal(path)
    return path


def test_measuring(kernel, measurer, tmp_path):
    good = kernel.export(tmp_path / "good.so")
    wrong = im2win_tvm.compile(PROBLEM, "llvm", activation="relu").export(tmp_path / "wrong.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(good.read_bytes()[:-10])
    one, two, three = measurer.measure(PROBLEM, [good, wrong, damaged], BRIEF)
    assert (one.error, one.passed) == (None, True)
    assert 0 < one.relative_error < 1e-6
    assert one.times["warm"].n >= 3
    assert (two.error, two.passed, two.times) == (None, False, {})
    assert "outputs are wrong" in two.message
    assert three.error.startswith("ArtifactError: ")
    assert "cut short" in three.error
    # What a wrong kernel may have written over is made anew.
    assert measurer._process is None
    assert measurer.measure(PROBLEM, [good], BRIEF)[0].passed
    # After right ones the same process goes on, to another problem too.
    process = measurer._process.pid
    other = PROBLEM.replace(layout="NHWC")
    path = im2win_tvm.compile(other, "llvm").export(tmp_path / "other.so")
    assert measurer.measure(other, [path], BRIEF)[0].passed
    assert measurer._process.pid == process


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("abort();", r"ended its process \(SIGABRT\)"),
        ("*(volatile int *)0 = 1;", r"ended its process \(SIGSEGV\)"),
        ("_exit(7);", r"ended its process \(exit code 7\)"),
        ("for (;;) sleep(60);", "hangs: no answer within 1 s"),
    ],
)
def test_a_kernel_that_takes_its_process_down_is_lost_alone(
    kernel, measurer, tmp_path, body, error
):
    good = kernel.export(tmp_path / "good.so")
    assert measurer.measure(PROBLEM, [good], BRIEF)[0].passed
    # A crash takes its time: TVM writes where it was.
    measurer._patience = 1.0 if error.startswith("hangs") else measuring.PATIENCE
    (result,) = measurer.measure(PROBLEM, [_spoiled(kernel, tmp_path / "bad.so", body)], BRIEF)
    assert result.passed is False
    assert re.fullmatch(error, result.error)
    measurer._patience = measuring.PATIENCE
    assert measurer.measure(PROBLEM, [good], BRIEF)[0].passed


def test_of_those_that_name_a_file_one_measures_at_a_time(tmp_path, monkeypatch):
    lock, inside, seen = tmp_path / "gpu", [], []

    def together(self, problem, libraries, limits):
        inside.append(self)
        time.sleep(0.05)
        seen.append(len(inside))
        inside.remove(self)
        return [Measurement(passed=True)]

    monkeypatch.setattr(Measurer, "_together", together)

    def most(*locks):
        seen.clear()
        measure = [Measurer("llvm", lock=each).measure for each in locks]
        with ThreadPoolExecutor(len(locks)) as pool:
            futures = [pool.submit(each, PROBLEM, ["a"], BRIEF) for each in 2 * measure]
        assert all(future.result()[0].passed for future in futures)
        return max(seen)

    assert most(lock, lock) == 1
    assert most(lock, None) == 2


def test_ctrl_c_ends_the_child_before_the_turn_is_given_back(tmp_path, monkeypatch):
    measurer, seen = Measurer("llvm", lock=tmp_path / "gpu"), []

    def together(problem, libraries, limits):
        measurer._start()
        raise KeyboardInterrupt

    def stop():
        with pytest.raises(BlockingIOError), open(tmp_path / "gpu") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append(measurer._process.is_alive())
        return Measurer._stop(measurer)

    monkeypatch.setattr(measurer, "_together", together)
    monkeypatch.setattr(measurer, "_stop", stop)
    with pytest.raises(KeyboardInterrupt):
        measurer.measure(PROBLEM, ["a"], BRIEF)
    assert seen == [True]
    assert measurer._process is None


def test_a_process_that_is_killed_gives_its_turn_back(tmp_path):
    script = "import sys, time\nfrom im2win_tvm.turns import turn\n"
    script += "with turn(sys.argv[1]):\n    print('has it', flush=True)\n    time.sleep(60)\n"
    lock = tmp_path / "gpu"
    with subprocess.Popen([sys.executable, "-c", script, lock], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        began = time.monotonic()
        threading.Timer(0.3, other.kill).start()
        with turn(lock):
            assert 0.2 < time.monotonic() - began < 30


def test_of_several_the_bad_one_is_lost_alone(kernel, measurer, tmp_path):
    good, bad = kernel.export(tmp_path / "good.so"), tmp_path / "bad.so"
    libraries = [good, _spoiled(kernel, bad, "abort();"), good]
    one, two, three = measurer.measure(PROBLEM, libraries, BRIEF)
    assert two.error == "ended its process (SIGABRT)"
    for result in (one, three):
        assert (result.error, result.passed) == (None, True)
        assert result.times["warm"].n >= 3


def test_an_error_during_the_timing_is_of_one_alone(measurer, monkeypatch):
    """Of all that were timed together; of those alone, what comes of that counts."""
    wrong, right = Measurement(message="outputs are wrong"), Measurement(passed=True)
    asked = []

    def together(problem, libraries, limits):
        asked.append(libraries)
        if "bad" in libraries:
            return [wrong if name == "wrong" else Measurement("timing") for name in libraries]
        return [right] * len(libraries)

    monkeypatch.setattr(measurer, "_together", together)
    results = measurer.measure(PROBLEM, ["a", "wrong", "bad", "b"], BRIEF)
    # A wrong output counts, and is not asked for until it is right.
    assert results == [right, wrong, Measurement("timing"), right]
    assert asked == [["a", "wrong", "bad", "b"], ["a"], ["bad"], ["b"]]


def test_a_device_that_stays_busy_keeps_what_was_measured(measurer, monkeypatch):
    right, lost = Measurement(passed=True), Measurement("hangs")

    def together(problem, libraries, limits):
        if libraries == ["bad"]:
            raise TuningError("tensors and reference took more than 900 s")
        return [right] if libraries == ["a"] else [lost] * len(libraries)

    monkeypatch.setattr(measurer, "_together", together)
    assert measurer.measure(PROBLEM, ["a", "bad", "b"], BRIEF) == [right, lost, lost]


def test_a_process_that_cannot_be_killed_is_left_behind(measurer, monkeypatch):
    """One inside a driver takes no signal until the driver lets it."""

    def join(process, timeout=None):
        assert timeout is not None, "waits without a limit"

    monkeypatch.setattr(measuring, "ENDING", 0.5)
    measurer._start()
    process = measurer._process
    assert process in multiprocessing.active_children()
    with monkeypatch.context() as patch:
        patch.setattr(type(process), "exitcode", None)
        patch.setattr(type(process), "kill", lambda self: None)
        patch.setattr(type(process), "join", join)
        assert measurer._stop() == "still there 0.5 s after SIGKILL"
        # Nothing is timed beside it.
        with pytest.raises(TuningError, match=f"process {process.pid} measured before and was kil"):
            measurer.measure(PROBLEM, [], BRIEF)
    assert measurer._process is None
    assert process not in multiprocessing.active_children()
    process.kill()  # not closed: that would have raised
    process.join()
    assert measurer.measure(PROBLEM, [], BRIEF) == []


def test_what_cannot_be_measured_is_refused(measurer, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "PREPARATION", 0.0)
    with pytest.raises(TuningError, match="tensors and reference took more than 0 s"):
        measurer.measure(PROBLEM, [], BRIEF)
    assert measurer._process is None


def test_a_builder_outlives_a_build_that_ends_its_process(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(builds, "_build_to", failing_build.build_to)
    good = kernel.export(tmp_path / "good.so")
    with builds.Builder(2) as builder:
        ended, built = builder.build([None, good])
    assert str(ended) == "the process that built it ended"
    assert built.problem == PROBLEM


def test_an_interrupt_before_a_build_is_submitted_arrives_as_such(monkeypatch):
    def interrupted(self, pool):
        raise KeyboardInterrupt

    monkeypatch.setattr(builds._Waiting, "submit", interrupted)
    with builds.Builder(2) as builder:
        with pytest.raises(KeyboardInterrupt):
            list(builder.build([builds.Request(PROBLEM, CPU)]))


def test_a_builder_keeps_its_processes():
    with builds.Builder(2) as builder:
        pools = []
        for _ in range(2):
            (kernel,) = builder.build([builds.Request(PROBLEM, CPU)])
            assert kernel.problem == PROBLEM
            pools.append(builder._pool)
    assert pools[0] is pools[1] is not None
    assert builder._pool is None


def test_kernels_are_measured_on_torch_tensors(kernel, tmp_path):
    """As on CUDA, where the tensors are PyTorch's."""
    pytest.importorskip("torch")
    paths = [kernel.export(tmp_path / "good.so")]
    paths.append(im2win_tvm.compile(PROBLEM, "llvm", activation="relu").export(tmp_path / "b.so"))
    operands = TorchOperands(PROBLEM, device="cpu")
    good, wrong = measuring._measured(paths, BRIEF, operands, timing.CpuClock())
    assert good.passed
    assert good.times["warm"].n >= 3
    assert (wrong.error, wrong.passed, wrong.times) == (None, False, {})


def test_a_race_that_shows_after_the_timing_counts(kernel, tmp_path, monkeypatch):
    """Right once is not enough: outputs are checked before the timing and after it."""
    operands = HostOperands(PROBLEM)
    check, turns = operands.check, []

    def late(output, accuracy):
        assert accuracy == "fp32"
        turns.append(np.isfinite(output).all())
        return check(output * (1 if len(turns) == 1 else 2), accuracy)

    monkeypatch.setattr(operands, "check", late)
    path = kernel.export(tmp_path / "kernel.so")
    (result,) = measuring._measured([path], BRIEF, operands, timing.CpuClock())
    assert (result.error, result.passed, result.times) == (None, False, {})
    assert turns == [True, True]
