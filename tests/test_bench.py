"""Runs of the bench: what is measured, its checks, and the record."""

import json

import numpy as np
import pytest

from im2win_tvm import AccuracyError, ConvProblem
from im2win_tvm.accuracy import OWN, TF32
from im2win_tvm.bench import baselines, report, timing
from im2win_tvm.bench import operands as operands_module
from im2win_tvm.bench.baselines import torch_conv
from im2win_tvm.bench.baselines.base import Prepared
from im2win_tvm.bench.baselines.im2win import Im2win
from im2win_tvm.bench.baselines.tvm_default import TvmDefault
from im2win_tvm.bench.operands import HostOperands, TorchOperands
from im2win_tvm.bench.run import FORMAT, BenchError, failures, limits_for, run
from im2win_tvm.target import CudaTarget, resolve
from im2win_tvm.tensors import Limits

BRIEF = timing.Limits(warmup=0.001, seconds=0.001, least=3, most=10)
SMALL = ConvProblem(1, 3, (9, 8), 5, 3, stride=2, padding=1)


class Wrong:
    """An implementation that is off by a factor."""

    name = "wrong"
    family = "torch"

    def __init__(self, factor, limit=None, accuracy=None):
        self.factor = factor
        self.relative_limit = limit
        self.tf32 = accuracy == "tf32"

    def accuracy(self, problem):
        return TF32 if self.tf32 else OWN[problem.dtype]

    def available(self, problem, target):
        return None

    def prepare(self, operands, target):
        right = operands._expected * self.factor
        return Prepared(lambda: right.astype(operands.problem.dtype), 0)


def test_run_and_its_record():
    target = resolve("llvm")
    steps, kept = [], []
    record = run(
        {"small": SMALL, "last": SMALL.replace(layout="NHWC", groups=1)},
        target,
        [Im2win("cpu_blocked"), TvmDefault()],
        BRIEF,
        steps.append,
        keep=lambda record: kept.append(json.dumps(record)),
    )
    assert steps == ["small", "last"]
    for count, text in enumerate(kept, 1):  # what a run that is stopped leaves
        assert json.loads(text)["layers"] == json.loads(json.dumps(record))["layers"][:count]
        assert report.text(json.loads(text))
    assert len(kept) == 2
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))
    assert record["format"] == FORMAT
    assert {"date", "command", "device", "environment", "protocol", "target"} <= set(record)
    assert record["protocol"]["limits"] == {
        "warmup": 0.001,
        "seconds": 0.001,
        "least": 3,
        "most": 10,
    }
    for layer, layout in zip(record["layers"], ("NCHW", "NHWC"), strict=True):
        assert (layer["flops"], layer["layout"]) == (SMALL.flops, layout)
        for entry in layer["implementations"]:
            assert entry["status"] == "ok", entry
            assert entry["relative_error"] < 1e-6
            warm = entry["times"]["warm"]
            assert warm["median_us"] > 0
            assert warm["n"] >= 3
    assert not failures(record)
    assert "vs tvm: geomean" in report.text(record)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("padding", [1, ((0, 1), (2, 1))])
def test_competitors_compute_the_problem(layout, padding):
    pytest.importorskip("torch")
    problem = SMALL.replace(layout=layout, padding=padding, in_channels=4, out_channels=6, groups=2)
    target = resolve("llvm")
    entries = baselines.implementations(target, list(baselines.DEFAULT))[1:]
    record = run({"small": problem}, target, entries, BRIEF)
    statuses = {e["name"]: e["status"] for e in record["layers"][0]["implementations"]}
    assert statuses == {"tvm": "ok", "torch nchw": "ok", "torch nhwc": "ok"}, record["layers"]


@pytest.mark.parametrize(
    ("factor", "limit", "status"),
    [
        (1.0, None, "ok"),
        (1.0001, None, "failed"),
        (1.0001, {"float32": 1e-3}, "outside"),
        (1.01, {"float32": 1e-3}, "failed"),
        (np.nan, {"float32": 1e-3}, "failed"),
    ],
)
def test_outputs_are_checked(factor, limit, status):
    record = run({"small": SMALL}, resolve("llvm"), [Wrong(factor, limit)], BRIEF)
    json.dumps(record, allow_nan=False)
    (entry,) = record["layers"][0]["implementations"]
    assert entry["status"] == status
    assert ("times" in entry) == (status != "failed")
    assert bool(failures(record)) == (status == "failed")
    assert ("FAILED wrong" in report.text(record)) == (status == "failed")


