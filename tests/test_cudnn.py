"""cuDNN through ctypes, against a library that only notes its calls: no GPU, no cuDNN."""

import ctypes
import gc

import pytest

from im2win_tvm.bench.baselines import cudnn_library, cudnn_tensors
from im2win_tvm.bench.baselines.cudnn import CUDNN, Cudnn
from im2win_tvm.bench.baselines.cudnn_library import SIGNATURES, CudnnError, Library, Plan
from im2win_tvm.bench.operands import TorchOperands
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import CudaTarget, resolve

PROBLEM = ConvProblem(2, 4, (9, 8), 6, (3, 2), (2, 1), (1, 0), (1, 2), 2)
CUDA = CudaTarget("sm_90")
NOT_SUPPORTED = 3000


class FakeFunction:
    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __call__(self, *arguments):
        assert len(arguments) == len(self.argtypes), self.name
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            kind.from_param(argument)  # what ctypes does with it, TypeError included
        return self.owner.answer(self.name, arguments)


class FakeCudnn:
    """Answers every call with success, or with a status where it was told to fail."""

    def __init__(self, failing=(), workspace=4096, version=91900):
        self.failing, self.workspace, self.version = failing, workspace, version
        self.calls = []
        self.made = 0
        for name in SIGNATURES:
            setattr(self, name, FakeFunction(self, name))

    def answer(self, name, arguments):
        if name == "cudnnGetErrorString":
            return b"CUDNN_STATUS_NOT_SUPPORTED"
        if name == "cudnnGetVersion":
            return self.version
        self.calls.append((name, [_plain(argument) for argument in arguments]))
        if name in self.failing:
            return NOT_SUPPORTED
        if name.startswith("cudnnCreate"):
            self.made += 1
            arguments[0]._obj.value = self.made
        if name == "cudnnGetConvolutionForwardWorkspaceSize":
            arguments[-1]._obj.value = self.workspace
        return 0

    def named(self, name):
        return [arguments for called, arguments in self.calls if called == name]

    def destroyed(self):
        return [
            arguments[0]
            for name, arguments in self.calls
            if name.startswith("cudnnDestroy") and name.endswith("Descriptor")
        ]


def _plain(argument):
    """The value at the time of the call."""
    argument = getattr(argument, "_obj", argument)
    return getattr(argument, "value", argument)


def test_constants_are_those_of_the_headers():
    assert list(cudnn_library.ALGORITHMS.items()) == [
        ("IMPLICIT_GEMM", 0),
        ("IMPLICIT_PRECOMP_GEMM", 1),
        ("GEMM", 2),
        ("DIRECT", 3),
        ("FFT", 4),
        ("FFT_TILING", 5),
        ("WINOGRAD", 6),
        ("WINOGRAD_NONFUSED", 7),
    ]
    assert cudnn_library.FORMATS == {"NCHW": 0, "NHWC": 1}
    assert cudnn_library.DATA_TYPES == {"float32": 0, "float16": 2, "bfloat16": 9}
    assert list(cudnn_library.MATH_TYPES.items()) == [
        ("DEFAULT", 0),
        ("TENSOR_OP", 1),
        ("TENSOR_OP_ALLOW_CONVERSION", 2),
        ("FMA", 3),
    ]


def test_every_algorithm_in_every_format_has_a_name():
    names = [entry.name for entry in CUDNN]
    assert len(set(names)) == len(names) == 32
    assert names[:2] == ["cudnn:IMPLICIT_GEMM", "cudnn:IMPLICIT_GEMM nhwc"]
    assert {"cudnn:FFT_TILING", "cudnn:FFT_TILING tf32", "cudnn:FFT_TILING nhwc tf32"} < set(names)
    rounded = {entry.name for entry in CUDNN if entry.accuracy(PROBLEM) == "tf32"}
    assert rounded == {name for name in names if name.endswith(" tf32")}
    assert {entry.accuracy(PROBLEM) for entry in CUDNN} == {"fp32", "tf32"}
    half = PROBLEM.replace(dtype="float16")
    assert {entry.accuracy(half) for entry in CUDNN} == {"fp16", "tf32"}
    assert {entry.family for entry in CUDNN} == {"cudnn"}


