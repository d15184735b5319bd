"""Searches that fill the folders of `tvm-tuned`, and the script around them."""

import importlib.util
import inspect
import json
import os
import queue
import re
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from metaschedule_machinery import machinery, named_handlers  # noqa: F401
from tvm import s_tir
from tvm.ir import IRModule
from tvm.s_tir import meta_schedule as ms

from im2win_tvm import tensor_intrinsics
from im2win_tvm.bench import metaschedule_machinery, metaschedule_tuning
from im2win_tvm.bench.baselines import metaschedule
from im2win_tvm.bench.baselines.tvm_tuned import TvmTuned
from im2win_tvm.bench.operands import HostOperands
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import CudaTarget, resolve

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "tune_metaschedule.py"
PROBLEM = ConvProblem(2, 6, (9, 8), 10, 3, stride=2, padding=((0, 1), (2, 1)), groups=2)
LLVM = resolve("llvm")
PACKAGES = ("cloudpickle", "psutil")
can_search = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"MetaSchedule's search needs {' and '.join(PACKAGES)}",
)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """An empty tuning_logs."""
    root = tmp_path / "tuning_logs"
    monkeypatch.setattr(metaschedule, "TUNING_LOGS", root)
    return root


def _function(problem):
    return metaschedule.prim_func(metaschedule.legalized(problem, LLVM.tvm()))


def test_the_stack_without_source_lines():
    kept = inspect.stack
    try:
        tensor_intrinsics.bare_stack()
        frames = inspect.stack(context=1)
        assert frames[0].function == "test_the_stack_without_source_lines"
        assert frames[0].frame.f_code.co_filename == __file__
        assert frames[0].code_context is None
        expected = [frame.function for frame in kept(0)]
        assert [frame.function for frame in inspect.stack()] == expected
    finally:
        inspect.stack = kept


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(metaschedule_tuning.importlib.util, "find_spec", lambda name: None)
    assert metaschedule_tuning.missing_packages() == (
        "not installed: cloudpickle, psutil, xgboost, scipy, tornado "
        "(pip install 'im2win_tvm[tune]')"
    )
    assert "psutil (pip" in metaschedule_tuning.missing_packages(dry=True)
    monkeypatch.setattr(metaschedule_tuning.importlib.util, "find_spec", lambda name: 1)
    assert metaschedule_tuning.missing_packages() is None


def test_a_search_fills_the_folder_that_bench_reads(logs):
    line = metaschedule_tuning.tune(PROBLEM, LLVM, trials=4, per_round=2, **machinery())
    path = metaschedule.folder(PROBLEM, LLVM)
    assert json.loads((path / metaschedule.PROVENANCE).read_text()) == line
    assert (line["trials"], line["ran"], line["problem"]) == (4, 4, str(PROBLEM))
    assert {"driver", "git_commit", "target", "versions", "seconds", "seed"} <= set(line)
    best = metaschedule.best_record(path, _function(PROBLEM))
    assert metaschedule.run_us(best) == pytest.approx(line["best_us"])
    # One record a session is kept, and the best of all sessions is taken.
    again = metaschedule_tuning.tune(PROBLEM, LLVM, trials=2, per_round=2, **machinery())
    assert len((path / "database_tuning_record.json").read_text().splitlines()) == 2
    assert len((path / metaschedule.PROVENANCE).read_text().splitlines()) == 2
    best = metaschedule.best_record(path, _function(PROBLEM))
    fastest = min(line["best_us"], again["best_us"])
    assert metaschedule.run_us(best) == pytest.approx(fastest)
    operands = HostOperands(PROBLEM)
    prepared = TvmTuned().prepare(operands, LLVM)
    assert operands.check(prepared.view(prepared.call())).in_class


