"""TVM's conv2d as MetaSchedule tuned it on this device, built the way its default is built."""

from __future__ import annotations

from typing import Any

from ...problem import ConvProblem
from ...target import Target
from . import metaschedule
from .tvm_default import TvmDefault


class TvmTuned(TvmDefault):
    """`R.nn.conv2d` with the best of the tuning records that ship for this device and problem."""

    name = "tvm tuned"
    family = "tvm-tuned"

    def available(self, problem: ConvProblem, target: Target) -> str | None:
        reason = super().available(problem, target)
        if reason is None and not metaschedule.has_records(
            metaschedule.found_folder(problem, target)
        ):
            reason = (
                f"no MetaSchedule records of it in tuning_logs for this device: "
                f"{metaschedule.fill_command(problem, target)}"
            )
        return reason

    def sums(self, problem: ConvProblem) -> str:
        return metaschedule.sums(problem)

    def module(self, problem: ConvProblem, target: Target, tvm_target: Any) -> tuple[Any, dict]:
        path = metaschedule.found_folder(problem, target)
        module = metaschedule.legalized(problem, tvm_target)
        record = metaschedule.best_record(path, metaschedule.prim_func(module))
        detail = {
            "pipeline": "TVM's default for the target around a conv2d tuned by MetaSchedule",
            "records": "/".join(path.parts[-3:]),
            "tuned_us": metaschedule.run_us(record),
        }
        make_rules = metaschedule.rules_of(problem, target)
        return metaschedule.scheduled(module, record, tvm_target, make_rules), detail
