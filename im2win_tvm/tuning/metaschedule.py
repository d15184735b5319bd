"""MetaSchedule's search over the im2win expressions; what it finds becomes tuning records of ours.

Two spaces: TVM's own rules over the plain expressions, and a hand-written schedule as a template.
The search times its candidates its own way. The fastest few are then built, checked and measured
like the configurations of any schedule, so that one log compares them all and `compile` takes the
winner.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..bench import metaschedule_tuning
from ..bench.baselines.tvm_default import choose_cuda_compiler, tvm_target_here
from ..problem import ConvProblem
from ..schedules import SCHEDULES
from ..schedules.metaschedule import Config, function
from ..target import CpuTarget, Target
from ..traces import plain, rules
from .measuring import TuningError
from .search import Listed
from .session import FINALISTS, Result, Session
from .templates import CpuBlockedTemplate

__all__ = ["SPACES", "found", "schedule_of", "tune"]

#: The rules of TVM, or a schedule that is a template.
SPACES = ("rules", CpuBlockedTemplate.name)


def tune(
    session: Session,
    problem: ConvProblem,
    target: Target,
    trials: int = 64,
    per_round: int = 16,
    seconds: float | None = None,
    seed: int = 0,
    space: str = "rules",
    **machinery: Any,
) -> Result:
    """Search a space of a problem, and measure and record the fastest with `session`.

    trials, per_round, seed and machinery as in bench.metaschedule_tuning; no further round begins
    after `seconds`. Raises TuningError where the problem or target is not for that space, or no
    candidate ran.
    """
    if space not in SPACES:
        raise TuningError(f"space={space!r}: allowed: {', '.join(SPACES)}")
    name = schedule_of(space, target)
    reason = SCHEDULES[name].supports(problem, target)
    if reason is not None:
        raise TuningError(f"{problem}: {reason}")
    deadline = None if seconds is None else time.monotonic() + seconds
    configs = found(problem, target, trials, per_round, deadline, seed, space, **machinery)
    (result,) = session.tune(problem, {name: Listed(configs)}, len(configs))
    return result


def schedule_of(space: str, target: Target) -> str:
    """The schedule whose configurations a space has."""
    if space != "rules":
        return space
    return "cpu_metaschedule" if target.kind == "llvm" else "cuda_metaschedule"


def found(
    problem: ConvProblem,
    target: Target,
    trials: int,
    per_round: int = 16,
    deadline: float | None = None,
    seed: int = 0,
    space: str = "rules",
    **machinery: Any,
) -> list[Any]:
    """The configurations of the fastest candidates of a search, the fastest first, FINALISTS."""
    from tvm.s_tir import meta_schedule as ms

    if not isinstance(target, CpuTarget):
        choose_cuda_compiler()
    if space == "rules":
        template, searched, generator = None, function(problem), rules(problem, target)
    else:
        template = CpuBlockedTemplate(problem, target)
        searched, generator = template.function, template.space()
    with tempfile.TemporaryDirectory(prefix="metaschedule-") as work:
        tried, ran = metaschedule_tuning.search(
            searched,
            tvm_target_here(target),
            Path(work),
            trials,
            per_round,
            deadline,
            seed,
            {"space": generator, **machinery},
        )
        if not ran:
            raise TuningError(f"{problem}: none of {tried} candidates ran")
        database = ms.database.JSONDatabase(work_dir=work, allow_missing=False)
        workload = database.commit_workload(ms.tir_integration._normalize_mod(searched))
        ranked = [record.trace for record in database.get_top_k(workload, ran)]
    if template is None:
        configs = [Config(_short(plain(trace.as_json()))) for trace in ranked]
    else:
        # A template samples tiles for more registers than there are, too.
        configs = [config for trace in ranked if (config := template.config(trace)) is not None]
        if not configs:
            raise TuningError(f"{problem}: {space} takes none of the {ran} candidates that ran")
    return list(dict.fromkeys(configs))[:FINALISTS]


def _short(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
