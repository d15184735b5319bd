"""cuDNN's engines: a frontend that computes on the CPU and says how long it took; the real one."""

import gc
import importlib.machinery
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest

from im2win_tvm.bench import timing
from im2win_tvm.bench.baselines import cudnn_frontend, cudnn_graph, cudnn_tensors
from im2win_tvm.bench.baselines.cudnn_frontend import CUDNN_FRONTEND, CudnnFrontend
from im2win_tvm.bench.baselines.cudnn_graph import GraphError
from im2win_tvm.bench.operands import TorchOperands
from im2win_tvm.bench.run import _checked
from im2win_tvm.problem import ConvProblem
from im2win_tvm.target import CudaTarget, resolve

torch = pytest.importorskip("torch")

PROBLEM = ConvProblem(2, 4, (9, 8), 6, (3, 2), (2, 1), ((1, 0), (2, 1)), (1, 2), 2)
CUDA = CudaTarget("sm_90")


@dataclass(frozen=True)
class FakePlan:
    """name, workspace in bytes, time, output over the right one, numerical notes, a refusal."""

    name: str
    workspace: int = 0
    us: float = 100.0
    factor: float = 1.0
    notes: tuple = ()
    refused: str = ""


class FakeTensor:
    def __init__(self, dim=None, stride=None, data_type=None, name=""):
        self.dim, self.stride, self.data_type, self.name = dim, stride, data_type, name
        self.output = False

    def set_output(self, value):
        self.output = value

    def set_dim(self, dim):
        self.dim = dim

    def set_stride(self, stride):
        self.stride = stride

    def set_data_type(self, kind):
        self.data_type = kind


class FakeGraph:
    """Holds the caller to the order of the real one's steps, and to what it declared."""

    def __init__(self, owner, **types):
        self.owner, self.types, self.steps = owner, types, []
        self.modes, self.barred, self.built = None, set(), set()
        owner.graphs.append(self)

    def tensor(self, dim, stride, data_type, name):
        return FakeTensor(dim, stride, data_type, name)

    def conv_fprop(self, image, weight, pre_padding, post_padding, stride, dilation):
        self.image, self.weight, self.y = image, weight, FakeTensor()
        self.pads, self.stride, self.dilation = (pre_padding, post_padding), stride, dilation
        return self.y

    def validate(self):
        assert self.y.output
        self.steps.append("validate")

    def build_operation_graph(self):
        assert self.steps == ["validate"]
        self.steps.append("operations")

    def create_execution_plans(self, modes):
        assert self.steps == ["validate", "operations"]
        if "B" in modes and not self.owner.answers_b:
            raise RuntimeError("heuristic B has no answer\nand says so at length")
        if self.owner.unsupported:
            raise ValueError("no engine for it")
        self.modes = modes
        self.steps.append("plans")

    def deselect_numeric_notes(self, notes):
        assert self.steps[-1] == "plans"
        self.barred |= set(notes)

    def get_execution_plan_count(self):
        return len(self.owner.plans)

    def get_plan_name_at_index(self, index):
        return self.owner.plans[index].name

    def build_plan_at_index(self, index):
        plan = self.owner.plans[index]
        if self.barred & set(plan.notes):
            raise RuntimeError("Deselecting execution plan")
        if plan.refused:
            raise RuntimeError(plan.refused)
        assert plan.name not in {self.owner.plans[i].name for i in self.built}
        self.built.add(index)

    def get_workspace_size_plan_at_index(self, index):
        assert index in self.built
        return self.owner.plans[index].workspace

    def execute_plan_at_index(self, pack, workspace, index, handle):
        assert index in self.built
        assert handle is self.types["handle"]
        plan = self.owner.plans[index]
        assert workspace.numel() >= plan.workspace
        x, w, y = (pack[node] for node in (self.image, self.weight, self.y))
        for node, tensor in pack.items():
            assert list(tensor.shape) == node.dim
            assert list(tensor.stride()) == node.stride
        (top, left), (bottom, right) = self.pads
        padded = torch.nn.functional.pad(x, (left, right, top, bottom))
        groups = x.shape[1] // w.shape[1]
        result = torch.nn.functional.conv2d(padded, w, None, self.stride, 0, self.dilation, groups)
        y.copy_(result * plan.factor)
        self.owner.ran.append(plan)