@pytest.mark.parametrize(("number", "version"), [(91900, "9.19.0"), (8902, "8.9.2")])
def test_version(number, version):
    assert Library(FakeCudnn(version=number)).version == version


# CUDNN_FMA_MATH (3) keeps TF32 out of float32, and CUDNN_DEFAULT_MATH (0) lets it in.
@pytest.mark.parametrize(
    ("dtype", "tf32", "kind", "math", "name"),
    [
        ("float32", False, 0, 3, "FMA"),
        ("float32", True, 0, 0, "DEFAULT"),
        ("float16", False, 2, 1, "TENSOR_OP"),
        ("bfloat16", False, 9, 1, "TENSOR_OP"),
    ],
)
@pytest.mark.parametrize(("layout", "order"), [("NCHW", 0), ("NHWC", 1)])
def test_a_plan_describes_the_problem(dtype, tf32, kind, math, name, layout, order):
    raw = FakeCudnn()
    plan = Plan(Library(raw), PROBLEM.replace(dtype=dtype), "FFT", layout, tf32)
    assert plan.math_type == name
    assert plan.workspace_bytes == 4096
    assert [call[1:] for call in raw.named("cudnnSetTensor4dDescriptor")] == [
        [order, kind, 2, 4, 9, 8],
        [order, kind, 2, 6, *PROBLEM.output_size],
    ]
    assert raw.named("cudnnSetFilter4dDescriptor")[0][1:] == [kind, order, 6, 2, 3, 2]
    # Padding, stride, dilation; a cross-correlation (1) with sums in float32 (0).
    expected = [1, 0, 2, 1, 1, 2, 1, 0]
    assert raw.named("cudnnSetConvolution2dDescriptor")[0][1:] == expected
    assert raw.named("cudnnSetConvolutionMathType")[0][1:] == [math]
    assert raw.named("cudnnSetConvolutionGroupCount")[0][1:] == [2]
    assert raw.named("cudnnGetConvolutionForwardWorkspaceSize")[0][5] == 4


def test_a_run_uses_the_stream_and_the_addresses():
    raw = FakeCudnn()
    plan = Plan(Library(raw), PROBLEM, "GEMM", "NCHW")
    plan.run(10, 20, 30, 40, 50)
    handle = raw.named("cudnnSetStream")[0][0]
    assert raw.named("cudnnSetStream") == [[handle, 50]]
    (called,) = raw.named("cudnnConvolutionForward")
    descriptors = raw.named("cudnnGetConvolutionForwardWorkspaceSize")[0]
    x, w, convolution, y = descriptors[1:5]
    assert called == [handle, 1.0, x, 10, w, 20, convolution, 2, 40, 4096, 0.0, y, 30]


def test_one_handle_serves_all_plans():
    raw = FakeCudnn()
    library = Library(raw)
    plans = [Plan(library, PROBLEM, "GEMM", "NCHW") for _ in range(3)]
    assert len(raw.named("cudnnCreate")) == 1
    assert len({id(plan) for plan in plans}) == 3


def test_descriptors_are_destroyed_with_the_plan():
    raw = FakeCudnn()
    plan = Plan(Library(raw), PROBLEM, "GEMM", "NCHW")
    assert raw.destroyed() == []
    del plan
    gc.collect()
    created = raw.made - 1  # less the handle
    assert created == 4
    assert len(set(raw.destroyed())) == len(raw.destroyed()) == created


@pytest.mark.parametrize(
    "failing",
    [
        name
        for name in SIGNATURES
        if name.startswith(("cudnnCreate", "cudnnSet", "cudnnGetConvolution"))
        and name != "cudnnSetStream"
    ],
)
def test_a_refused_call_is_named_and_leaves_nothing_behind(failing):
    raw = FakeCudnn(failing=(failing,))
    with pytest.raises(CudnnError) as caught:
        Plan(Library(raw), PROBLEM, "GEMM", "NCHW")
    assert str(caught.value) == f"{failing}: CUDNN_STATUS_NOT_SUPPORTED (3000)"
    made = raw.made - (failing != "cudnnCreate")
    assert len(raw.destroyed()) == made


@pytest.mark.parametrize("failing", ["cudnnSetStream", "cudnnConvolutionForward"])
def test_a_refused_run_is_an_error(failing):
    plan = Plan(Library(FakeCudnn(failing=(failing,))), PROBLEM, "GEMM", "NCHW")
    with pytest.raises(CudnnError, match=f"{failing}: CUDNN_STATUS_NOT_SUPPORTED"):
        plan.run(1, 2, 3, 4, 0)


