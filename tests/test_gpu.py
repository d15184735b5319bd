"""The CUDA schedules on a CUDA device, through PyTorch: values, streams, graphs, threads.

nvcc takes seconds for each kernel. All of them are therefore built before the first test that
asks for one, in as many processes as there are processors.
"""

import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from on_gpu import (
    DEVICE,
    assert_close_to_float64,
    assert_right,
    assert_right_in_another_process,
    on_device,
    poisoned,
    run,
    solved,
    torch,
)
from problems import DTYPES, edge_problems, odd_problems, problem_id

import im2win_tvm
from im2win_tvm import ArgumentError, builds, reference, suites, tensors
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import resolve

pytestmark = pytest.mark.gpu

# Every CUDA schedule of all float32 problems, and the narrowest dtype that it takes.
FORMS = {
    "cuda_simt": "float16",
    "cuda_simt_explicit": "float16",
    "cuda_simt_async": "float32",
    "cuda_simt_async_explicit": "float32",
}
EDGES = dict(edge_problems())
ODD = odd_problems(6, 150)
RAGGED = ConvProblem(3, 6, (11, 13), 22, (3, 4), (2, 1), ((1, 2), (0, 1)), (1, 1), 2)
WHOLE = ConvProblem(2, 16, (32, 32), 64, 3, padding=1)
FULL = Epilogue(True, True, "relu")
EPILOGUES = [
    Epilogue(*parts) for parts in itertools.product([False, True], [False, True], [None, "relu"])
]
PAPER = {
    (name, layout): problem
    for layout in ("NCHW", "NHWC")
    for name, problem in suites.suite("paper", batch=128, layout=layout).items()
}
every_form = pytest.mark.parametrize("form", FORMS)


def takes(form, problem):
    return problem.dtype == "float32" or FORMS[form] == "float16"


def every_form_with(problems):
    """(form, problem) of the mapping from names to problems, where the form takes it."""
    ways = {
        f"{name}-{form}": (form, problem)
        for form in FORMS
        for name, problem in problems.items()
        if takes(form, problem)
    }
    return pytest.mark.parametrize(("form", "problem"), ways.values(), ids=ways)


MANY = {*EDGES.values(), *ODD, *PAPER.values()}
# Problem and epilogue of every kernel that a test here asks for.
WANTED = [
    *((problem, NONE) for problem in MANY),
    *((RAGGED.replace(layout="NHWC"), epilogue) for epilogue in EPILOGUES),
    *((WHOLE.replace(dtype=dtype), epilogue) for epilogue in EPILOGUES for dtype in DTYPES),
    (WHOLE, NONE),
    (WHOLE.replace(layout="NHWC"), NONE),
    (RAGGED, FULL),
]