class FakeFrontend:
    """What the adapter uses of the module `cudnn`."""

    __version__ = "1.99"
    data_type = SimpleNamespace(FLOAT="float", HALF="half", BFLOAT16="bfloat16")
    numerical_note = SimpleNamespace(TENSOR_CORE="tensor core", DOWN_CONVERT_INPUTS="down")

    def __init__(self, *plans, answers_b=True, offers_b=True, unsupported=False):
        self.plans, self.answers_b, self.unsupported = plans, answers_b, unsupported
        modes = {"A": "A", "FALLBACK": "FALLBACK"} | ({"B": "B"} if offers_b else {})
        self.heur_mode = SimpleNamespace(**modes)
        self.graphs, self.ran, self.streams = [], [], []

    def backend_version_string(self):
        return "9.19.0"

    def create_handle(self):
        return object()

    def set_stream(self, handle, stream):
        self.streams.append(stream)

    def pygraph(self, **types):
        return FakeGraph(self, **types)


class PlanClock:
    """A clock that asks the fake what it ran, and how long that takes."""

    def __init__(self, fake):
        self.fake = fake

    def wait(self):
        """Calls are done when they return."""

    def turn(self, call):
        call()
        seconds = self.fake.ran[-1].us * 1e-6
        return {"cold": [seconds], "hot": [seconds / 2]}


@pytest.fixture
def use(monkeypatch):
    """Put a fake in the frontend's place."""

    def put(fake):
        stream = SimpleNamespace(cuda_stream=7)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(cudnn_frontend, "load_frontend", lambda: fake)
        monkeypatch.setattr(timing, "clock_for", lambda kind: PlanClock(fake))
        return fake

    return put


