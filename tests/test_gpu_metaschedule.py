"""What MetaSchedule's rules for tensor cores make of the im2win expressions, on a CUDA device."""

import json

import pytest
from metaschedule_machinery import tensor_core_trace
from on_gpu import Asked, assert_right, build
from test_metaschedule_search import RAGGED

from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.schedules.metaschedule import Config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("epilogue", [NONE, Epilogue(True, True, "relu")], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_values(layout, epilogue):
    problem = RAGGED.replace(layout=layout)
    traces = [tensor_core_trace(problem, seed) for seed in (1, 2)]
    assert all("wmma_sync" in json.dumps(steps) for steps, _ in traces)
    configs = [Config(json.dumps(trace)) for trace in traces]
    asked = [Asked("cuda_metaschedule", problem, epilogue, config) for config in configs]
    for kernel in build(asked).values():
        assert not isinstance(kernel, Exception), kernel
        assert_right(kernel)