@pytest.mark.parametrize(
    ("factor", "status"),
    [(1.0, "ok"), (1 + 1.9 * 2.0**-10, "ok"), (1 + 2.1 * 2.0**-10, "outside"), (1.03, "failed")],
)
def test_tf32_is_a_class_of_its_own(factor, status):
    entry = Wrong(factor, {"float32": 0.02}, accuracy="tf32")
    record = run({"small": SMALL}, resolve("llvm"), [entry], BRIEF)
    (measured,) = record["layers"][0]["implementations"]
    assert (measured["accuracy"], measured["status"]) == ("tf32", status)
    assert ("tf32: float32 with TF32 allowed" in report.text(record)) == (status != "failed")


def test_accuracy_is_that_of_the_dtype_and_float16_has_no_tf32():
    entries = [Wrong(1.0), Wrong(1.0, accuracy="tf32")]
    entries[1].name = "rounded"
    problems = {"half": SMALL.replace(dtype="float16"), "single": SMALL}
    half, single = run(problems, resolve("llvm"), entries, BRIEF)["layers"]
    assert [(e["name"], e["accuracy"]) for e in half["implementations"]] == [("wrong", "fp16")]
    assert [e["accuracy"] for e in single["implementations"]] == ["fp32", "tf32"]
    assert [layer["accuracy"] for layer in (half, single)] == ["fp16", "fp32"]


def test_a_run_of_tf32_leaves_out_what_it_replaces():
    """A family that computes in tf32 does so alone; one that does not takes part in fp32."""
    entries = [Wrong(1.0), Wrong(1.001, accuracy="tf32"), Wrong(1.0)]
    for entry, name, family in zip(entries, "abc", ("torch", "torch", "tvm"), strict=True):
        entry.name, entry.family = name, family
    record = run({"small": SMALL}, resolve("llvm"), entries, BRIEF, accuracy="tf32")
    (layer,) = record["layers"]
    assert layer["accuracy"] == "tf32"
    measured = [(e["name"], e["accuracy"], e["status"]) for e in layer["implementations"]]
    assert measured == [("b", "tf32", "ok"), ("c", "fp32", "ok")]
    assert report.best(layer, "torch")["name"] == "b"
    assert report.best(layer, "tvm")["name"] == "c"
    text = report.text(record)
    assert "float32 NCHW batch 1, tf32;" in text
    assert "tf32: float32 with TF32 allowed, ours and theirs" in text
    # Where it is not available, the other one is better than nothing.
    entries[1].available = lambda problem, target: "not here"
    (layer,) = run({"small": SMALL}, resolve("llvm"), entries, BRIEF, accuracy="tf32")["layers"]
    assert [e["name"] for e in layer["implementations"]] == ["a", "b", "c"]
    assert report.best(layer, "torch")["name"] == "a"


def test_a_class_that_a_dtype_does_not_have_is_refused_before_anything_runs():
    problems = {"single": SMALL, "half": SMALL.replace(dtype="float16")}
    steps = []
    with pytest.raises(AccuracyError, match="accuracy='tf32': allowed for float16: fp16"):
        run(problems, resolve("llvm"), [Wrong(1.0)], BRIEF, steps.append, "tf32")
    assert steps == []


def test_a_time_limit_bounds_a_measurement():
    for target, least, most in ((CudaTarget("sm_90"), 10, 50), (resolve("llvm"), 3, 100)):
        assert limits_for(target) == timing.Limits(0.2, 0.4, least, most)
        assert limits_for(target, 60) == timing.Limits(0.2, 0.4, min(least, 5), most)
        short = limits_for(target, 0.15)
        assert (short.warmup, short.seconds) == (pytest.approx(0.05), pytest.approx(0.1))


def test_every_call_of_pytorch_says_whether_tf32_is_allowed(monkeypatch):
    torch = pytest.importorskip("torch")
    told = []
    right = torch.nn.functional.conv2d

    def noting(*arguments):
        told.append(torch.backends.cudnn.allow_tf32)
        return right(*arguments)

    monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
    # One is restored at the end: the flag is PyTorch's alone.
    before = torch.backends.cudnn.allow_tf32
    x, w = torch.ones(SMALL.input_shape), torch.ones(SMALL.weight_shape)
    off, on, unsaid = (torch_conv._call(SMALL, x, w, tf32) for tf32 in (False, True, None))
    try:
        for call in (off, on, off, unsaid, on, unsaid):
            assert tuple(call().shape) == SMALL.output_shape
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert told == [False, True, False, False, True, True]


