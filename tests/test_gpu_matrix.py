"""The tensor-core schedule on a CUDA device: values of all its forms, and runs that agree.

Every kernel that the selected tests ask for is built before the first of them, as in `test_gpu`.
"""

import functools
import itertools

import pytest
from on_gpu import (
    DEVICE,
    Asked,
    assert_close_to_float64,
    assert_right,
    build_for,
    run,
    solved,
    torch,
)
from problems import HALVES_RAGGED, edge_problems, halves, odd_problems

from im2win_tvm import suites
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.schedules.cuda_mma_tiles import Config
from im2win_tvm.target import resolve

pytestmark = pytest.mark.gpu


Asked = functools.partial(Asked, "cuda_mma")
PROBLEMS = [Asked(p) for p in halves([*(p for _, p in edge_problems()), *odd_problems(6, 150)])]
EPILOGUES = [
    Asked(HALVES_RAGGED, Epilogue(*parts))
    for parts in itertools.product([False, True], [False, True], [None, "relu"])
]
CONFIGS = [
    Asked(HALVES_RAGGED.replace(layout=layout), NONE, config)
    for layout in ("NHWC", "NCHW")
    for config in (
        Config(64, 64, 32, 32, 32, stages=3),
        Config(128, 64, 64, 64, 32, stages=2),
        Config(64, 64, 64, 64, 16, stages=3, wgmma=True),
        Config(128, 256, 64, 128, 32, stages=4, wgmma=True),
    )
]
PAPER = [
    Asked(problem)
    for layout, dtype in (("NHWC", "float16"), ("NCHW", "bfloat16"))
    for problem in suites.suite("paper", batch=128, dtype=dtype, layout=layout).values()
]


@pytest.fixture(scope="module")
def built(request):
    """Kernel by what is asked for; of all that is, what will be tried."""
    return build_for(request)


@pytest.fixture
def kernel(asked, built):
    if asked.config is not None and asked.config.wgmma and resolve(DEVICE).arch != "sm_90a":
        pytest.skip("wgmma needs sm_90a")
    if isinstance(built[asked], Exception):
        raise built[asked]
    return built[asked]


@pytest.mark.parametrize("asked", [*PROBLEMS, *EPILOGUES, *CONFIGS], ids=str)
def test_values(kernel):
    assert_right(kernel)


@pytest.mark.parametrize("asked", [*EPILOGUES, *CONFIGS], ids=str)
def test_runs_are_equal_to_the_bit(kernel):
    made, _ = solved(kernel.problem, kernel.epilogue, kind="normal")
    first = run(kernel, made)
    for _ in range(20):
        assert torch().equal(run(kernel, made), first)


@pytest.mark.parametrize("asked", PAPER, ids=str)
def test_paper_layers(kernel):
    assert_close_to_float64(kernel)
