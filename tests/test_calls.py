"""Calls with PyTorch's tensors, which are checked the short way, and calls that are bound."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from on_gpu import on_device, poisoned, solved

import im2win_tvm
from im2win_tvm import ArgumentError, arrays, reference, tensors
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.kernel import Kernel
from im2win_tvm.problem import ConvProblem

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

PROBLEM = ConvProblem(2, 3, (9, 11), 5, (3, 2), (2, 1), ((1, 0), (2, 1)))
FULL = dict(bias=True, residual=True, activation="relu")
NAMES = ("x", "w", "bias", "residual", "out")
# A convolution of an array into one of the same shape.
SQUARE = ConvProblem(1, 8, (4, 4), 8, 1)


@cache
def compiled(problem=PROBLEM, **options):
    return im2win_tvm.compile(problem, "llvm", **options)


def operands(seed=0):
    """Tensors of all operands and an output of NaN, by name; and the expected output."""
    made = tensors.fill(PROBLEM, "integer", seed, bias=True, residual=True)
    expected = reference.conv2d(made.x, made.w, PROBLEM, made.bias, made.residual, "relu")
    given = {name: torch.from_numpy(array) for name, array in made._asdict().items()}
    given["out"] = torch.full(PROBLEM.output_shape, torch.nan)
    return given, expected


def call(kernel, given):
    return kernel(
        given["x"], given["w"], given["bias"], residual=given["residual"], out=given["out"]
    )


def call_bound(kernel, given):
    return kernel.bind(
        given["x"], given["w"], given["bias"], residual=given["residual"], out=given["out"]
    )()


WAYS = pytest.mark.parametrize("way", [call, call_bound])


@pytest.fixture
def short_way_only(monkeypatch):
    """Fails whatever is not checked the short way, from when it is called."""

    def refuse(name, *_):
        raise AssertionError(f"{name} went the long way")

    return lambda: monkeypatch.setattr(arrays, "argument", refuse)


def misaligned(tensor):
    """A copy that starts one byte after an element's place."""
    memory = np.empty(tensor.nbytes + 8, np.uint8)
    start = -memory.ctypes.data % 4 + 1
    view = memory[start : start + tensor.nbytes].view(np.float32).reshape(tensor.shape)
    view[...] = tensor.numpy()
    return torch.from_numpy(view)


CHANGES = {
    "one axis more": lambda t: t[None],
    "one element less": lambda t: t[..., 1:],
    "as many elements": lambda t: t.reshape(-1, 1),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "int32": lambda t: t.nan_to_num().int(),
    "every other element": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "broadcast": lambda t: t[..., :1].expand(t.shape),
    "misaligned": misaligned,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "requires grad": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "no device": lambda t: t.tolist(),
    "nothing": lambda t: None,
}


@WAYS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_the_short_way_refuses_what_the_long_way_does(change, name, way, monkeypatch):
    kernel, (given, expected) = compiled(**FULL), operands()
    np.testing.assert_array_equal(call(kernel, given).numpy(), expected)  # now it knows PyTorch
    out = given["out"].fill_(torch.nan)
    given[name] = CHANGES[change](given[name])
    if (change, name) == ("nothing", "out"):  # allocated
        np.testing.assert_array_equal(way(kernel, given).numpy(), expected)
        return
    with pytest.raises(ArgumentError, match=f"^{name}: ") as short:
        way(kernel, given)
    assert out.isnan().all()
    monkeypatch.setattr(
        arrays.Argument, "check", lambda a, array: arrays.argument(a.name, array, a.expected, "cpu")
    )
    with pytest.raises(ArgumentError) as long:
        way(kernel, given)
    assert str(short.value) == str(long.value)


@WAYS
def test_plain_tensors_go_the_short_way(way, short_way_only):
    kernel, (given, expected) = im2win_tvm.compile(PROBLEM, "llvm", **FULL), operands()
    numpy = {name: tensor.numpy().copy() for name, tensor in given.items()}
    np.testing.assert_array_equal(way(kernel, numpy), expected)
    given["w"] = kernel.prepare(given["w"])
    way(kernel, given)
    short_way_only()
    given["out"].fill_(torch.nan)
    assert way(kernel, given) is given["out"]
    np.testing.assert_array_equal(given["out"].numpy(), expected)
    given["out"] = None
    np.testing.assert_array_equal(way(kernel, given).numpy(), expected)
    with pytest.raises(AssertionError, match="x went the long way"):
        way(kernel, {**given, "x": numpy["x"]})


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_tensors_with_gradients_are_taken_without_them(name, way):
    kernel, (given, expected) = compiled(**FULL), operands()
    for change in (torch.nn.Parameter, lambda t: t.requires_grad_()):
        changed = {**given, name: change(given[name].clone())}
        with torch.no_grad():
            actual = way(kernel, changed)
        np.testing.assert_array_equal(actual.detach().numpy(), expected)