@pytest.mark.parametrize(
    ("arch", "override", "reason"),
    [
        ("sm_90", None, None),
        ("sm_80", "1", None),
        ("sm_75", None, "arch=sm_75: TF32 needs sm_80 or later"),
        ("sm_90", "0", "NVIDIA_TF32_OVERRIDE=0: the environment turns TF32 off"),
    ],
)
def test_where_there_is_tf32(arch, override, reason, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    entry = torch_conv.Torch(channels_last=False, tf32=True)
    assert entry.available(SMALL, CudaTarget(arch)) == reason
    assert torch_conv.Torch(channels_last=False).available(SMALL, CudaTarget(arch)) is None
    assert entry.available(SMALL, resolve("llvm")) == "target=llvm: TF32 is for cuda"


def test_an_output_nobody_wrote_fails():
    operands = HostOperands(SMALL)
    outcome = operands.check(operands.poisoned())
    assert not outcome.in_class
    assert outcome.relative_error == np.inf


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_operands_on_a_torch_device(layout, dtype, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(operands_module, "_CHUNK", 1000)  # two images
    problem = ConvProblem(
        5, 4, (9, 8), 6, 3, padding=((0, 1), (2, 1)), groups=2, dtype=dtype, layout=layout
    )
    operands = TorchOperands(problem, device="cpu")
    right = operands._expected.to(getattr(torch, dtype))
    assert operands.check(right).in_class
    for spoil in (torch.nan, torch.inf, 1e-2, -1e30):
        wrong = right.clone()
        wrong[3, 1, 2, 3] = wrong[3, 1, 2, 3] + spoil
        outcome = operands.check(wrong)
        assert not outcome.in_class
        assert "1 of" in outcome.message
    poisoned = operands.poisoned()
    assert poisoned.isnan().all()
    assert operands.check(poisoned).relative_error == np.inf
    assert not operands.check(right[:2]).in_class
    assert not operands.check(torch.zeros_like(right)).in_class
    # Every element within its limit, but all of them off to the same side.
    lenient = Limits(floor=1.0, share=0.0, norm=1e-4)
    monkeypatch.setattr(operands_module.tensors, "rounding_limits", lambda *a: lenient)
    assert "relative error of all outputs" in operands.check(right * 1.01).message


def test_the_reference_is_not_searched_an_engine_for(monkeypatch):
    torch = pytest.importorskip("torch")
    cudnn, seen = torch.backends.cudnn, []
    conv2d = torch.nn.functional.conv2d

    def noting(*arguments, **named):
        seen.append(cudnn.benchmark)
        return conv2d(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "conv2d", noting)
    monkeypatch.setattr(cudnn, "benchmark", True)  # as a competitor leaves it
    TorchOperands(SMALL, device="cpu")
    assert (seen, cudnn.benchmark) == ([False], True)


def test_references_that_disagree_are_reported(monkeypatch):
    pytest.importorskip("torch")
    conv2d = operands_module.reference.conv2d
    monkeypatch.setattr(operands_module.reference, "conv2d", lambda *a: conv2d(*a) + 1e-6)
    with pytest.raises(operands_module.ReferenceError, match="on the first image"):
        TorchOperands(SMALL, device="cpu")


def test_missing_pytorch_is_a_gap(monkeypatch):
    monkeypatch.setattr(torch_conv.importlib.util, "find_spec", lambda name: None)
    record = run(
        {"small": SMALL}, resolve("llvm"), baselines.implementations(resolve("llvm")), BRIEF
    )
    assert not failures(record)
    assert (
        "- torch nchw, torch nhwc (small): PyTorch is not installed "
        "(pip install 'im2win_tvm[torch]')" in report.text(record)
    )


def test_a_schedule_that_cannot_be_built_fails():
    record = run({"small": SMALL}, resolve("llvm"), [Im2win("cpu_blocked", {"lanes": 3})], BRIEF)
    (reason,) = failures(record)
    assert reason.startswith("small: cpu_blocked: ScheduleError: lanes=3")


def test_implementations():
    llvm = resolve("llvm")
    names = [entry.name for entry in baselines.implementations(llvm)]
    assert names == ["cpu_blocked", "tvm", "torch nchw", "torch nhwc"]
    on_gpu = baselines.implementations(CudaTarget("sm_90"), ["torch"], ["cuda_simt"])
    assert [(entry.name, entry.accuracy(SMALL)) for entry in on_gpu[1:]] == [
        ("torch nchw", "fp32"),
        ("torch nhwc", "fp32"),
        ("torch nchw tf32", "tf32"),
        ("torch nhwc tf32", "tf32"),
    ]
    only = baselines.implementations(CudaTarget("sm_90"), [], ["cuda_mma", "cuda_simt"])
    assert sorted(entry.name for entry in only) == ["cuda_mma", "cuda_simt"]


def test_cuda_without_a_device():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(BenchError, match="sees no CUDA device"):
        run({"small": SMALL}, CudaTarget("sm_90"), [], BRIEF)