@pytest.fixture(scope="session")
def built(request):
    """(form, problem, epilogue) -> kernel; of the many problems those that will be tried."""
    target = resolve(DEVICE)
    selected = _selected(request.session)
    keys = [
        (form, (problem, epilogue))
        for form, (problem, epilogue) in itertools.product(FORMS, WANTED)
        if takes(form, problem) and (problem not in MANY or (form, problem) in selected)
    ]
    started = time.perf_counter()
    kernels = builds.build_all(
        [
            builds.Request(problem, target, schedule=form, epilogue=epilogue)
            for form, (problem, epilogue) in keys
        ],
        builds.default_jobs(target),
    )
    found = {(form, *wanted): each for (form, wanted), each in zip(keys, kernels, strict=True)}
    print(f"\n{len(found)} kernels in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return found


def _selected(session):
    """(form, problem) of the tests that will run."""
    parameters = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    return {(p["form"], p["problem"]) for p in parameters if {"form", "problem"} <= p.keys()}


@pytest.fixture
def kernel_of(built):
    def find(form, problem, epilogue=NONE):
        kernel = built[form, problem, epilogue]
        if isinstance(kernel, Exception):
            raise kernel
        return kernel

    return find


@every_form_with(EDGES)
def test_edges(problem, form, kernel_of):
    assert_right(kernel_of(form, problem))


@every_form_with({problem_id(problem): problem for problem in ODD})
def test_odd_problems(problem, form, kernel_of):
    assert_right(kernel_of(form, problem))


@every_form
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_epilogues(epilogue, form, kernel_of):
    assert_right(kernel_of(form, RAGGED.replace(layout="NHWC"), epilogue))
    assert_right(kernel_of(form, WHOLE.replace(dtype=FORMS[form]), epilogue))


@every_form_with({"-".join(key): problem for key, problem in PAPER.items()})
def test_paper_layers(problem, form, kernel_of):
    assert_close_to_float64(kernel_of(form, problem))


@every_form
def test_nan_reaches_the_outputs_that_read_it_and_no_others(form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    made = tensors.fill(RAGGED, "integer", 1, True, True)
    made.x[1, 4, 5, 6], made.w[3, 1, 0, 2] = np.nan, np.inf
    expected = reference.conv2d(*made[:2], RAGGED, *made[2:], "relu")
    actual = run(kernel, tensors.Tensors(*map(on_device, made))).cpu().numpy()
    np.testing.assert_array_equal(actual, expected)
    assert 0 < np.isnan(actual).sum() < actual.size


@every_form
def test_runs_are_equal_to_the_bit(form, kernel_of):
    kernel = kernel_of(form, WHOLE)
    made, _ = solved(WHOLE, kind="normal")
    first = run(kernel, made)
    for _ in range(20):
        assert torch().equal(run(kernel, made), first)


@every_form
def test_weights_are_prepared_once(form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    made, expected = solved(RAGGED, FULL)
    prepared = kernel.prepare(made.w)
    made.w.fill_(torch().nan)
    for _ in range(3):
        np.testing.assert_array_equal(run(kernel, made, w=prepared).cpu().numpy(), expected)
    other = kernel_of(form, WHOLE)
    with pytest.raises(ArgumentError, match=r"^w: prepared by a kernel with another config"):
        other(solved(WHOLE)[0].x, prepared)


@every_form
def test_wrong_tensors_are_refused_by_name_and_nothing_is_written(form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    made, _ = solved(RAGGED, FULL)
    out = poisoned(RAGGED)
    changes = {
        "is on 'cpu'; this kernel runs on 'cuda'": lambda t: t.cpu(),
        "dtype float16; this kernel takes float32": lambda t: t.half(),
        "shape .*; this kernel takes": lambda t: t[..., 1:],
        "strides .* are not those of a contiguous": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "requires grad": lambda t: t.clone().requires_grad_(),
    }
    for (message, change), name in itertools.product(changes.items(), made._fields):
        with pytest.raises(ArgumentError, match=f"^{name}: {message}"):
            run(kernel, made._replace(**{name: change(getattr(made, name))}), out=out)
    with pytest.raises(ArgumentError, match=r"^out: is on 'cpu'"):
        run(kernel, made, out=out.cpu())
    torch().cuda.synchronize()
    assert out.isnan().all()


@every_form
def test_views_at_any_element_are_right_or_refused(form, kernel_of):
    """One element into an allocation: vectors are not aligned there."""
    for problem, epilogue in ((RAGGED, FULL), (WHOLE, NONE), (WHOLE.replace(layout="NHWC"), NONE)):
        kernel = kernel_of(form, problem, epilogue)
        made, expected = solved(problem, epilogue)

        def moved(tensor):
            memory = torch().full((tensor.numel() + 1,), 77.0, dtype=tensor.dtype, device=DEVICE)
            memory[1:] = tensor.reshape(-1)
            return memory[1:].view(tensor.shape)

        for name in (field for field in made._fields if getattr(made, field) is not None):
            changed = made._replace(**{name: moved(getattr(made, name))})
            alignment = kernel.metadata["arguments"][name]["alignment"]
            if alignment > problem.itemsize:
                with pytest.raises(ArgumentError, match=rf"^{name}: .* not aligned to {alignment}"):
                    run(kernel, changed)
            else:
                np.testing.assert_array_equal(run(kernel, changed).cpu().numpy(), expected)


@every_form
def test_channels_last_tensors_are_taken_without_a_copy(form, kernel_of):
    problem = WHOLE.replace(layout="NHWC")
    made, expected = solved(problem)
    x = made.x.permute(0, 3, 1, 2).contiguous(memory_format=torch().channels_last)
    seen = x.permute(0, 2, 3, 1)
    assert seen.data_ptr() == x.data_ptr()
    out = run(kernel_of(form, problem), made._replace(x=seen))
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@every_form
def test_workspace_is_what_a_call_allocates(form, kernel_of):
    kernel = kernel_of(form, WHOLE)
    made, _ = solved(WHOLE)
    prepared, out = kernel.prepare(made.w), poisoned(WHOLE)
    run(kernel, made, w=prepared, out=out)
    torch().cuda.synchronize()
    torch().cuda.reset_peak_memory_stats()
    before = torch().cuda.memory_allocated()
    run(kernel, made, w=prepared, out=out)
    taken = torch().cuda.max_memory_allocated() - before
    # PyTorch rounds up to 512 bytes.
    assert taken == -(-kernel.workspace_bytes // 512) * 512
    assert (taken > 0) == form.endswith("explicit")


def busy():
    """Some 0.2 s of nothing on the current stream."""
    torch().cuda._sleep(400_000_000)


@every_form
def test_runs_on_the_current_stream(form, kernel_of):
    """The operands arrive late on the side stream: a kernel elsewhere would have read NaN."""
    kernel = kernel_of(form, RAGGED, FULL)
    late, expected = solved(RAGGED, FULL)
    run(kernel, late)
    made = tensors.Tensors(*(torch().full_like(tensor, torch().nan) for tensor in late))
    out, side = poisoned(RAGGED), torch().cuda.Stream()
    torch().cuda.synchronize()
    with torch().cuda.stream(side):
        busy()
        for tensor, value in zip(made, late, strict=True):
            tensor.copy_(value)
        run(kernel, made, out=out)
    side.synchronize()
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@every_form
def test_does_not_wait_for_other_streams(form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    made, expected = solved(RAGGED, FULL)
    prepared, out = kernel.prepare(made.w), poisoned(RAGGED)
    other, side = torch().cuda.Stream(), torch().cuda.Stream()
    with torch().cuda.stream(side):  # loads the code, and takes memory that is then kept
        run(kernel, made, w=prepared)
    torch().cuda.synchronize()
    with torch().cuda.stream(other):
        busy()
    with torch().cuda.stream(side):
        run(kernel, made, w=prepared, out=out)
    side.synchronize()
    assert not other.query(), "the other stream has ended: the kernel waited for it"
    other.synchronize()
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@every_form
@pytest.mark.parametrize("prepared", [True, False])
def test_captured_in_a_graph_and_replayed(prepared, form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    made, _ = solved(RAGGED, FULL)
    w = kernel.prepare(made.w) if prepared else made.w
    out = poisoned(RAGGED)
    run(kernel, made, w=w)
    torch().cuda.synchronize()
    graph = torch().cuda.CUDAGraph()
    with torch().cuda.graph(graph):
        run(kernel, made, w=w, out=out)
    for seed in (5, 6):
        fresh, _ = solved(RAGGED, FULL, seed=seed)
        fresh = fresh._replace(w=made.w) if prepared else fresh
        for tensor, value in zip(made, fresh, strict=True):
            tensor.copy_(value)
        out.fill_(torch().nan)
        graph.replay()
        operands = [tensor.cpu().numpy() for tensor in made]
        expected = reference.conv2d(*operands[:2], RAGGED, *operands[2:], "relu")
        np.testing.assert_array_equal(out.cpu().numpy(), expected)


@every_form
def test_threads_share_a_kernel(form, kernel_of):
    kernel = kernel_of(form, RAGGED, FULL)
    cases = [solved(RAGGED, FULL, seed=seed) for seed in range(4)]
    torch().cuda.synchronize()

    def work(case):
        made, expected = case
        wrong, stream = 0, torch().cuda.Stream()
        with torch().cuda.stream(stream):
            for _ in range(50):
                out = run(kernel, made)
                wrong += not np.array_equal(out.cpu().numpy(), expected)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, cases)) == [0, 0, 0, 0]


@every_form
def test_exported_and_loaded_in_a_process_without_tvm(form, kernel_of, tmp_path):
    kernel = kernel_of(form, RAGGED, FULL)
    library = kernel.export(tmp_path / "kernel.so")
    loaded = im2win_tvm.load(library)
    assert loaded.metadata == kernel.metadata
    assert_right(loaded)
    assert_right_in_another_process(library, *solved(RAGGED, FULL), tmp_path)


def test_code_for_another_architecture_is_refused(tmp_path):
    here = torch().cuda.get_device_capability()
    arch = "sm_80" if here[0] != 8 else "sm_90"
    path = im2win_tvm.compile(RAGGED, "cuda", arch=arch).export(tmp_path / "kernel.so")
    with pytest.raises(im2win_tvm.ArtifactError, match=f"arch='{arch}': this device is sm_"):
        im2win_tvm.load(path)