def test_a_search_on_cuda_begins_with_samples_that_fit(tmp_path, monkeypatch):
    """Of TVM's own samples of this problem one in hundreds does. It goes on from these."""
    monkeypatch.setattr(metaschedule_tuning, "_FIRST", 3)
    monkeypatch.setattr(metaschedule_tuning, "_POPULATION", 4)
    target = metaschedule_tuning.dry_target()
    function = metaschedule.prim_func(
        metaschedule.legalized(ConvProblem(128, 64, (56, 56), 64, 3), target)
    )
    given = machinery()
    del given["strategy"]
    assert metaschedule_tuning.search(function, target, tmp_path, 5, 2, None, 0, given) == (5, 5)
    database = ms.database.JSONDatabase(work_dir=str(tmp_path))
    module = ms.tir_integration._normalize_mod(function)
    records = database.get_top_k(database.commit_workload(module), 9)
    assert len(records) == 5
    for record in records:
        schedule = s_tir.Schedule(module)
        record.trace.apply_to_schedule(schedule, remove_postproc=False)
        (threads,) = set(re.findall(r'(\d+)\), thread="threadIdx.x"', str(schedule.mod)))
        assert int(threads) in range(32, 1025)


def test_conv2d_in_bfloat16_is_searched_on_tensor_cores(logs, monkeypatch):
    """By the same intrinsics as the im2win expressions, and its record is taken."""
    gpu, target = metaschedule_tuning.dry_target(), CudaTarget("sm_90", "NVIDIA H200")
    monkeypatch.setattr(metaschedule_tuning, "tvm_target_here", lambda _: gpu)
    monkeypatch.setattr(metaschedule_tuning, "choose_cuda_compiler", lambda: None)
    monkeypatch.setattr(metaschedule_tuning, "_FIRST", 1)
    problem = ConvProblem(16, 32, (34, 34), 64, 3, layout="NHWC", dtype="bfloat16")
    given = machinery()
    del given["strategy"]
    line = metaschedule_tuning.tune(problem, target, 1, 1, **given)
    assert (line["trials"], line["ran"]) == (1, 1)
    module, detail = TvmTuned().module(problem, target, gpu)
    assert detail["tuned_us"] == pytest.approx(line["best_us"])
    assert "mma_sync" in str(metaschedule.prim_func(module))


@pytest.mark.parametrize("strategy", [None, "replay-trace"])
def test_a_space_that_tvm_cannot_make_is_drawn_again(strategy, tmp_path, monkeypatch):
    """By other seeds, and not for ever."""
    seeds, fails = [], 2

    def too_large(given):
        seeds.append(given)
        if len(seeds) <= fails:
            raise s_tir.ScheduleError("not a stage pipeline")
        return []

    monkeypatch.setattr(ms, "tune_tir", lambda *_, seed, **__: too_large(seed))
    sampling = "im2win_tvm.bench.metaschedule_population.sampled"
    monkeypatch.setattr(sampling, lambda context, *_: too_large(int(context.rand_state)))
    target = metaschedule_tuning.dry_target()
    function = metaschedule.prim_func(metaschedule.legalized(PROBLEM, target))
    given = machinery() | {"strategy": strategy}
    if strategy is None:  # it begins with samples, which are none here, and goes on as TVM does
        del given["strategy"]

    def search():
        metaschedule_tuning.search(function, target, tmp_path, 5, 2, None, 7, given)

    search()
    if strategy is None:  # those are what TVM makes of them
        assert len({*seeds[:3]}) == 3
        assert seeds[3:] == [7]
    else:
        assert seeds == [7, 8, 9]
    seeds.clear()
    fails = 99
    with pytest.raises(s_tir.ScheduleError, match="not a stage pipeline"):
        search()
    assert len({*seeds}) == len(seeds) == 4


def test_an_error_of_another_kind_ends_a_search_at_once(tmp_path, monkeypatch):
    """TVM makes one of a KeyboardInterrupt in a callback, too."""
    asked = []

    def fails(*_, **__):
        asked.append(1)
        raise RuntimeError("KeyboardInterrupt")

    monkeypatch.setattr(ms, "tune_tir", fails)
    target = metaschedule_tuning.dry_target()
    function = metaschedule.prim_func(metaschedule.legalized(PROBLEM, target))
    with pytest.raises(RuntimeError, match="KeyboardInterrupt"):
        metaschedule_tuning.search(function, target, tmp_path, 5, 2, None, 7, machinery())
    assert asked == [1]


