"""Depthwise convolution on a CUDA device: values, and runs that agree whatever else it does.

Every kernel that the selected tests ask for is built before the first of them, as in `test_gpu`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from depthwise_cases import (
    EPILOGUES,
    EVEN,
    FULL,
    GROUPS,
    LAST,
    MMA_CASES,
    ODD,
    SQUARE,
    STEPS,
    cases,
    drawn,
)
from on_gpu import (
    DEVICE,
    Asked,
    assert_close_to_float64,
    assert_right,
    assert_right_in_another_process,
    build_for,
    load,
    poisoned,
    run,
    solved,
    torch,
)

import im2win_tvm
from im2win_tvm import reference, suites, tensors
from im2win_tvm.epilogue import NONE
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget

pytestmark = pytest.mark.gpu

CORES, MATRICES = "cuda_depthwise", "cuda_depthwise_mma"
HERE = CudaTarget("sm_90a")


def taken(problem):
    """The forms that take a problem."""
    return [form for form in (CORES, MATRICES) if SCHEDULES[form].supports(problem, HERE) is None]


PROBLEMS = [Asked(CORES, p, FULL) for p in drawn(3, 120, most_work=4_000_000)]
CONFIGS = [
    *(Asked(CORES, problem, FULL, config) for _, problem, config in cases()),
    *(Asked(MATRICES, problem, FULL, config) for problem, config in MMA_CASES.values()),
    *(
        Asked(MATRICES, problem.replace(dtype="bfloat16"), NONE, config)
        for problem, config in MMA_CASES.values()
    ),
]
EPILOGUED = [
    *(Asked(CORES, problem, epilogue) for problem in (ODD, EVEN) for epilogue in EPILOGUES),
    *(Asked(MATRICES, problem, epilogue) for problem in (SQUARE, LAST) for epilogue in EPILOGUES),
]
LAYERS = [
    Asked(form, problem)
    for layout, dtype in (
        ("NHWC", "float16"),
        ("NCHW", "bfloat16"),
        ("NHWC", "float32"),
        ("NCHW", "float32"),
    )
    for problem in suites.suite("depthwise", batch=8, dtype=dtype, layout=layout).values()
    for form in taken(problem)
]
BUSY = [
    Asked(form, suites.layer("depthwise", name, batch=32, dtype=dtype, layout=layout))
    for form, name, dtype, layout in (
        (CORES, "mobilenet-144", "float16", "NCHW"),
        (CORES, "mobilenet-576-first", "float16", "NHWC"),
        (CORES, "convnext-384", "float32", "NCHW"),
        (MATRICES, "convnext-96", "float16", "NCHW"),
        (MATRICES, "replknet-256", "bfloat16", "NHWC"),
    )
]
SMALL = [
    Asked(CORES, ODD, FULL),
    Asked(CORES, EVEN, FULL),
    Asked(CORES, STEPS.replace(dtype="float32"), FULL),
    Asked(CORES, GROUPS, FULL),
    Asked(MATRICES, SQUARE, FULL),
    Asked(MATRICES, LAST, FULL),
]
every_small = pytest.mark.parametrize("asked", SMALL, ids=str)


@pytest.fixture(scope="module")
def built(request):
    """Kernel by what is asked for; of all that is, what will be tried."""
    return build_for(request)


@pytest.fixture
def kernel(asked, built):
    if isinstance(built[asked], Exception):
        raise built[asked]
    assert built[asked].workspace_bytes == 0
    return built[asked]


@pytest.mark.parametrize("asked", [*PROBLEMS, *CONFIGS, *EPILOGUED], ids=str)
def test_values(kernel):
    assert_right(kernel)


@pytest.mark.parametrize("asked", LAYERS, ids=str)
def test_layers(kernel):
    assert_close_to_float64(kernel)


@pytest.mark.parametrize("asked", BUSY, ids=str)
def test_runs_are_equal_to_the_bit_under_load(kernel):
    problem = kernel.problem
    dtype = getattr(torch(), problem.dtype)
    x = torch().randn(problem.input_shape, device=DEVICE).to(dtype)
    w = kernel.prepare(torch().randn(problem.weight_shape, device=DEVICE).to(dtype))
    first = kernel(x, w, out=poisoned(problem))
    assert first.isfinite().all()
    with load():
        for _ in range(30):
            outputs = [kernel(x, w, out=poisoned(problem)) for _ in range(10)]
            assert all(torch().equal(each, first) for each in outputs)


def reference_of(kernel, made):
    operands = [tensors.from_torch(tensor) for tensor in made]
    return reference.conv2d(*operands[:2], kernel.problem, *operands[2:], "relu")


@every_small
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["x", "w"])
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(name, value, kernel):
    made, _ = solved(kernel.problem, FULL, seed=2)
    elements = getattr(made, name).reshape(-1)
    # From the middle on, the first element that an output reads.
    for place in range(elements.numel() // 2, elements.numel()):
        before = elements[place].item()
        elements[place] = value
        expected = reference_of(kernel, made)
        if not np.isfinite(expected).all():
            break
        elements[place] = before
    actual = run(kernel, made).double().cpu().numpy()
    np.testing.assert_array_equal(actual, expected)
    assert 0 < np.isfinite(actual).sum() < actual.size


@every_small
def test_captured_in_a_graph_and_replayed(kernel):
    made, _ = solved(kernel.problem, FULL)
    w, out = kernel.prepare(made.w), poisoned(kernel.problem)
    run(kernel, made, w=w)
    torch().cuda.synchronize()
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        run(kernel, made, w=w, out=out)
    for seed in (5, 6):
        fresh, _ = solved(kernel.problem, FULL, seed=seed)
        for tensor, value in zip(made, fresh._replace(w=made.w), strict=True):
            tensor.copy_(value)
        out.fill_(torch().nan)
        graph.replay()
        np.testing.assert_array_equal(out.double().cpu().numpy(), reference_of(kernel, made))


@every_small
def test_exported_and_loaded_in_a_process_without_tvm(kernel, tmp_path):
    library = kernel.export(tmp_path / "kernel.so")
    loaded = im2win_tvm.load(library)
    assert loaded.metadata == kernel.metadata
    assert_right(loaded)
    if kernel.problem.dtype != "bfloat16":  # NumPy does not write it
        assert_right_in_another_process(library, *solved(kernel.problem, FULL), tmp_path)


@pytest.mark.parametrize("asked", [SMALL[0], SMALL[4]], ids=str)
def test_threads_share_a_kernel(kernel):
    ones = [solved(kernel.problem, FULL, seed=seed) for seed in range(2)]
    torch().cuda.synchronize()

    def wrong_runs(one):
        made, expected = one
        with torch().cuda.stream(torch().cuda.Stream()):
            outputs = [run(kernel, made).cpu().numpy() for _ in range(100)]
        return sum(not np.array_equal(output, expected) for output in outputs)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(wrong_runs, ones)) == [0, 0]
