"""Windows in shared memory on a Hopper GPU: values, and runs that agree whatever else it does.

Every kernel that the selected tests ask for is built before the first of them, as in `test_gpu`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
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
from problems import HALVES_RAGGED, edge_problems, halves, odd_problems
from window_cases import BASE, BUSY, CASES, EPILOGUES, FEW, FORMS, cases, drawn

import im2win_tvm
from im2win_tvm import reference, suites, tensors
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.schedules.cuda_window_tiles import Config
from im2win_tvm.target import resolve

pytestmark = pytest.mark.gpu

FULL = Epilogue(True, True, "relu")


def asked(problem, epilogue=NONE, config=None, target=None):
    """By the schedule of the problem's dtype."""
    return Asked(FORMS[problem.dtype], problem, epilogue, config, target)


def taken(problems):
    """In two bytes and in tf32 by turns, those that the schedule takes."""
    for turn, problem in enumerate(halves(problems)):
        problem = problem.replace(dtype="float32") if turn % 3 == 2 else problem
        if SCHEDULES[FORMS[problem.dtype]].supports(problem, FEW) is None:
            yield asked(problem, FULL if turn % 2 else NONE)


PROBLEMS = list(taken([*(p for _, p in edge_problems()), *odd_problems(6, 150)]))
EPILOGUED = [
    asked(HALVES_RAGGED.replace(dtype=dtype, layout=layout, out_channels=channels), epilogue)
    for dtype, layout, channels in (
        ("float16", "NHWC", 80),
        ("bfloat16", "NHWC", 76),
        ("float16", "NCHW", 80),
        ("float32", "NHWC", 76),
    )
    for epilogue in EPILOGUES
]
# As if there were two multiprocessors: every block takes many tiles.
CONFIGS = [
    *(asked(problem, epilogue, config, FEW) for _, problem, config, epilogue in cases()),
    *(asked(p.replace(layout="NCHW"), FULL, config, FEW) for p, config in CASES.values()),
    *(asked(*(problem, FULL, config), FEW) for problem, config in drawn(7, 90)),
]
LAYERS = [
    asked(problem)
    for suite, batch in (("paper", 128), ("resnet50", 32))
    for layout, dtype in (("NHWC", "float16"), ("NCHW", "bfloat16"), ("NHWC", "float32"))
    for problem in suites.suite(suite, batch=batch, dtype=dtype, layout=layout).values()
]
BUSY_ONES = {name: asked(problem, NONE, config) for name, (problem, config) in BUSY.items()}
# The schedule reads x itself, or a copy of it, which lies in the workspace.
SMALL = [
    asked(BASE, FULL, Config(1, 2, 8, turns=True)),
    asked(BASE.replace(layout="NCHW"), FULL, Config(1, 2, 8, along_p=2)),
    asked(BASE.replace(dtype="float32"), FULL, Config(1, 2, 8, split=2)),
]
every_small = pytest.mark.parametrize("asked", SMALL, ids=str)
every_busy = pytest.mark.parametrize("asked", BUSY_ONES.values(), ids=BUSY_ONES)


@pytest.fixture(scope="module")
def built(request):
    """Kernel by what is asked for; of all that is, what will be tried."""
    if resolve(DEVICE).arch != "sm_90a":
        pytest.skip("it needs sm_90a")
    return build_for(request)


@pytest.fixture
def kernel(asked, built):
    if isinstance(built[asked], Exception):
        raise built[asked]
    return built[asked]


@pytest.mark.parametrize("asked", [*PROBLEMS, *EPILOGUED, *CONFIGS], ids=str)
def test_values(kernel):
    assert_right(kernel)


@pytest.mark.parametrize("asked", LAYERS, ids=str)
def test_layers(kernel):
    assert_close_to_float64(kernel)


@every_busy
def test_runs_are_equal_to_the_bit_under_load(kernel):
    assert_close_to_float64(kernel)
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


def expected_of(kernel, made):
    operands = [tensor.cpu().numpy() for tensor in made]
    return reference.conv2d(*operands[:2], kernel.problem, *operands[2:], "relu")


@every_small
@pytest.mark.parametrize("prepared", [True, False])
def test_captured_in_a_graph_and_replayed(prepared, kernel):
    problem = kernel.problem
    made, _ = solved(problem, FULL)
    w = kernel.prepare(made.w) if prepared else made.w
    out = poisoned(problem)
    run(kernel, made, w=w)
    torch().cuda.synchronize()
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        run(kernel, made, w=w, out=out)
    for seed in (5, 6):
        fresh, _ = solved(problem, FULL, seed=seed)
        fresh = fresh._replace(w=made.w) if prepared else fresh
        for tensor, value in zip(made, fresh, strict=True):
            tensor.copy_(value)
        out.fill_(torch().nan)
        graph.replay()
        np.testing.assert_array_equal(out.cpu().numpy(), expected_of(kernel, made))


def wrong_runs(kernel, solved_ones, turns):
    """How many are wrong, on a stream of this thread."""
    wrong = 0
    with torch().cuda.stream(torch().cuda.Stream()):
        for _ in range(turns):
            for made, expected in solved_ones:
                wrong += not np.array_equal(run(kernel, made).cpu().numpy(), expected)
    return wrong


@every_small
def test_threads_share_a_kernel(kernel):
    ones = [solved(kernel.problem, FULL, seed=seed) for seed in range(2)]
    torch().cuda.synchronize()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda one: wrong_runs(kernel, [one], 100), ones)) == [0, 0]


@every_small
def test_many_addresses(kernel):
    """More inputs by turns than the host keeps tensor maps of; in each thread anew."""
    ones = [solved(kernel.problem, FULL, seed=seed) for seed in range(40)]
    assert len({made.x.data_ptr() for made, _ in ones}) == 40
    torch().cuda.synchronize()
    assert wrong_runs(kernel, ones, 2) == 0
    with ThreadPoolExecutor(4) as pool:
        orders = [ones, ones[::-1], ones[::3], ones[20:]]
        assert list(pool.map(lambda order: wrong_runs(kernel, order, 3), orders)) == [0] * 4


@every_small
def test_one_address_after_another_is_freed(kernel):
    """Memory comes back from the allocator with other numbers in it."""
    for seed in range(20):
        made, expected = solved(kernel.problem, FULL, seed=seed)
        np.testing.assert_array_equal(run(kernel, made).cpu().numpy(), expected)
        del made


@every_small
def test_exported_and_loaded_in_a_process_without_tvm(kernel, tmp_path):
    library = kernel.export(tmp_path / "kernel.so")
    loaded = im2win_tvm.load(library)
    assert loaded.metadata == kernel.metadata
    assert_right(loaded)
    assert_right_in_another_process(library, *solved(kernel.problem, FULL), tmp_path)


@every_small
def test_nan_reaches_the_outputs_that_read_it_and_no_others(kernel):
    made = tensors.fill(kernel.problem, "integer", 1, True, True)
    for array in (made.x, made.w):
        array.reshape(-1)[array.size // 2] = np.nan
    expected = reference.conv2d(*made[:2], kernel.problem, *made[2:], "relu")
    given = tensors.Tensors(*(tensors.to_torch(array).to(DEVICE) for array in made))
    actual = run(kernel, given).cpu().numpy()
    np.testing.assert_array_equal(actual, expected)
    assert 0 < np.isnan(actual).sum() < actual.size