def test_a_dry_run_builds_what_is_searched(monkeypatch):
    """In bfloat16 the rules are ours."""
    monkeypatch.setattr(metaschedule_tuning, "_FIRST", 1)
    given = machinery()
    del given["strategy"]
    built, builder = [], given["builder"]

    def build(inputs):
        built.extend(str(each.mod) for each in inputs)
        return builder.build(inputs)

    given["builder"] = SimpleNamespace(build=build)
    problem = ConvProblem(16, 32, (34, 34), 64, 3, layout="NHWC", dtype="bfloat16")
    assert metaschedule_tuning.dry_run(problem, 1, **given) == (1, 1)
    assert [text.count("mma_sync") > 0 for text in built] == [True]


def test_a_search_on_cuda_without_samples_that_fit_begins_as_tvms_does(tmp_path, monkeypatch):
    """Of 32 outputs no block has enough."""
    begun = []
    monkeypatch.setattr(ms, "tune_tir", lambda *given, **_: begun.append(given[3]))
    target = metaschedule_tuning.dry_target()
    function = metaschedule.prim_func(
        metaschedule.legalized(ConvProblem(1, 4, (4, 4), 8, 3), target)
    )
    given = machinery()
    del given["strategy"]
    metaschedule_tuning.search(function, target, tmp_path, 5, 2, None, 0, given)
    assert begun == [5]


def test_a_search_ends_with_its_time_and_keeps_what_it_has(tmp_path):
    line = metaschedule_tuning.tune(
        PROBLEM, LLVM, 64, 2, deadline=time.monotonic(), root=tmp_path, **machinery()
    )
    assert (line["trials"], line["ran"]) == (2, 2)
    assert metaschedule.has_records(metaschedule.folder(PROBLEM, LLVM, tmp_path))


def test_a_search_in_which_nothing_ran_keeps_nothing(tmp_path):
    with pytest.raises(metaschedule_tuning.TuningError, match="none of 2 candidates ran"):
        metaschedule_tuning.tune(PROBLEM, LLVM, 2, 2, root=tmp_path, **machinery("no compiler"))
    assert list(tmp_path.iterdir()) == []


@can_search
@pytest.mark.slow
def test_dry_run_builds_for_a_gpu_that_is_not_here():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run", "--trials", "2", "mb1ic16ih16oc32kh3"],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1]
    assert last == "mb1ic16ih16oc32kh3: 2 of 2 candidates built", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "conv99"], "layers='conv99': allowed: conv1, conv2"),
        (["--trials", "0"], "trials=0: allowed: whole numbers from 1"),
        (["mb1", "--dry-run"], "error: problem 'mb1'"),
        (
            ["mb1ic4ih8oc4kh3", "--target", "llvm", "--processes", "2"],
            "processes=2: allowed on llvm: 1",
        ),
    ],
)
def test_the_script_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # what it changes
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--target", "llvm", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code != 0
    assert message in f"{ended.value} {capsys.readouterr().err}"


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such loop")

    monkeypatch.setattr("tvm.s_tir.meta_schedule.builder.local_builder.default_build", fails)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError, match="no such loop"):
        metaschedule_machinery._built((IRModule(), None))
    assert list(tmp_path.iterdir()) == []


def test_a_search_whose_process_dies_has_no_record(monkeypatch):
    """One that a signal ends can say nothing of the search that it had taken."""
    spec = importlib.util.spec_from_file_location("tune_metaschedule", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    spec.loader.exec_module(script)

    class Killed:
        exitcode = -11

        def __init__(self, target, args):
            self.waiting = args[0]

        def start(self):
            self.waiting.get_nowait()

        def join(self):
            """Over at once: a signal ended it."""

    manager = SimpleNamespace(Queue=queue.Queue)
    context = SimpleNamespace(Process=Killed, Manager=lambda: nullcontext(manager))
    monkeypatch.setattr(script.multiprocessing, "get_context", lambda kind: context)
    asked = SimpleNamespace(total_seconds=None, processes=2)
    jobs = [(name, PROBLEM, "im2win") for name in ("one", "other")]
    assert script._all(jobs, LLVM, asked, None) == 2 * ["what a process had that ended with -11"]