MANY = (
    FakePlan("slow", 0, 900.0),
    FakePlan("no room for it", 0, 1.0, refused="CUDNN_STATUS_NOT_SUPPORTED"),
    FakePlan("large", 3 << 20, 60.0),
    FakePlan("large", 3 << 20, 60.0),
    FakePlan("small", 4096, 70.0),
    FakePlan("wrong", 0, 2.0, factor=1.1),
    FakePlan("in tf32", 0, 30.0, factor=1 + 2.0**-11, notes=("tensor core",)),
    FakePlan("in float16", 0, 20.0, notes=("tensor core", "down")),
)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("problem_layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("padding", [((1, 0), (2, 1)), 1])
def test_the_fastest_plan_computes_the_convolution(layout, problem_layout, padding, use):
    fake = use(FakeFrontend(*MANY))
    problem = PROBLEM.replace(layout=problem_layout, padding=padding)
    operands = TorchOperands(problem, device="cpu")
    prepared = CudnnFrontend(layout).prepare(operands, CUDA)
    fake.ran.clear()
    output = prepared.view(prepared.call())
    assert [plan.name for plan in fake.ran] == ["large"]
    outcome = operands.check(output)
    assert outcome.in_class, outcome.message
    assert set(fake.streams) == {7}
    assert prepared.workspace_bytes == 3 << 20
    assert prepared.detail == {
        "engine": "large",
        "format": layout,
        "tf32": False,
        "heuristics": ["A", "B", "FALLBACK"],
        "plans": {
            "timed": 3,
            "refused": 3,
            "wrong": 1,
            "fastest": [
                {"engine": "large", "us": pytest.approx(60.0), "workspace_bytes": 3 << 20},
                {"engine": "small", "us": pytest.approx(70.0), "workspace_bytes": 4096},
                {"engine": "slow", "us": pytest.approx(900.0), "workspace_bytes": 0},
            ],
        },
        "cudnn": "9.19.0",
        "frontend": "1.99",
    }


def test_variants_share_one_search(use):
    fake = use(FakeFrontend(*MANY))
    operands = TorchOperands(PROBLEM, device="cpu")
    chosen = {
        entry.name: entry.prepare(operands, CUDA)
        for entry in CUDNN_FRONTEND
        if entry.layout == "NCHW"
    }
    assert {name: each.detail["engine"] for name, each in chosen.items()} == {
        "cudnn-frontend nchw": "large",
        "cudnn-frontend nchw little workspace": "small",
        "cudnn-frontend nchw tf32": "in tf32",
    }
    assert len(fake.graphs) == 2
    assert [graph.barred for graph in fake.graphs] == [{"down", "tensor core"}, {"down"}]


def test_far_slower_plans_are_timed_once_and_lucky_ones_again(use):
    fake = use(FakeFrontend(*MANY))
    CudnnFrontend("NCHW").prepare(TorchOperands(PROBLEM, device="cpu"), CUDA)
    counts = {name: sum(plan.name == name for plan in fake.ran) for name in ("slow", "large")}
    # A check, a call to warm up and a timed one; ten more, and their warm-up, for those near.
    assert counts["slow"] == 3
    assert counts["large"] >= 3 + 11


@pytest.mark.parametrize(
    ("dtype", "tf32", "kind", "barred"),
    [
        ("float32", False, "float", {"down", "tensor core"}),
        ("float32", True, "float", {"down"}),
        ("float16", False, "half", {"down"}),
        ("bfloat16", False, "bfloat16", {"down"}),
    ],
)
def test_types_and_classes(dtype, tf32, kind, barred, use):
    fake = use(FakeFrontend(FakePlan("one")))
    operands = TorchOperands(PROBLEM.replace(dtype=dtype), device="cpu")
    prepared = CudnnFrontend("NHWC", tf32).prepare(operands, CUDA)
    (graph,) = fake.graphs
    assert {key: graph.types[key] for key in graph.types if key != "handle"} == {
        "io_data_type": kind,
        "intermediate_data_type": "float",
        "compute_data_type": "float",
    }
    assert graph.y.data_type == graph.image.data_type == kind
    assert graph.barred == barred
    assert operands.check(prepared.view(prepared.call())).in_class


@pytest.mark.parametrize("changes", [{"offers_b": False}, {"answers_b": False}])
def test_without_heuristic_b(changes, use):
    fake = use(FakeFrontend(FakePlan("one"), **changes))
    prepared = CudnnFrontend("NCHW").prepare(TorchOperands(PROBLEM, device="cpu"), CUDA)
    assert prepared.detail["heuristics"] == ["A", "FALLBACK"]
    assert fake.graphs[-1].modes == ["A", "FALLBACK"]


@pytest.mark.parametrize(
    ("fake", "most", "message"),
    [
        (FakeFrontend(unsupported=True), None, "heuristics A, FALLBACK: ValueError: no engine for"),
        (FakeFrontend(), None, "none of 0 plans of cuDNN's engines can be built: none was"),
        (
            FakeFrontend(FakePlan("a", refused="not on this device\nat all")),
            None,
            "none of 1 plans of cuDNN's engines can be built: RuntimeError: not on this device",
        ),
        (FakeFrontend(FakePlan("a", factor=2.0)), None, "none of 1 plans computes the convolution"),
        (FakeFrontend(FakePlan("a", 9)), 8, "workspace: no plan takes at most 8 bytes; the least"),
    ],
)
def test_no_plan_is_a_gap_with_its_reason(fake, most, message, use):
    use(fake)
    entry = {}
    operands = TorchOperands(PROBLEM, device="cpu")
    implementation = CudnnFrontend("NCHW", most_workspace=most)
    assert _checked(implementation, operands, CUDA, entry) is None
    assert entry["status"] == "absent"
    assert entry["reason"].startswith(f"GraphError: {message}")
    assert "\n" not in entry["reason"]


def test_a_plan_that_fails_when_it_runs_does_not_stop_the_others(use, monkeypatch):
    fake = use(FakeFrontend(FakePlan("huge", 1 << 50, 1.0), FakePlan("fine", 0, 5.0)))
    reserve = cudnn_tensors.Tensors.reserve

    def bounded(tensors, size):
        if size > 1 << 40:
            raise torch.OutOfMemoryError("no room")
        reserve(tensors, size)

    monkeypatch.setattr(cudnn_tensors.Tensors, "reserve", bounded)
    prepared = CudnnFrontend("NCHW").prepare(TorchOperands(PROBLEM, device="cpu"), CUDA)
    assert prepared.detail["engine"] == "fine"
    assert prepared.detail["plans"]["wrong"] == 1
    assert {plan.name for plan in fake.ran} == {"fine"}


def test_plans_go_with_their_operands(use):
    use(FakeFrontend(FakePlan("one")))
    operands = TorchOperands(PROBLEM, device="cpu")
    CudnnFrontend("NCHW").prepare(operands, CUDA)
    assert operands in cudnn_frontend._found
    del operands
    gc.collect()
    assert len(cudnn_frontend._found) == 0


def test_degenerate_axes_have_the_strides_of_their_format():
    assert cudnn_graph._strides((1, 1, 5, 7), "NHWC") == [35, 1, 7, 1]
    assert cudnn_graph._strides((3, 2, 1, 1), "NCHW") == [2, 1, 1, 1]


def test_gaps(use):
    use("nvidia-cudnn-frontend is not installed")
    entry = CudnnFrontend("NCHW")
    assert entry.available(PROBLEM, CUDA) == "nvidia-cudnn-frontend is not installed"
    assert entry.available(PROBLEM, resolve("llvm")) == "target=llvm: cuDNN is for cuda"
    flat = ConvProblem(1, 3, (9,), 4, 3)
    assert entry.available(flat, CUDA).startswith("input_size=(9,): cuDNN is called with two")
    old = CudaTarget("sm_75")
    assert CudnnFrontend("NCHW", tf32=True).available(PROBLEM, old).startswith("arch=sm_75: TF32")
    use(FakeFrontend())
    assert entry.available(PROBLEM, CUDA) is None


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (None, "nvidia-cudnn-frontend is not installed (pip install --no-deps nvidia-cudnn-"),
        ("raise ImportError('libcudnn.so.9')", "nvidia-cudnn-frontend cannot be loaded: Import"),
        ("value = 1", "the module cudnn is not nvidia-cudnn-frontend (pip install"),
    ],
)
def test_what_is_in_the_modules_place(contents, reason, tmp_path, monkeypatch):
    # Whatever is installed is hidden, and what a test imports is forgotten again.
    monkeypatch.delitem(sys.modules, "cudnn", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    if contents is None:
        monkeypatch.setattr(cudnn_graph.importlib.util, "find_spec", lambda name: None)
    else:
        (tmp_path / "cudnn.py").write_text(contents + "\n")
    cudnn_graph.load_frontend.cache_clear()
    try:
        assert cudnn_graph.load_frontend().startswith(reason)
    finally:
        cudnn_graph.load_frontend.cache_clear()
        sys.modules.pop("cudnn", None)


def test_a_module_with_graphs_is_taken(monkeypatch):
    module = ModuleType("cudnn")
    module.__spec__ = importlib.machinery.ModuleSpec("cudnn", None)
    module.pygraph = object
    monkeypatch.setitem(sys.modules, "cudnn", module)
    cudnn_graph.load_frontend.cache_clear()
    try:
        assert cudnn_graph.load_frontend() is module
    finally:
        cudnn_graph.load_frontend.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("entry", CUDNN_FRONTEND, ids=lambda entry: entry.name)
@pytest.mark.parametrize("padding", [1, ((0, 1), (1, 0))])
def test_the_real_frontend(entry, padding):
    pytest.importorskip("cudnn")
    problem = ConvProblem(8, 16, (28, 28), 32, 3, padding=padding)
    operands = TorchOperands(problem)
    reason = entry.available(problem, resolve("cuda"))
    if reason is not None:
        pytest.skip(reason)
    try:
        prepared = entry.prepare(operands, resolve("cuda"))
    except GraphError as error:
        pytest.skip(str(error))
    outcome = operands.check(prepared.view(prepared.call()))
    limit = 2 * 2.0**-10 if entry.tf32 else 1e-5
    assert outcome.relative_error < limit, prepared.detail