@WAYS
def test_strides_of_single_elements_mean_nothing(way, short_way_only):
    problem = ConvProblem(1, 1, (4, 6), 2, 3)
    kernel, x, w = compiled(problem), torch.randn(1, 1, 4, 6), torch.randn(2, 1, 3, 3)
    given = dict(x=x, w=w, bias=None, residual=None, out=None)
    expected = way(kernel, given).clone()
    short_way_only()
    given["x"] = x.as_strided(x.shape, (7, 5, 6, 1))
    assert torch.equal(way(kernel, given), expected)


@WAYS
def test_an_output_over_the_input_is_refused(way):
    memory = torch.zeros(3 * 128)
    kernel, w = compiled(SQUARE), torch.ones(SQUARE.weight_shape)
    x = memory[128:256].view(1, 8, 4, 4)

    def given(start):
        out = memory[start : start + 128].view(1, 8, 4, 4)
        return dict(x=x, w=w, bias=None, residual=None, out=out)

    for start in (1, 127, 128, 129, 255):
        with pytest.raises(ArgumentError, match=r"^out: overlaps x"):
            way(kernel, given(start))
        mixed = {**given(start), "x": x.numpy()}
        with pytest.raises(ArgumentError, match=r"^out: overlaps x"):
            way(kernel, mixed)
    assert not memory.any()
    for start in (0, 256):
        way(kernel, given(start))


@WAYS
def test_an_output_over_another_operand_is_refused(way):
    """A residual may be the output, but not overlap it otherwise."""
    given, expected = operands()
    kernel, size = compiled(**FULL), given["out"].numel()
    memory = torch.full((2 * size,), torch.nan)

    def out_at(start):
        return memory[start : start + size].view(PROBLEM.output_shape)

    for name in ("bias", "residual"):
        held = out_at(size // 2).view(-1)[: given[name].numel()].view(given[name].shape)
        with pytest.raises(ArgumentError, match=rf"^out: overlaps {name}"):
            way(kernel, {**given, name: held, "out": out_at(size // 2 + (name == "residual"))})
    prepared = kernel.prepare(given["w"])
    packed = out_at(0).view(-1)[: prepared.packed.numel()].view(prepared.packed.shape)
    prepared = dataclasses.replace(prepared, packed=packed)
    with pytest.raises(ArgumentError, match=r"^out: overlaps packed"):
        way(kernel, {**given, "w": prepared, "out": out_at(0)})
    assert memory.isnan().all()
    out = out_at(0).copy_(given["residual"])
    np.testing.assert_array_equal(way(kernel, {**given, "residual": out, "out": out}), expected)


@WAYS
def test_operands_are_missing_or_too_many(way):
    given, _ = operands()
    for name in ("bias", "residual"):
        with pytest.raises(ArgumentError, match=f"^{name}: missing; .* with {name}=True"):
            way(compiled(**FULL), {**given, name: None})
        plain = {**given, "bias": None, "residual": None, name: given[name]}
        with pytest.raises(ArgumentError, match=f"^{name}: given; .* with {name}=False"):
            way(compiled(), plain)
    assert given["out"].isnan().all()


@WAYS
def test_prepared_weights_of_others_are_refused_or_fit(way):
    kernel, (given, expected) = compiled(**FULL), operands()
    prepared = kernel.prepare(given["w"])
    other = PROBLEM.replace(layout="NHWC")
    theirs = compiled(other).prepare(given["w"])
    with pytest.raises(ArgumentError, match=r"^w: prepared by a kernel with another config"):
        way(kernel, {**given, "w": theirs})
    for wrong, message in (
        (prepared.packed[None], "shape"),
        (prepared.packed.double(), "dtype"),
        (prepared.packed.to("meta"), "is on 'meta'"),
    ):
        with pytest.raises(ArgumentError, match=f"^packed: {message}"):
            way(kernel, {**given, "w": dataclasses.replace(prepared, packed=wrong)})
    # Of the same shape, in an order written by another function.
    swapped = Kernel(kernel._path, {**kernel.metadata, "prepare_hash": "0" * 16}, kernel)
    with pytest.raises(ArgumentError, match=r"^w: prepared by a kernel with another config"):
        way(kernel, {**given, "w": swapped.prepare(given["w"])})
    assert given["out"].isnan().all()
    # Of an equal origin that is another object.
    again = im2win_tvm.compile(PROBLEM, "llvm").prepare(given["w"])
    assert again.origin is not kernel._origin
    np.testing.assert_array_equal(way(kernel, {**given, "w": again}).numpy(), expected)


def test_threads_share_a_new_kernel():
    """Arrays and tensors by turns, from the first call on."""
    kernel = im2win_tvm.compile(PROBLEM, "llvm", **FULL)
    cases = [operands(seed) for seed in range(4)]

    def work(case):
        given, expected = case
        wrong = 0
        for turn in range(60):
            given["out"].fill_(torch.nan)
            given["x"] = torch.from_numpy(given["x"]) if turn % 2 else given["x"].numpy()
            wrong += not np.array_equal(call(kernel, given).numpy(), expected)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, cases)) == [0, 0, 0, 0]


@pytest.mark.parametrize("frame", ["numpy", "torch"])
def test_a_bound_call_reads_and_writes_its_arrays(frame):
    kernel, (given, expected) = compiled(**FULL), operands()
    if frame == "numpy":
        given = {name: tensor.numpy().copy() for name, tensor in given.items()}
    prepared = kernel.prepare(given["w"])
    bound = kernel.bind(
        given["x"], prepared, given["bias"], residual=given["residual"], out=given["out"]
    )
    assert bound.kernel is kernel and bound.out is given["out"]
    assert np.isnan(np.asarray(bound.out)).all()
    assert bound() is given["out"]
    np.testing.assert_array_equal(np.asarray(bound.out), expected)
    fresh, other = operands(seed=1)
    w = kernel.prepare(fresh["w"] if frame == "torch" else fresh["w"].numpy())
    prepared.packed[...] = w.packed
    for name in ("x", "bias", "residual"):
        given[name][...] = fresh[name] if frame == "torch" else fresh[name].numpy()
    np.testing.assert_array_equal(np.asarray(bound()), other)


def test_a_bound_call_keeps_what_it_needs():
    given, expected = operands()
    kernel = im2win_tvm.compile(PROBLEM, "llvm", **FULL)
    bound = kernel.bind(
        given["x"].clone(), given["w"].clone(), given["bias"].clone(), residual=given["residual"]
    )
    del kernel
    given["w"].fill_(torch.nan)  # raw weights were prepared
    for _ in range(3):
        np.testing.assert_array_equal(bound().numpy(), expected)


def test_a_bound_call_in_each_thread():
    kernel, cases = compiled(**FULL), [operands(seed) for seed in range(4)]

    def work(case):
        given, expected = case
        bound = kernel.bind(
            given["x"], given["w"], given["bias"], residual=given["residual"], out=given["out"]
        )
        wrong = 0
        for _ in range(60):
            given["out"].fill_(torch.nan)
            wrong += not np.array_equal(bound().numpy(), expected)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, cases)) == [0, 0, 0, 0]


