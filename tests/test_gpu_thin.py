"""Few input channels on a Hopper GPU: values, and runs that agree whatever else it does.

Every kernel that the selected tests ask for is built before the first of them, as in `test_gpu`.
"""

import random

import numpy as np
import pytest
from on_gpu import (
    DEVICE,
    Asked,
    assert_close_to_float64,
    assert_right,
    assert_right_in_another_process,
    build_for,
    poisoned,
    run,
    solved,
    torch,
)
from problems import edge_problems, odd_problems
from thin_cases import (
    BASE,
    CASES,
    EPILOGUES,
    FEW,
    FORMS,
    FULL,
    case,
    cases,
    config,
    drawn,
    drawn_fp32,
    fp32_case,
    fp32_config,
)

from im2win_tvm import reference, suites, tensors
from im2win_tvm.epilogue import NONE
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import resolve

pytestmark = pytest.mark.gpu


def asked(problem, epilogue=NONE, chosen=None, target=None):
    """By the schedule of the problem's dtype."""
    return Asked(FORMS[problem.dtype], problem, epilogue, chosen, target)


def asked_fp32(problem, epilogue=NONE, chosen=None, target=None):
    """In the class fp32."""
    return Asked("cuda_thin_fp32", problem, epilogue, chosen, target)


def taken(problems):
    """In all dtypes by turns, of few channels; those that the schedule takes."""
    for turn, problem in enumerate(problems):
        channels, dtype = (1, 3, 4, 5, 12)[turn % 5], tuple(FORMS)[turn % 3]
        problem = problem.replace(groups=1, in_channels=channels, dtype=dtype)
        if SCHEDULES[FORMS[dtype]].supports(problem, FEW) is None:
            yield asked(problem, FULL if turn % 2 else NONE)
        problem = problem.replace(dtype="float32")
        if SCHEDULES["cuda_thin_fp32"].supports(problem, FEW) is None:
            yield asked_fp32(problem, NONE if turn % 2 else FULL)


PROBLEMS = list(taken([*(p for _, p in edge_problems()), *odd_problems(7, 100)]))
# As if there were two multiprocessors: every block takes many tiles.
CONFIGS = [
    *(asked(problem, epilogue, chosen, FEW) for _, problem, chosen, epilogue in cases()),
    *(
        asked(problem, FULL, chosen, FEW)
        for dtype in FORMS
        for layout in ("NHWC", "NCHW")
        for problem, chosen in (case(*each, dtype, layout) for each in CASES.values())
    ),
    *(asked(problem, FULL, chosen, FEW) for problem, chosen in drawn(9, 90)),
    *(
        asked_fp32(problem, EPILOGUES[turn % 8], chosen, FEW)
        for layout in ("NHWC", "NCHW")
        for turn, name in enumerate(CASES)
        for problem, chosen in (fp32_case(name, layout),)
        if SCHEDULES["cuda_thin_fp32"].check(chosen, problem, FEW) is None
    ),
    *(asked_fp32(problem, FULL, chosen, FEW) for problem, chosen in drawn_fp32(9, 60)),
]
FIRST = [
    (suite, layer)
    for suite, layers in (
        ("paper", ("conv1", "conv2", "conv3", "conv7")),
        ("resnet50", ("conv1",)),
        ("vgg16", ("conv1_1",)),
    )
    for layer in layers
]
LAYERS = [
    asked(suites.layer(suite, layer, batch, dtype, layout))
    for batch in (128, 1)
    for layout in ("NHWC", "NCHW")
    for dtype in FORMS
    for suite, layer in FIRST
]
LAYERS += [
    asked_fp32(suites.layer(suite, layer, batch, "float32", layout))
    for batch in (128, 1)
    for layout in ("NHWC", "NCHW")
    for suite, layer in FIRST
]
BUSY = {
    f"{layer}, {dtype}, {layout}": asked(suites.layer("paper", layer, 32, dtype, layout))
    for layer, dtype, layout in (
        ("conv1", "float16", "NHWC"),
        ("conv7", "bfloat16", "NHWC"),
        ("conv3", "float16", "NCHW"),
        ("conv3", "float32", "NHWC"),
        ("conv1", "float32", "NHWC"),
    )
} | {
    f"{layer}, fp32, NHWC": asked_fp32(suites.layer("paper", layer, 32, "float32", "NHWC"))
    for layer in ("conv1", "conv3", "conv7")
}
SMALL = [
    asked(BASE, FULL, config(BASE)),
    asked(BASE.replace(layout="NCHW"), FULL, config(BASE.replace(layout="NCHW"))),
    asked(BASE.replace(dtype="float32"), FULL, config(BASE.replace(dtype="float32"))),
    asked(BASE.replace(stride=1), FULL, config(BASE.replace(stride=1))),
    *(
        asked_fp32(problem, FULL, fp32_config(problem))
        for kernel_size, layout in ((3, "NHWC"), (7, "NCHW"))
        for problem in (BASE.replace(dtype="float32", kernel_size=kernel_size, layout=layout),)
    ),
]
every_small = pytest.mark.parametrize("asked", SMALL, ids=str)


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


