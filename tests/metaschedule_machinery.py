"""What MetaSchedule's search needs, without compilers and devices."""

import logging
import tempfile
from pathlib import Path

import pytest
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.testing.dummy_object import DummyRunner

from im2win_tvm.bench.metaschedule_population import sampled
from im2win_tvm.bench.metaschedule_tuning import dry_target
from im2win_tvm.schedules.metaschedule import function
from im2win_tvm.target import CudaTarget
from im2win_tvm.traces import plain, rules


def machinery(error=None):
    """Builds nothing and makes up times: only the search itself takes place."""

    @derived_object
    class Builder(ms.builder.PyBuilder):
        def build(self, inputs):
            # MetaSchedule removes the folder of each file afterwards.
            folders = [None if error else tempfile.mkdtemp() for _ in inputs]
            paths = [folder and str(Path(folder) / "built") for folder in folders]
            return [ms.builder.BuilderResult(path, error) for path in paths]

    return {
        "builder": Builder(),
        "runner": DummyRunner(),
        "cost_model": "random",
        "strategy": "replay-trace",
        "num_tuning_cores": 1,
    }


def tensor_core_trace(problem, seed=1):
    """A sample of TVM's rules for tensor cores over an im2win expression: steps, decisions."""
    context = ms.TuneContext(
        mod=ms.tir_integration._normalize_mod(function(problem)),
        target=dry_target(),
        space_generator=rules(problem, CudaTarget("sm_90")),
        search_strategy="evolutionary",
        task_name="main",
        rand_state=seed,
        num_threads=1,
    ).clone()
    (schedule,) = sampled(context, 1, seed)
    return plain(schedule.trace.as_json())


@pytest.fixture(autouse=True)
def named_handlers():
    """MetaSchedule wants names of its logger's handlers. Those that pytest adds to a logger that
    does not propagate, as MetaSchedule leaves its own, have none."""
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    logger.handlers.clear()
    logger.propagate = True
