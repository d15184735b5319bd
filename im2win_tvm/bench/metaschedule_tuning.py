"""Filling the folders of `tvm-tuned`: MetaSchedule's search on TVM's conv2d, the best kept."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import environment
from ..problem import ConvProblem
from ..target import CpuTarget, Target
from .baselines import metaschedule
from .baselines.tvm_default import choose_cuda_compiler, tvm_target_here

__all__ = ["DRY_RUN_ARCH", "TuningError", "dry_run", "keep", "missing_packages", "search", "tune"]

# A process that builds imports TVM and its intrinsics first; the default of 30 s is too little.
_BUILD_TIMEOUT = 120
# What MetaSchedule needs to build candidates, and beyond that to run and to rank them.
_TO_BUILD = ("cloudpickle", "psutil")
_TO_SEARCH = (*_TO_BUILD, "xgboost", "scipy", "tornado")
#: The device that a dry run pretends to have.
DRY_RUN_ARCH = "sm_90"


class TuningError(RuntimeError):
    """A search that cannot take place here, or that found nothing that runs."""


def missing_packages(dry: bool = False) -> str | None:
    """What to install before MetaSchedule can search, or before a dry run; None if all is there."""
    wanted = _TO_BUILD if dry else _TO_SEARCH
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"not installed: {', '.join(missing)} (pip install 'im2win_tvm[tune]')"


def tune(
    problem: ConvProblem,
    target: Target,
    trials: int = 64,
    per_round: int = 16,
    deadline: float | None = None,
    root: Path | None = None,
    seed: int = 0,
    **machinery: Any,
) -> dict[str, Any]:
    """Search on the device here and keep the best record; the line added to its provenance.

    trials: candidates measured, in rounds of `per_round`. deadline: a value of time.monotonic()
    after which no further round begins; what was measured until then counts. root: instead of
    tuning_logs. machinery: MetaSchedule's builder, runner, cost_model and num_tuning_cores where
    its own are not wanted. Raises TuningError where no candidate ran.
    """
    if not isinstance(target, CpuTarget):
        choose_cuda_compiler()
    tvm_target = tvm_target_here(target)
    path = metaschedule.folder(problem, target, root)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="metaschedule-") as work:
        function = metaschedule.prim_func(metaschedule.legalized(problem, tvm_target))
        measured, ran = search(
            function, tvm_target, Path(work), trials, per_round, deadline, seed, machinery
        )
        if not ran:
            raise TuningError(f"{problem}: none of {measured} candidates ran")
        best = metaschedule.best_record(Path(work), function)
        line = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "problem": str(problem),
            "dtype": problem.dtype,
            "layout": problem.layout,
            "best_us": metaschedule.run_us(best),
            "trials": measured,
            "ran": ran,
            "seconds": round(time.monotonic() - started, 1),
            "seed": seed,
            "target": str(tvm_target),
            "driver": environment.cuda()["nvidia_smi"] if target.kind == "cuda" else None,
            "versions": environment.versions(),
            "git_commit": environment.git_commit(),
        }
        keep(best, path)
    with (path / metaschedule.PROVENANCE).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def keep(record: Any, path: Path) -> None:
    """Add a record to the folder's database; the folder's best is the best of all sessions."""
    from tvm.s_tir import meta_schedule as ms

    path.mkdir(parents=True, exist_ok=True)
    database = ms.database.JSONDatabase(work_dir=str(path))
    workload = database.commit_workload(record.workload.mod)
    database.commit_tuning_record(
        ms.database.TuningRecord(
            record.trace, workload, record.run_secs, record.target, record.args_info
        )
    )


def dry_run(problem: ConvProblem, trials: int = 4, **machinery: Any) -> tuple[int, int]:
    """Build candidates for a GPU that is not here and time none; how many there were, and built.

    Shows that the search space can be compiled. Nothing is kept: the times are made up.
    """
    import tvm
    from tvm.s_tir.meta_schedule.testing.dummy_object import DummyRunner

    # Without a GPU's driver TVM cannot load what it would otherwise compile into.
    os.environ.setdefault("TVM_COMPILE_FORCE_FALLBACK", "1")
    tvm_target = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": DRY_RUN_ARCH,
            "max_shared_memory_per_block": 48 * 1024,
            "max_threads_per_block": 1024,
            "registers_per_block": 65536,
            "thread_warp_size": 32,
        },
        host="llvm",
    )
    given = {"runner": DummyRunner(), "cost_model": "random"} | machinery
    with tempfile.TemporaryDirectory(prefix="metaschedule-") as work:
        function = metaschedule.prim_func(metaschedule.legalized(problem, tvm_target))
        return search(function, tvm_target, Path(work), trials, trials, None, 0, given)


def search(
    function: Any,
    tvm_target: Any,
    work: Path,
    trials: int,
    per_round: int,
    deadline: float | None,
    seed: int,
    machinery: dict[str, Any],
) -> tuple[int, int]:
    """Search schedules of a PrimFunc into a database in `work`.

    Returns how many candidates were tried, and how many of them were built and ran.
    """
    from tvm.s_tir import meta_schedule as ms

    metaschedule.bare_stack()
    given = dict(machinery)
    if "builder" not in given:
        given["builder"] = ms.builder.LocalBuilder(
            timeout_sec=_BUILD_TIMEOUT, initializer=metaschedule.bare_stack
        )
    rounds = _rounds(deadline)
    try:
        ms.tune_tir(
            function,
            tvm_target,
            str(work),
            trials,
            num_trials_per_iter=min(per_round, trials),
            measure_callbacks=[*ms.MeasureCallback.create("default"), rounds],
            seed=seed,
            **given,
        )
    except RuntimeError:
        # What a callback raises arrives as this: the only way to end a search early.
        if not rounds.over:
            raise
    return rounds.tried, rounds.ran


def _rounds(deadline: float | None) -> Any:
    """A callback that counts candidates after each round, and ends the search after its time."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    @derived_object
    class Rounds(ms.measure_callback.PyMeasureCallback):
        def __init__(self) -> None:
            self.tried = self.ran = 0
            self.over = False

        def apply(self, task_scheduler, task_id, candidates, builds, runs) -> None:
            self.tried += len(candidates)
            self.ran += sum(result.error_msg is None for result in runs)
            if deadline is not None and time.monotonic() >= deadline:
                self.over = True
                raise RuntimeError("the time for this search is over")

    return Rounds()