@WAYS
def test_steps_run_in_order_through_a_workspace(way):
    """CPU kernels have one step. Here it runs twice, through an array of the caller's kind."""
    once = compiled(SQUARE)
    metadata = dict(once.metadata)
    metadata["arguments"] = metadata["arguments"] | {"between": metadata["arguments"]["y"]}
    metadata["workspaces"] = ["between"]
    metadata["calls"] = [
        {"function": "im2win_conv", "arguments": names}
        for names in (["x", "packed", "between"], ["between", "packed", "y"])
    ]
    twice = Kernel(once._path, metadata)
    assert twice.workspace_bytes - once.workspace_bytes == 4 * 128
    for made in (torch.randn, lambda *shape: torch.randn(*shape).numpy()):
        x, w = made(*SQUARE.input_shape), made(*SQUARE.weight_shape)
        given = dict(x=x, w=twice.prepare(w), bias=None, residual=None, out=None)
        actual = way(twice, given)
        assert type(actual) is type(x)
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(once(once(x, w), w)))


ON_GPU = Epilogue(True, True, "relu")


@pytest.fixture(scope="module")
def on_gpu():
    return im2win_tvm.compile(PROBLEM, "cuda", **dataclasses.asdict(ON_GPU))


@pytest.mark.gpu
def test_a_bound_call_runs_on_the_current_stream(on_gpu):
    """The input arrives late on the side stream: a kernel elsewhere would have read NaN."""
    made, expected = solved(PROBLEM, ON_GPU)
    x, out = torch.full_like(made.x, torch.nan), poisoned(PROBLEM)
    bound = on_gpu.bind(x, made.w, made.bias, residual=made.residual, out=out)
    bound()  # loads the code
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        x.copy_(made.x)
        bound()
    side.synchronize()
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.gpu
def test_a_bound_call_is_captured_in_a_graph_and_replayed(on_gpu):
    made, _ = solved(PROBLEM, ON_GPU)
    bound = on_gpu.bind(made.x, made.w, made.bias, residual=made.residual)
    bound()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bound()
    fresh = tensors.fill(PROBLEM, "integer", 5, True, True)
    made.x.copy_(on_device(fresh.x))
    bound.out.fill_(torch.nan)
    graph.replay()
    rest = [tensor.cpu().numpy() for tensor in made]
    expected = reference.conv2d(*rest[:2], PROBLEM, *rest[2:], "relu")
    np.testing.assert_array_equal(bound.out.cpu().numpy(), expected)