@pytest.mark.parametrize(
    ("problem", "target", "reason"),
    [
        (PROBLEM, resolve("llvm"), "target=llvm: cuDNN is for cuda"),
        (ConvProblem(1, 3, (9,), 4, 3), CUDA, "input_size=(9,): cuDNN is called with two spatial"),
        (PROBLEM.replace(padding=((1, 0), (0, 0))), CUDA, "padding=((1, 0), (0, 0)): cuDNN takes"),
    ],
)
def test_gaps(problem, target, reason):
    entry = Cudnn("GEMM", "NCHW", Library(FakeCudnn()))
    assert entry.available(problem, target).startswith(reason)
    assert entry.available(PROBLEM, CUDA) is None
    assert (
        Cudnn("GEMM", "NCHW", Library(FakeCudnn()), tf32=True).available(
            PROBLEM, CudaTarget("sm_70")
        )
        == "arch=sm_70: TF32 needs sm_80 or later"
    )


def test_no_library_is_a_gap(monkeypatch):
    monkeypatch.setattr(cudnn_library, "candidates", lambda: ["libnowhere.so.9"])
    cudnn_library.load_library.cache_clear()
    try:
        reason = Cudnn("GEMM", "NCHW").available(PROBLEM, CUDA)
    finally:
        cudnn_library.load_library.cache_clear()
    assert reason.startswith("cuDNN cannot be loaded (pip install nvidia-cudnn-cu13): libnowhere")


def test_a_library_of_something_else_is_a_gap(monkeypatch):
    monkeypatch.setattr(cudnn_library, "candidates", lambda: ["libc.so.6"])
    cudnn_library.load_library.cache_clear()
    try:
        assert "undefined symbol: cudnn" in cudnn_library.load_library()
    finally:
        cudnn_library.load_library.cache_clear()


def test_math_type_of_an_entry_reaches_cudnn_and_the_record(monkeypatch):
    pytest.importorskip("torch")
    operands = TorchOperands(PROBLEM, device="cpu")
    for tf32, value, name in ((False, 3, "FMA"), (True, 0, "DEFAULT")):
        raw = FakeCudnn()
        prepared = Cudnn("GEMM", "NCHW", Library(raw), tf32).prepare(operands, CUDA)
        assert raw.named("cudnnSetConvolutionMathType")[0][1:] == [value]
        assert prepared.detail["math_type"] == name


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_algorithms_share_output_and_workspace(layout, monkeypatch):
    torch = pytest.importorskip("torch")

    class Stream:
        cuda_stream = 7

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    operands = TorchOperands(PROBLEM.replace(layout=layout), device="cpu")
    prepared = []
    for workspace in (100, 5000, 300):
        raw = FakeCudnn(workspace=workspace)
        entry = Cudnn("FFT", "NHWC", Library(raw))
        prepared.append((raw, entry.prepare(operands, CUDA)))
    outputs = set()
    for raw, each in prepared:
        y = each.view(each.call())
        assert y.isnan().all()
        assert tuple(y.shape) == operands.problem.output_shape
        (called,) = raw.named("cudnnConvolutionForward")
        outputs.add((called[8], called[12]))
        assert raw.named("cudnnSetStream")[0][1] == 7
        x = torch.frombuffer(
            (ctypes.c_float * operands.x.numel()).from_address(called[3]), dtype=torch.float32
        )
        last = operands.x if layout == "NHWC" else operands.x.movedim(1, -1)
        assert torch.equal(x, last.reshape(-1))
    assert len(outputs) == 1
    assert [each.workspace_bytes for _, each in prepared] == [100, 5000, 300]
    assert prepared[0][1].detail == {
        "algorithm": "FFT",
        "format": "NHWC",
        "math_type": "FMA",
        "cudnn": "9.19.0",
    }


def test_tensors_go_with_their_operands():
    pytest.importorskip("torch")
    operands = TorchOperands(PROBLEM, device="cpu")
    cudnn_tensors.tensors_for(operands)
    assert operands in cudnn_tensors._shared
    del operands
    gc.collect()
    assert len(cudnn_tensors._shared) == 0
