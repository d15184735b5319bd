"""Filling the folders of `tvm-tuned`: MetaSchedule's search on TVM's conv2d, the best kept."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import environment, tensor_intrinsics, traces
from ..problem import ConvProblem
from ..target import CpuTarget, CudaTarget, Target
from . import metaschedule_machinery
from .baselines import metaschedule
from .baselines.tvm_default import choose_cuda_compiler, tvm_target_here

__all__ = [
    "DRY_RUN_ARCH",
    "TuningError",
    "dry_run",
    "dry_target",
    "keep",
    "missing_packages",
    "search",
    "tune",
]

# A process that builds imports TVM and its intrinsics first; the default of 30 s is too little.
_BUILD_TIMEOUT = 120
# What MetaSchedule needs to build candidates, and beyond that to run and to rank them.
_TO_BUILD = ("cloudpickle", "psutil")
_TO_SEARCH = (*_TO_BUILD, "xgboost", "scipy", "tornado")
# Candidates of the first round on a GPU, and how many the search breeds from them in its mind.
_FIRST, _POPULATION = 24, 64
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
        given = _space(problem, target) | machinery
        measured, ran = search(
            function, tvm_target, Path(work), trials, per_round, deadline, seed, given
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


def _space(problem: ConvProblem, target: Target) -> dict[str, Any]:
    """The space that is searched, where it is another one than TVM takes for the target."""
    make_rules = metaschedule.rules_of(problem, target)
    return {} if make_rules is None else {"space": make_rules()}


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
    from tvm.s_tir.meta_schedule.testing.dummy_object import DummyRunner

    # Without a GPU's driver TVM cannot load what it would otherwise compile into.
    os.environ.setdefault("TVM_COMPILE_FORCE_FALLBACK", "1")
    tvm_target = dry_target()
    given = {"runner": DummyRunner(), "cost_model": "random"}
    given |= _space(problem, CudaTarget(DRY_RUN_ARCH)) | machinery
    with tempfile.TemporaryDirectory(prefix="metaschedule-") as work:
        function = metaschedule.prim_func(metaschedule.legalized(problem, tvm_target))
        return search(function, tvm_target, Path(work), trials, trials, None, 0, given)


def dry_target() -> Any:
    """What TVM would say of a GPU of DRY_RUN_ARCH."""
    return traces.gpu(DRY_RUN_ARCH)


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

    Returns how many candidates were tried, and how many of them were built and ran. On a GPU the
    first round has samples that fit one, and an evolutionary search goes on from these; where none
    is found, for a problem of few outputs, it begins as TVM's does.
    """
    from tvm import s_tir
    from tvm.s_tir import meta_schedule as ms

    tensor_intrinsics.bare_stack()
    given = dict(machinery)
    on_gpu = tvm_target.kind.name == "cuda"
    if "builder" not in given:
        given["builder"] = (
            metaschedule_machinery.builder(len(os.sched_getaffinity(0)))
            if on_gpu
            else ms.builder.LocalBuilder(
                timeout_sec=_BUILD_TIMEOUT, initializer=tensor_intrinsics.bare_stack
            )
        )
    if on_gpu:
        tensor_intrinsics.register()  # for the rules that TVM takes unless told
    if on_gpu and "runner" not in given:
        given["runner"] = metaschedule_machinery.runner()
    rounds = _rounds(deadline)
    if on_gpu and "strategy" not in given:
        _begin(function, tvm_target, work, min(trials, max(per_round, _FIRST)), seed, given, rounds)
        if rounds.tried >= trials or (rounds.tried and not rounds.ran) or rounds.late():
            return rounds.tried, rounds.ran
    before = rounds.tried
    *_, last = chances = _chances(seed)
    for chance in chances:
        try:
            ms.tune_tir(
                function,
                tvm_target,
                str(work),
                trials - before,
                num_trials_per_iter=min(per_round, trials - before),
                measure_callbacks=[*ms.MeasureCallback.create("default"), rounds],
                seed=chance,
                **given,
            )
            break
        except s_tir.ScheduleError:
            if rounds.tried > before or chance == last:
                raise
        except RuntimeError:
            # What a callback raises arrives as this: the only way to end a search early.
            if rounds.over:
                break
            raise
    return rounds.tried, rounds.ran


