"""TVM's conv2d tuned by MetaSchedule: which records are taken, and what is built of them."""

import subprocess
import sys

import pytest
from tvm import relax, s_tir
from tvm.s_tir import meta_schedule as ms

from im2win_tvm import environment
from im2win_tvm.bench import baselines, metaschedule_tuning, timing
from im2win_tvm.bench.baselines import metaschedule
from im2win_tvm.bench.baselines.tvm_tuned import TvmTuned
from im2win_tvm.bench.operands import HostOperands
from im2win_tvm.bench.run import run
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import CudaTarget, resolve

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=1, most=3)
PROBLEM = ConvProblem(2, 6, (9, 8), 10, 3, stride=2, padding=((0, 1), (2, 1)), groups=2)
LLVM = resolve("llvm")
MARK = "pragma_auto_unroll_max_step"


@pytest.fixture
def logs(tmp_path, monkeypatch, request):
    """An empty tuning_logs. Unless `as_it_is` is asked for, traces made by hand are taken, too."""
    root = tmp_path / "tuning_logs"
    monkeypatch.setattr(metaschedule, "TUNING_LOGS", root)
    if "as_it_is" not in request.fixturenames:
        monkeypatch.setattr(metaschedule, "refusal", lambda *_: None)
    return root


@pytest.fixture
def as_it_is():
    """See `logs`."""


def _function(problem):
    return metaschedule.prim_func(metaschedule.legalized(problem, LLVM.tvm()))


def _record(problem, seconds, mark):
    """A record that runs the outermost loop in parallel; the number `mark` tells it apart."""
    function = _function(problem)
    module = ms.tir_integration._normalize_mod(function)
    schedule = s_tir.Schedule(module)
    for name in ("conv2d_nchw", "group_conv2d_nchw", "conv2d_nhwc"):
        if f'"{name}"' in str(module):
            (loop, *_) = schedule.get_loops(schedule.get_sblock(name))
    schedule.parallel(loop)
    schedule.annotate(loop, MARK, mark)
    info = ms.arg_info.ArgInfo.from_prim_func(module["main"])
    workload = ms.database.Workload(module)
    return ms.database.TuningRecord(schedule.trace, workload, [seconds], LLVM.tvm(), info)


@pytest.mark.parametrize(
    "problem",
    [
        PROBLEM,
        PROBLEM.replace(layout="NHWC", groups=1),
        ConvProblem(1, 3, (6, 7), 4, (3, 2), padding=1, dilation=(1, 2), dtype="float16"),
        ConvProblem(1, 3, (6, 7), 4, (3, 2), padding=1, dilation=(1, 2), dtype="bfloat16"),
    ],
    ids=str,
)
def test_the_best_record_is_built_and_computes_the_convolution(problem, logs):
    path = metaschedule.folder(problem, LLVM)
    for seconds, mark in ((2e-3, 71), (1e-3, 72), (3e-3, 73)):
        metaschedule_tuning.keep(_record(problem, seconds, mark), path)
    entry = TvmTuned()
    assert entry.available(problem, LLVM) is None
    module, detail = entry.module(problem, LLVM, LLVM.tvm())
    text = str(metaschedule.prim_func(module))
    assert "T.parallel" in text
    assert f'"{MARK}": 72' in text
    assert text.count(MARK) == 1
    assert detail["tuned_us"] == pytest.approx(1000.0)
    assert detail["records"] == f"{environment.device_slug(LLVM)}/metaschedule/{path.name}"
    operands = HostOperands(problem)
    prepared = entry.prepare(operands, LLVM)
    outcome = operands.check(prepared.view(prepared.call()))
    assert outcome.relative_error < (1e-6 if problem.dtype == "float32" else 1e-2)
    sums = {"float16": "float16", "bfloat16": "float32"}.get(problem.dtype)
    assert prepared.detail.get("accumulates") == sums


def test_records_of_the_users_own_come_first(logs, tmp_path, monkeypatch):
    own = tmp_path / "own"
    metaschedule_tuning.keep(_record(PROBLEM, 1e-3, 71), metaschedule.folder(PROBLEM, LLVM))
    metaschedule_tuning.keep(_record(PROBLEM, 2e-3, 72), metaschedule.folder(PROBLEM, LLVM, own))
    monkeypatch.setenv("IM2WIN_TUNING_LOGS", str(own))
    module, _ = TvmTuned().module(PROBLEM, LLVM, LLVM.tvm())
    assert f'"{MARK}": 72' in str(metaschedule.prim_func(module))
    monkeypatch.setenv("IM2WIN_TUNING_LOGS", str(tmp_path / "none"))
    module, _ = TvmTuned().module(PROBLEM, LLVM, LLVM.tvm())
    assert f'"{MARK}": 71' in str(metaschedule.prim_func(module))


