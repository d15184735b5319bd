"""Float32 by halves on a Hopper GPU: values, errors, and runs that agree.

Every kernel that the selected tests ask for is built before the first of them, as in `test_gpu`.
"""

import numpy as np
import pytest
from fp32_errors import DATA, data, fma_chain, rms, windows
from on_gpu import (
    Asked,
    assert_close_to_float64,
    assert_right,
    build_for,
    on_device,
    poisoned,
    torch,
)
from problems import edge_problems, odd_problems
from test_cuda_window_fp32 import TRIED
from thin_cases import fp32_config
from window_cases import EPILOGUES, FEW

from im2win_tvm import reference, suites, tensors
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cuda_window_fp32_tiles import Config
from im2win_tvm.target import resolve

pytestmark = pytest.mark.gpu

FULL = Epilogue(True, True, "relu")
SCHEDULE = SCHEDULES["cuda_window_fp32"]


def asked(problem, epilogue=NONE, config=None, target=None):
    return Asked(SCHEDULE.name, problem, epilogue, config, target)


def taken(problems):
    for problem in dict.fromkeys(p.replace(dtype="float32") for p in problems):
        if SCHEDULE.supports(problem, FEW) is None:
            yield asked(problem, FULL)


PROBLEMS = list(taken([*(p for _, p in edge_problems()), *odd_problems(6, 150)]))
# As if there were two multiprocessors: every block takes many tiles.
CONFIGS = [
    asked(problem, EPILOGUES[turn % 8], config, FEW)
    for turn, (problem, config) in enumerate(TRIED.values())
]
LAYERS = [
    asked(problem)
    for suite, batch in (("paper", 128), ("resnet50", 32), ("resnet50", 1), ("vgg16", 2))
    for layout in ("NHWC", "NCHW")
    for problem in suites.suite(suite, batch=batch, layout=layout).values()
    if SCHEDULE.supports(problem, FEW) is None
]
PAPER = suites.suite("paper", 128, layout="NHWC")
# Small matrices, for which shared memory is busiest, and the largest; both kinds of blocks.
BUSY = {
    "small matrices": asked(PAPER["conv11"], NONE, Config(8, 2, 3, True, along_p=2)),
    "rows": asked(PAPER["conv9"], NONE, Config(1, 14, 8, along_p=2, filter_stages=9)),
    "two stages of the filter": asked(
        PAPER["conv11"],
        NONE,
        Config(16, 3, 3, True, along_m=2, taps="row", pixel_stages=6, filter_stages=2),
    ),
    "wide": asked(
        PAPER["conv5"],
        NONE,
        Config(8, 1, 20, True, along_m=2, taps="row", pixel_stages=4, filter_stages=7),
    ),
    "pixels": asked(
        PAPER["conv9"], NONE, Config(8, 1, 18, True, along_p=2, filter_stages=6, block="pixel")
    ),
    "split": asked(
        PAPER["conv12"],
        NONE,
        Config(16, 1, 5, True, along_m=2, taps="row", pixel_stages=4, filter_stages=6, split=3),
    ),
}
ERRORS = [
    asked(ConvProblem(3, 72, (12, 18), 24, 3, 1, 1, layout="NHWC"), NONE, config)
    for config in (Config(1, 4, 8, along_p=2), Config(1, 4, 8, block="pixel"))
]
# Of few channels: three halves and two, and one to three steps of K before a promotion.
ERRORS += [
    Asked("cuda_thin_fp32", problem, NONE, fp32_config(problem, steps=steps), None)
    for kernel_size in (3, 6, 7, 11)
    for problem in (
        ConvProblem(3, 3, (24, 30), 24, kernel_size, 1 + kernel_size // 4, 1, layout="NHWC"),
    )
    for steps in (1, 2)
]


@pytest.fixture(scope="module")
def built(request):
    """Kernel by what is asked for; of all that is, what will be tried."""
    if resolve("cuda").arch != "sm_90a":
        pytest.skip("it needs sm_90a")
    return build_for(request)


@pytest.fixture
def kernel(asked, built):
    if isinstance(built[asked], Exception):
        raise built[asked]
    return built[asked]


@pytest.mark.parametrize("asked", [*PROBLEMS, *CONFIGS], ids=str)
def test_values(kernel):
    assert_right(kernel)


@pytest.mark.parametrize("asked", LAYERS, ids=str)
def test_layers(kernel):
    assert_close_to_float64(kernel)


@pytest.mark.parametrize("asked", BUSY.values(), ids=BUSY)
def test_runs_are_equal_to_the_bit(kernel):
    """A scale that is overwritten before it is read shows in values that are no integers."""
    problem = kernel.problem
    assert_close_to_float64(kernel)
    x = torch().randn(problem.input_shape, device="cuda")
    w = kernel.prepare(torch().randn(problem.weight_shape, device="cuda"))
    first = kernel(x, w, out=poisoned(problem))
    assert first.isfinite().all()
    for _ in range(300):
        assert torch().equal(kernel(x, w, out=poisoned(problem)), first)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("asked", ERRORS, ids=str)
def test_errors_are_no_larger_than_those_of_a_chain_of_fma(kernel, kind):
    problem = kernel.problem
    x, w = data(kind, problem)
    out = kernel(on_device(x), on_device(w), out=poisoned(problem))
    actual = tensors.from_torch(out)
    exact = reference.conv2d(x, w, problem)
    chain = fma_chain(windows(x, problem), w.reshape(len(w), -1)).reshape(exact.shape)
    assert np.isfinite(actual).all()
    for got, fma, right in zip(actual, chain, exact, strict=True):
        assert rms(got - right, right) <= rms(fma - right, right)
