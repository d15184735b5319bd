"""TVM's conv2d tuned by MetaSchedule: which function is tuned, where its records lie, the best one.

A folder holds the records of one problem on one device:
``tuning_logs/<device>/metaschedule/<problem>-<dtype>-<layout>/``, in it a MetaSchedule JSONDatabase
(database_workload.json, database_tuning_record.json) and provenance.jsonl, a line a session. Both
are data: a trace names scheduling steps, and is taken only if TVM's rules make the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from ... import environment, suites, tensor_intrinsics
from ...problem import ConvProblem
from ...target import Target
from ...traces import plain, refusal, rules
from ...tuning import lookup
from .tvm_default import relax_module

__all__ = [
    "PROVENANCE",
    "SCRIPT",
    "TUNING_LOGS",
    "MissingRecord",
    "best_record",
    "fill_command",
    "folder",
    "found_folder",
    "has_records",
    "legalized",
    "prim_func",
    "rules_of",
    "run_us",
    "scheduled",
    "sums",
]

#: Records that ship, where those of the package's own schedules do.
TUNING_LOGS = lookup.SHIPPED
PROVENANCE = "provenance.jsonl"
SCRIPT = "python scripts/tune_metaschedule.py --expressions conv2d"
_RECORDS = "database_tuning_record.json"
_FILES = ("database_workload.json", _RECORDS)


class MissingRecord(LookupError):
    """No record of the convolution as this TVM states it."""


def folder(problem: ConvProblem, target: Target, root: Path | None = None) -> Path:
    """Where the records of a problem on the device that `target` means lie, or would lie."""
    name = f"{problem}-{problem.dtype}-{problem.layout.lower()}"
    return (root or TUNING_LOGS) / environment.device_slug(target) / "metaschedule" / name


def found_folder(problem: ConvProblem, target: Target) -> Path:
    """The first folder of a problem with records: of $IM2WIN_TUNING_LOGS, then of what ships.

    Where there is none, the one that would ship.
    """
    folders = [folder(problem, target, root) for root in lookup.named_places()]
    return next(filter(has_records, folders), folder(problem, target))


def has_records(path: Path) -> bool:
    """Whether a folder holds a database."""
    return all((path / name).is_file() for name in _FILES)


def fill_command(problem: ConvProblem, target: Target) -> str:
    """The command that fills the folder of a problem, with those of its suite where it has one."""
    options = f"--target {target.kind} --dtype {problem.dtype} --layout {problem.layout}"
    for name in suites.SUITES:
        known = suites.suite(name, problem.batch, problem.dtype, problem.layout)
        if problem in known.values():
            return f"{SCRIPT} --suite {name} --batch {problem.batch} {options}"
    return f"{SCRIPT} {problem} {options}"


def sums(problem: ConvProblem) -> str:
    """What the conv2d that is tuned sums in: its dtype, as TVM's default does.

    But for bfloat16, which no tensor core sums in: float32, and a cast in the same function, which
    is what TVM's passes make of such a conv2d in a model. On a processor likewise, for one answer.
    """
    return "float32" if problem.dtype == "bfloat16" else problem.dtype


def legalized(problem: ConvProblem, tvm_target: Any) -> Any:
    """A problem's conv2d as one PrimFunc of TOPI's, with the sums that `sums` names."""
    import tvm
    from tvm import relax

    passes = [relax.transform.LegalizeOps()]
    if sums(problem) != problem.dtype:
        passes += [
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
        ]
    with tvm_target:
        return tvm.transform.Sequential(passes)(relax_module(problem, sums(problem)))


def prim_func(module: Any) -> Any:
    """The PrimFunc of a legalized module: what is tuned, and what a record is looked up by."""
    return module[_variable(module)]


def _variable(module: Any) -> Any:
    """What the one PrimFunc of a legalized module is called by."""
    (variable,) = (
        variable for variable in module.get_global_vars() if variable.name_hint != "main"
    )
    return variable


def rules_of(problem: ConvProblem, target: Target) -> Callable[[], Any] | None:
    """What makes the rules for a problem's conv2d; None where they are TVM's for the target."""
    if target.kind == "cuda" and problem.dtype == "bfloat16":
        return lambda: rules(problem, target)
    return None


def best_record(path: Path, function: Any) -> Any:
    """The fastest tuning record of a function in a folder.

    Raises MissingRecord where the folder has none of exactly this function: TVM's conv2d is another
    one than it was when the folder was filled, or the folder is another problem's.
    """
    from tvm.s_tir import meta_schedule as ms

    # TVM looks intrinsics up by name when it reads a trace.
    if '"Tensorize"' in (path / _RECORDS).read_text():
        tensor_intrinsics.register()
    database = ms.database.JSONDatabase(work_dir=str(path), allow_missing=False)
    module = _as_main(function)
    # Asked first: a query would write a workload that is not there into the file.
    found = None
    if database.has_workload(module):
        ranked = database.get_top_k(database.commit_workload(module), 1)
        found = ranked[0] if len(ranked) else None
    if found is None:
        raise MissingRecord(
            f"{_relative(path)}: no record of this TVM's conv2d among {len(database)}; "
            f"tune again with {SCRIPT} --again"
        )
    return found


def run_us(record: Any) -> float:
    """The mean time of a record's runs in microseconds, by MetaSchedule's own measurement."""
    return fmean(float(seconds) for seconds in record.run_secs) * 1e6


def scheduled(
    module: Any, record: Any, tvm_target: Any, make_rules: Callable[[], Any] | None = None
) -> Any:
    """A legalized module with its conv2d scheduled by a record; pipelines leave that as it is.

    make_rules: those of the search, None where they are what TVM takes for the target.

    Raises MissingRecord where the record's trace is none of TVM's rules'.
    """
    from tvm import s_tir

    if tvm_target.kind.name == "cuda":
        tensor_intrinsics.register()
    reason = refusal(plain(record.trace.as_json()), prim_func(module), tvm_target, make_rules)
    if reason is not None:
        raise MissingRecord(reason)
    schedule = s_tir.Schedule(_as_main(prim_func(module)))
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    function = schedule.mod["main"].without_attr("global_symbol")
    module = module.clone()
    module.update_func(_variable(module), function.with_attr("tirx.is_scheduled", True))
    return module


def _as_main(function: Any) -> Any:
    from tvm.s_tir.meta_schedule import tir_integration

    return tir_integration._normalize_mod(function)


def _relative(path: Path) -> Path:
    return path.relative_to(TUNING_LOGS.parent) if TUNING_LOGS in path.parents else path
