"""What MetaSchedule's search needs, without compilers and devices."""

import logging
import tempfile
from pathlib import Path

import pytest
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.testing.dummy_object import DummyRunner


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


@pytest.fixture(autouse=True)
def named_handlers():
    """MetaSchedule wants names of its logger's handlers. Those that pytest adds to a logger that
    does not propagate, as MetaSchedule leaves its own, have none."""
    logger = logging.getLogger("tvm.s_tir.meta_schedule")
    logger.handlers.clear()
    logger.propagate = True