@pytest.mark.parametrize("asked", [*PROBLEMS, *CONFIGS], ids=str)
def test_values(kernel):
    assert_right(kernel)


@pytest.mark.parametrize("asked", LAYERS, ids=str)
def test_layers(kernel):
    assert kernel.workspace_bytes == 0
    assert_close_to_float64(kernel)


@pytest.mark.parametrize("asked", BUSY.values(), ids=BUSY)
def test_runs_beside_other_streams_are_equal_to_the_bit(kernel):
    """300 runs on three streams, beside products on a fourth: blocks share nothing but inputs."""
    problem = kernel.problem
    dtype = getattr(torch(), problem.dtype)
    x = torch().randn(problem.input_shape, device=DEVICE).to(dtype)
    w = kernel.prepare(torch().randn(problem.weight_shape, device=DEVICE).to(dtype))
    first = kernel(x, w, out=poisoned(problem))
    assert first.isfinite().all()
    a = torch().ones((4096, 4096), dtype=torch().float16, device=DEVICE)
    streams, aside = [torch().cuda.Stream() for _ in range(3)], torch().cuda.Stream()
    outputs = [poisoned(problem) for _ in streams]
    wrong = [torch().zeros((), dtype=torch().int64, device=DEVICE) for _ in streams]
    torch().cuda.synchronize()
    for _ in range(100):
        with torch().cuda.stream(aside):
            torch().mm(a, a)
        for stream, out, count in zip(streams, outputs, wrong, strict=True):
            with torch().cuda.stream(stream):
                out.fill_(torch().nan)
                kernel(x, w, out=out)
                count += (out != first).any()
    torch().cuda.synchronize()
    assert [count.item() for count in wrong] == [0, 0, 0]


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
        operands = [tensors.from_torch(tensor) for tensor in made]
        expected = reference.conv2d(*operands[:2], kernel.problem, *operands[2:], "relu")
        np.testing.assert_array_equal(tensors.from_torch(out).astype("float64"), expected)


@every_small
@pytest.mark.parametrize("elements", [1, 2, 3, 5])
def test_an_input_may_begin_anywhere(kernel, elements):
    made, expected = solved(kernel.problem, FULL)
    whole = torch().full((made.x.numel() + elements,), torch().nan, device=DEVICE)
    whole = whole.to(made.x.dtype)
    x = whole[elements:].view(made.x.shape)
    x.copy_(made.x)
    actual = run(kernel, made._replace(x=x))
    np.testing.assert_array_equal(tensors.from_torch(actual).astype("float64"), expected)


@every_small
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(kernel):
    made = tensors.fill(kernel.problem, "integer", 1, True, True)
    chance = random.Random(3)
    for value in (np.nan, np.inf):
        made.x.reshape(-1)[chance.randrange(made.x.size)] = value
    expected = reference.conv2d(*made[:2], kernel.problem, *made[2:], "relu")
    given = tensors.Tensors(*(tensors.to_torch(array).to(DEVICE) for array in made))
    actual = tensors.from_torch(run(kernel, given)).astype("float64")
    np.testing.assert_array_equal(actual, expected)
    assert 0 < np.isfinite(actual).sum() < actual.size


@every_small
def test_exported_and_loaded_in_a_process_without_tvm(kernel, tmp_path):
    library = kernel.export(tmp_path / "kernel.so")
    assert_right_in_another_process(library, *solved(kernel.problem, FULL), tmp_path)