def test_default_passes_keep_the_schedule(logs):
    """The competitor would be TVM's default under another name if they did not."""
    metaschedule_tuning.keep(_record(PROBLEM, 1e-3, 71), metaschedule.folder(PROBLEM, LLVM))
    module, _ = TvmTuned().module(PROBLEM, LLVM, LLVM.tvm())
    with LLVM.tvm():
        lowered = relax.get_default_pipeline(LLVM.tvm())(module)
    assert f'"{MARK}": 71' in str(lowered["conv2d"])
    assert lowered["conv2d"].attrs["tirx.is_scheduled"]


def test_a_trace_that_is_no_searchs_is_a_gap(logs, as_it_is):
    metaschedule_tuning.keep(_record(PROBLEM, 1e-3, 71), metaschedule.folder(PROBLEM, LLVM))
    (layer,) = run({"it": PROBLEM}, LLVM, [TvmTuned()], BRIEF)["layers"]
    (entry,) = layer["implementations"]
    assert entry["status"] == "absent"
    assert "MissingRecord: trace: " in entry["reason"]


def test_bench_against_tuned_and_untuned(logs):
    other = PROBLEM.replace(batch=1)
    metaschedule_tuning.keep(_record(PROBLEM, 1e-3, 71), metaschedule.folder(PROBLEM, LLVM))
    entries = baselines.implementations(LLVM, ["tvm", "tvm-tuned"])[1:]
    tuned, untuned = run({"tuned": PROBLEM, "untuned": other}, LLVM, entries, BRIEF)["layers"]
    statuses = [[e["status"] for e in layer["implementations"]] for layer in (tuned, untuned)]
    assert statuses == [["ok", "ok"], ["ok", "absent"]]
    assert untuned["implementations"][1]["reason"] == (
        "no MetaSchedule records of it in tuning_logs for this device: python "
        f"scripts/tune_metaschedule.py --expressions conv2d {other} --target llvm "
        "--dtype float32 --layout NCHW"
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_ships_is_taken_by_a_process_that_knows_nothing_yet(dtype):
    """Intrinsics have names that TVM looks up when it reads a trace, and when it makes rules."""
    done = subprocess.run(
        [sys.executable, "-c", _TAKEN, dtype], capture_output=True, text=True, check=False
    )
    tensor_cores = dtype != "float32"
    assert done.stdout.splitlines() == [str(tensor_cores)], done.stderr


_TAKEN = """
import sys
from im2win_tvm.bench.baselines.tvm_tuned import TvmTuned
from im2win_tvm.suites import suite
from im2win_tvm.target import CudaTarget
from im2win_tvm.traces import gpu

problem = suite("paper", 128, sys.argv[1], "NHWC")["conv9"]
module, _ = TvmTuned().module(problem, CudaTarget("sm_90", "NVIDIA H200"), gpu())
print("mma_sync" in str(module))
"""


def test_the_command_that_fills_a_suite():
    from im2win_tvm.suites import suite

    layer = suite("paper", 128, "float16", "NHWC")["conv9"]
    assert metaschedule.fill_command(layer, CudaTarget("sm_90")) == (
        "python scripts/tune_metaschedule.py --expressions conv2d --suite paper --batch 128 "
        "--target cuda --dtype float16 --layout NHWC"
    )


def test_a_record_of_another_convolution_is_a_miss_and_changes_no_file(logs):
    path = metaschedule.folder(PROBLEM, LLVM)
    metaschedule_tuning.keep(_record(PROBLEM.replace(stride=1), 1e-3, 71), path)
    files = {file: file.read_bytes() for file in path.iterdir()}
    assert len(files) == 2
    record = run({"it": PROBLEM}, LLVM, [TvmTuned()], BRIEF)
    (entry,) = record["layers"][0]["implementations"]
    assert entry["status"] == "absent"
    assert (
        "no record of this TVM's conv2d among 1; tune again with python scripts/"
        in (entry["reason"])
    )
    assert {file: file.read_bytes() for file in path.iterdir()} == files


def test_a_broken_database_is_a_gap(logs):
    path = metaschedule.folder(PROBLEM, LLVM)
    metaschedule_tuning.keep(_record(PROBLEM, 1e-3, 71), path)
    (path / "database_tuning_record.json").write_text("[1, 2\n")
    record = run({"it": PROBLEM}, LLVM, [TvmTuned()], BRIEF)
    (entry,) = record["layers"][0]["implementations"]
    assert (entry["status"], "times" in entry) == ("absent", False)
    (path / "database_tuning_record.json").unlink()
    assert "no MetaSchedule records" in TvmTuned().available(PROBLEM, LLVM)