def _begin(
    function: Any,
    tvm_target: Any,
    work: Path,
    count: int,
    seed: int,
    given: dict[str, Any],
    rounds: Any,
) -> None:
    """Measure up to `count` samples that fit, and have the search in `given` go on from them."""
    from tvm import s_tir
    from tvm.s_tir import meta_schedule as ms

    from .metaschedule_population import sampled

    module = ms.tir_integration._normalize_mod(function)
    *_, last = chances = _chances(seed)
    for chance in chances:
        context = ms.TuneContext(
            mod=module,
            target=tvm_target,
            space_generator=given.get("space", "post-order-apply"),
            search_strategy="evolutionary",
            task_name="main",
            rand_state=chance,
            num_threads=1,
        ).clone()
        try:
            schedules = sampled(context, count, seed)
            break
        except s_tir.ScheduleError:
            if chance == last:
                raise
    candidates = [
        ms.MeasureCandidate(schedule, ms.arg_info.ArgInfo.from_entry_func(schedule.mod, True))
        for schedule in schedules
    ]
    if not candidates:
        return
    builds = given["builder"].build(
        [ms.builder.BuilderInput(each.sch.mod, tvm_target) for each in candidates]
    )
    built = [place for place, build in enumerate(builds) if build.error_msg is None]
    futures = given["runner"].run(
        [
            ms.runner.RunnerInput(
                str(builds[place].artifact_path), tvm_target.kind.name, candidates[place].args_info
            )
            for place in built
        ]
    )
    runs = [ms.runner.RunnerResult(None, build.error_msg) for build in builds]
    for place, future in zip(built, futures, strict=True):
        runs[place] = future.result()
        shutil.rmtree(Path(str(builds[place].artifact_path)).parent, ignore_errors=True)
    rounds.count(runs)
    database = ms.database.JSONDatabase(work_dir=str(work))
    workload = database.commit_workload(module)
    for candidate, run in zip(candidates, runs, strict=True):
        if run.error_msg is None:
            database.commit_tuning_record(
                ms.database.TuningRecord(
                    candidate.sch.trace, workload, run.run_secs, tvm_target, candidate.args_info
                )
            )
    model = given.get("cost_model", "xgb")
    if isinstance(model, str):
        cores = given.setdefault("num_tuning_cores", len(os.sched_getaffinity(0)))
        model = ms.cost_model.CostModel.create(model, num_tuning_cores=cores)
    model.update(context, candidates, runs)
    given |= {
        "database": database,
        "cost_model": model,
        "strategy": ms.search_strategy.EvolutionarySearch(
            population_size=_POPULATION,
            init_measured_ratio=1.0,
            init_min_unmeasured=0,
            genetic_num_iters=3,
        ),
    }


def _chances(seed: int) -> range:
    """Seeds to try in turn: with some TVM draws a sample that its own steps then do not allow.

    It does so where it makes the space, before any trial; of im2win's expressions of the paper's
    conv4 in float16 with one seed in twenty.
    """
    return range(seed, seed + 4)


def _rounds(deadline: float | None) -> Any:
    """A callback that counts candidates after each round, and ends the search after its time."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    @derived_object
    class Rounds(ms.measure_callback.PyMeasureCallback):
        def __init__(self) -> None:
            self.tried = self.ran = 0
            self.over = False

        def late(self) -> bool:
            return deadline is not None and time.monotonic() >= deadline

        def count(self, runs) -> None:
            self.tried += len(runs)
            self.ran += sum(result.error_msg is None for result in runs)

        def apply(self, task_scheduler, task_id, candidates, builds, runs) -> None:
            self.count(runs)
            if self.late():
                self.over = True
                raise RuntimeError("the time for this search is over")

    return Rounds()
