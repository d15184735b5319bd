"""The direct convolution and im2col, what they compute; and what a report says of all rivals."""

import copy

import numpy as np
import pytest
from problems import odd_problems, problem_id

from im2win_tvm import builds, emulate, reference, tensors
from im2win_tvm.bench import baselines, ceilings, report, rivals, roofline, rows, timing
from im2win_tvm.bench.baselines import cublas
from im2win_tvm.bench.baselines.direct import DIRECT, Config, Direct
from im2win_tvm.bench.run import run
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.lower import cuda_source, lower
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget, resolve

CUDA = CudaTarget("sm_90")
SMALL = ConvProblem(2, 6, (9, 8), 10, 3, stride=2, padding=1, groups=2)


@pytest.mark.parametrize("problem", odd_problems(21, 16, most_work=300_000), ids=problem_id)
def test_direct_convolution(problem):
    made = tensors.fill(problem, "normal", 3, True, True)
    given = made._asdict()
    epilogue = Epilogue(True, True, "relu")
    actual = emulate.run(DIRECT, problem, Config(32), CUDA, given, epilogue)
    expected = reference.conv2d(*made[:2], problem, *made[2:], "relu")
    result = tensors.check(actual, expected, problem, "normal")
    assert result.ok, result.message


def test_direct_convolution_is_one_output_a_thread_without_shared_memory():
    source = cuda_source(lower(DIRECT.build(SMALL, DIRECT.default(SMALL, CUDA), CUDA)), CUDA)
    assert "__launch_bounds__(256) im2win_conv_kernel(" in source
    assert "__shared__" not in source
    assert "conv_local_ptr[1]" in source


def test_direct_convolution_is_no_schedule_of_ours():
    assert "direct" not in SCHEDULES
    assert Direct().family == "direct"
    assert select(SMALL, CUDA, DIRECT).schedule is DIRECT
    assert DIRECT.supports(SMALL, resolve("llvm")) == "target=llvm: direct is for cuda"
    for threads in (0, 1025, True, 2.0):
        with pytest.raises(ScheduleError, match="threads="):
            select(SMALL, CUDA, DIRECT, {"threads": threads})
    request = builds.Request(SMALL, CUDA, DIRECT)
    assert request.schedule.name == "direct"


@pytest.mark.parametrize("way", [cublas.unfold_and_matmul, cublas.conv2d_without_cudnn])
@pytest.mark.parametrize("groups", [1, 2])
def test_im2col(way, groups):
    torch = pytest.importorskip("torch")
    problem = SMALL.replace(groups=groups, dilation=(1, 2), padding=(0, 2))
    made = tensors.fill(problem, "normal", 4)
    y = way(problem, torch.from_numpy(made.x), torch.from_numpy(made.w))()
    np.testing.assert_allclose(y, reference.conv2d(made.x, made.w, problem), atol=1e-4)


def test_im2col_of_the_whole_batch_where_pytorch_has_another_backend():
    torch = pytest.importorskip("torch")
    made = tensors.fill(SMALL, "normal", 4)
    x, w = torch.from_numpy(made.x), torch.from_numpy(made.w)
    call, how = cublas.choose(SMALL, x, w)
    assert how == "unfold and matmul over the whole batch"
    assert tuple(call().shape) == SMALL.output_shape
    # PyTorch's private name of the choice is still there.
    plain = SMALL.replace(groups=1)
    made = tensors.fill(plain, "normal", 4)
    assert isinstance(
        cublas._backend(plain, torch.from_numpy(made.x), torch.from_numpy(made.w)), str
    )


def test_cuda_only_families_are_gaps_elsewhere():
    llvm = resolve("llvm")
    assert {entry.family for entry in baselines.implementations(llvm)[1:]} == set(baselines.DEFAULT)
    entries = baselines.implementations(llvm, ["cudnn", "cudnn-frontend", "cublas", "direct"])[1:]
    brief = timing.Limits(warmup=0, seconds=0, least=1, most=1)
    record = run({"small": SMALL}, llvm, entries, brief)
    reasons = {e["reason"] for e in record["layers"][0]["implementations"]}
    assert reasons == {
        "target=llvm: cuDNN is for cuda",
        "target=llvm: cuBLAS is for cuda",
        "target=llvm: direct is for cuda",
    }
    assert "ceilings" not in record
    # PyTorch on a CPU is no cuDNN, and a reason stands once.
    torch_ran = copy.deepcopy(record)
    torch_ran["layers"][0]["implementations"].append(_entry("torch nchw", "torch", 1.0))
    assert [rival.key for rival in rivals.rivals(torch_ran)] == ["cublas", "direct", "torch"]
    assert report.text(record).count("cuDNN is for cuda") == 1


def _entry(name, family, us, workspace=0, status="ok", reason=None, accuracy="fp32", **detail):
    entry = {"name": name, "family": family, "status": status, "reason": reason}
    entry |= {"accuracy": accuracy}
    if us is None:
        return entry | {"status": "absent"}
    entry |= {"detail": detail}
    times = {"cold": {"median_us": us, "iqr_us": 1.0, "n": 9}}
    return entry | {"workspace_bytes": workspace, "times": times, "relative_error": 1e-7}


def _layer(name, *entries, dtype="float32"):
    return {
        "name": name,
        "problem": "mb1ic3ih8oc4kh3",
        "dtype": dtype,
        "layout": "NCHW",
        "batch": 1,
        "flops": 2_000_000_000,
        "min_bytes": 50_000_000,
        "implementations": list(entries),
    }


NO = "CudnnError: cudnnGetConvolutionForwardWorkspaceSize: CUDNN_STATUS_NOT_SUPPORTED (3000)"


@pytest.fixture
def record():
    times = timing.Times(1000.0, 1.0, 9)
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "target": {"kind": "cuda"},
        "environment": {
            "git_commit": "0123456789abcdef",
            "versions": {"python": "3.12.1", "apache-tvm": "0.27", "torch": "2.11"},
            "cuda": {"gpu": "GPU", "nvidia_smi": {"driver_version": "580"}},
        },
        "protocol": {
            "clock": "events",
            "cache": "cold",
            "order": "turns",
            "limits": {"warmup": 0.2},
        },
        "ceilings": ceilings.describe({"fp32": times, "copy": times})
        | {"sgemm": {"what": "product", "tflops": 50.0}, "copy": {"what": "copy", "gb_s": 3000.0}},
        "layers": [
            _layer(
                "one",
                _entry("simt", "im2win", 100.0),
                _entry("cudnn:IMPLICIT_GEMM", "cudnn", 320.0, 0, algorithm="IMPLICIT_GEMM"),
                _entry("cudnn:GEMM", "cudnn", 300.0, 4096, algorithm="GEMM"),
                _entry("cudnn:FFT", "cudnn", 80.0, 1 << 30, algorithm="FFT"),
                _entry("cudnn:DIRECT", "cudnn", None, reason=NO),
                _entry("cudnn:FFT tf32", "cudnn", 10.0, 0, accuracy="tf32", algorithm="FFT"),
                _entry("cublas", "cublas", 400.0, 1 << 20),
                _entry("torch nchw", "torch", 90.0, 1 << 29),
                _entry("torch nchw tf32", "torch", 5.0, 0, accuracy="tf32"),
            ),
            _layer(
                "two",
                _entry("simt", "im2win", 100.0),
                _entry(
                    "cudnn:IMPLICIT_PRECOMP_GEMM nhwc",
                    "cudnn",
                    250.0,
                    8 << 20,
                    algorithm="IMPLICIT_PRECOMP_GEMM",
                ),
                _entry("cudnn:GEMM", "cudnn", 200.0, 4096, algorithm="GEMM"),
                _entry("cudnn:FFT", "cudnn", None, reason=NO),
                _entry("cudnn:DIRECT", "cudnn", None, reason=NO),
                _entry("cublas", "cublas", 400.0, 1 << 20),
                _entry("torch nchw", "torch", 150.0, 0),
            ),
        ],
    }


def test_report_of_a_gpu(record):
    lines = report.text(record).splitlines()[4:]
    assert [line.split() for line in lines[:3]] == [
        "layer simt us cublas us torch nchw us torch nchw tf32 us cudnn us cudnn algorithm "
        "cudnn tf32 us best im2win TFLOPS GB/s % of SGEMM vs cudnn best vs cudnn no workspace "
        "vs cudnn up to 1 MiB vs cublas vs torch im2win workspace cudnn workspace "
        "cublas workspace torch workspace".split(),
        "one 100.0 400.0 90.00 5.00 80.00 FFT 10.00 simt 20.0 500.0 40 0.80x 3.20x 3.00x 4.00x "
        "0.90x 0 1.0 GiB 1.0 MiB 512.0 MiB".split(),
        "two 100.0 400.0 150.0 - 200.0 GEMM - simt 20.0 500.0 40 1.50x 2.50x 1.50x 4.00x 1.50x 0 "
        "4.0 KiB 1.0 MiB 0".split(),
    ]
    by_algorithm = lines.index("cuDNN by algorithm, us (workspace):")
    assert [line.split() for line in lines[by_algorithm + 1 : by_algorithm + 4]] == [
        "layer IMPLICIT_GEMM GEMM FFT IMPLICIT_PRECOMP_GEMM nhwc".split(),
        "one 320.0 (0) 300.0 (4.0 KiB) 80.00 (1.0 GiB) -".split(),
        "two - 200.0 (4.0 KiB) - 250.0 (8.0 MiB)".split(),
    ]
    assert lines[by_algorithm + 4 :] == [
        "",
        "cuDNN by algorithm, us (workspace), TF32 allowed:",
        "layer   FFT tf32",
        "one    10.00 (0)",
        "two            -",
        "",
        "ceiling, product: 50.0 TFLOPS",
        "ceiling, copy: 3000 GB/s",
        "vs cudnn best: geomean 1.10x (0.80x to 1.50x), faster on 1 of 2",
        "  not faster on one 0.80x",
        "vs cudnn no workspace: geomean 2.83x (2.50x to 3.20x), faster on 2 of 2",
        "  the faster of IMPLICIT_GEMM and IMPLICIT_PRECOMP_GEMM; workspace by cuDNN's own figure "
        "0 to 8.0 MiB",
        "vs cudnn up to 1 MiB: geomean 2.12x (1.50x to 3.00x), faster on 2 of 2",
        "vs cublas: geomean 4.00x (4.00x to 4.00x), faster on 2 of 2",
        "vs torch: geomean 1.16x (0.90x to 1.50x), faster on 1 of 2",
        "  not faster on one 0.90x",
        f"- cudnn:DIRECT (all layers): {NO}",
        f"- cudnn:FFT (two): {NO}",
        "tf32: float32 with TF32 allowed, a class of its own; in no ratio",
    ]


@pytest.mark.parametrize("key", ["cudnn best", "cudnn no workspace", "cudnn up to 1 MiB", "torch"])
def test_tf32_is_no_rival_of_float32(record, key):
    """An entry that would win by far changes nothing as long as it is of class tf32."""
    layer = record["layers"][0]
    rival = next(r for r in rivals.rivals(record) if r.key == key)
    before = rival.best(layer)
    entries = [
        _entry("a", family, 1.0, 0, accuracy="tf32", algorithm="IMPLICIT_GEMM")
        for family in rivals.CUDNN_FAMILIES
    ]
    layer["implementations"] += entries
    assert rival.best(layer) is before
    for entry in entries:
        entry["accuracy"] = "fp32"
    assert rival.best(layer) in entries
    # A record from before there were classes has only the dtype's own.
    for entry in entries:
        del entry["accuracy"]
    assert rival.best(layer) in entries


def test_little_workspace_is_a_figure_and_no_workspace_a_name(record):
    layer = record["layers"][1]
    by_name, by_figure = rivals.rivals(record)[1:3]
    assert by_name.best(layer)["workspace_bytes"] == 8 << 20
    assert by_figure.best(layer)["name"] == "torch nchw"
    layer["implementations"][-1]["workspace_bytes"] = None
    assert by_figure.best(layer)["name"] == "cudnn:GEMM"
    layer["implementations"][2]["workspace_bytes"] = rivals.LITTLE_WORKSPACE + 1
    assert by_figure.best(layer) is None
    layer["implementations"][1]["detail"]["algorithm"] = "GEMM"
    assert by_name.best(layer) is None


def _engine(name, us, workspace, accuracy="fp32"):
    detail = {"engine": "eng50_k2=3", "plans": {"timed": 7, "refused": 1, "wrong": 0}}
    return _entry(name, "cudnn-frontend", us, workspace, accuracy=accuracy, **detail)


def test_engines_are_cudnn_too(record):
    first, second = record["layers"]
    first["implementations"] += [
        _engine("cudnn-frontend nchw", 60.0, 1 << 30),
        _engine("cudnn-frontend nhwc little workspace", 70.0, 0),
        _engine("cudnn-frontend nhwc tf32", 9.0, 0, "tf32"),
    ]
    gone = "nvidia-cudnn-frontend is not installed"
    for name in ("cudnn-frontend nchw", "cudnn-frontend nhwc"):
        second["implementations"].append(_entry(name, "cudnn-frontend", None, reason=gone))
    best, _, little = rivals.rivals(record)[:3]
    assert best.best(first)["name"] == "cudnn-frontend nchw"
    assert little.best(first)["name"] == "cudnn-frontend nhwc little workspace"
    head, row, other = report.table(record)
    at = head.index("cudnn-frontend us")
    assert head[at + 1] == "cudnn-frontend tf32 us"
    assert (row[at : at + 2], other[at : at + 2]) == (["60.00", "9.00"], ["-", "-"])
    lines = report.text(record).splitlines()
    at = lines.index("cuDNN's engines, the fastest plan of each format:")
    assert [line.split() for line in lines[at + 1 : at + 5]] == [
        "layer entry us workspace plans timed engine".split(),
        "one nchw 60.00 1.0 GiB 7 eng50_k2=3".split(),
        "one nhwc little workspace 70.00 0 7 eng50_k2=3".split(),
        "one nhwc tf32 9.00 0 7 eng50_k2=3".split(),
    ]
    assert f"- cudnn-frontend nchw, cudnn-frontend nhwc (two): {gone}" in lines
    # Without the legacy API there is no set of algorithms by name, and still a best.
    for layer in record["layers"]:
        layer["implementations"] = [
            e for e in layer["implementations"] if e["family"] not in ("cudnn", "torch")
        ]
    keys = [rival.key for rival in rivals.rivals(record)]
    assert keys == ["cudnn best", "cudnn up to 1 MiB", "cublas"]


def test_a_family_that_is_missing_as_a_whole_is_one_name(record):
    for layer in record["layers"]:
        layer["implementations"] = [
            _entry("simt", "im2win", 100.0),
            *(_entry(name, "cudnn", None, reason="no library") for name in "abc"),
        ]
    assert "- cudnn (all 3) (all layers): no library" in report.text(record).splitlines()
    record["layers"][1]["implementations"][2]["reason"] = "another"
    lines = report.text(record).splitlines()
    assert "- a, c (all layers): no library" in lines


def test_markdown_has_every_rival_and_leaves_out_the_times_of_many(record):
    for layer in record["layers"]:
        layer["implementations"] += [_entry("tvm tuned", "tvm-tuned", 200.0, None)]
    lines = report.markdown(record).splitlines()
    assert lines[0] == (
        "| layer | im2win us | TFLOPS | vs cuDNN, best of all | "
        "vs cuDNN's algorithms without workspace | vs cuDNN, at most 1 MiB of workspace | "
        "vs im2col + cuBLAS | vs TVM tuned | vs PyTorch | im2win workspace |"
    )
    means = ["1.10x", "2.83x", "2.12x", "4.00x", "2.00x", "1.16x"]
    assert " | ".join(f"**{mean}**" for mean in means) in lines[-1]


def test_a_share_is_of_the_product_in_the_layers_class(record):
    for entry in record["layers"][0]["implementations"]:
        del entry["accuracy"]
    record["layers"][0]["dtype"] = "float16"
    head, first, second = report.table(record)
    column = head.index("% of fp16 GEMM")
    assert (first[column], second[column]) == ("-", "40")
    record["ceilings"]["gemm_fp16"] = {"what": "product of float16", "tflops": 200.0}
    assert report.table(record)[1][column] == "10"
    assert "ceiling, product of float16: 200.0 TFLOPS" in report.text(record).splitlines()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_record_in_two_bytes(record, dtype):
    """All that is cuDNN is a rival in the class of the dtype, in every summary."""
    kind = {"float16": "fp16", "bfloat16": "bf16"}[dtype]
    for layer in record["layers"]:
        layer |= {"dtype": dtype, "accuracy": kind}
        layer["implementations"] = [
            e | {"accuracy": kind} for e in layer["implementations"] if e["accuracy"] == "fp32"
        ]
    text = report.text(record)
    assert "vs cudnn best: geomean 1.10x (0.80x to 1.50x), faster on 1 of 2" in text
    assert "vs torch: geomean 1.16x" in text
    assert "tf32" not in text


def test_tf32_is_a_rival_where_it_is_asked_for(record):
    first = record["layers"][0]
    for layer in record["layers"]:
        layer["accuracy"] = "tf32"
        layer["implementations"].append(_entry("window", "im2win", 20.0, accuracy="tf32"))
    first["implementations"] = [
        e for e in first["implementations"] if e["accuracy"] == "tf32" or e["family"] == "cublas"
    ]
    assert rivals.rivals(record)[0].best(first)["name"] == "torch nchw tf32"
    head, row, _ = report.table(record)
    assert "cudnn tf32 us" not in head
    assert (row[head.index("cudnn us")], row[head.index("cudnn algorithm")]) == (
        "10.00",
        "FFT tf32",
    )
    assert row[head.index("best im2win")] == "window"
    assert row[head.index("vs cudnn best")] == "0.25x"
    # What has no tf32 is there in fp32, which is better.
    assert row[head.index("vs cublas")] == "20.00x"
    lines = report.text(record).splitlines()
    assert lines[1].startswith("cuda, float32 NCHW batch 1, tf32;")
    assert (
        "tf32: float32 with TF32 allowed, ours and theirs; who has no TF32 takes part in fp32"
        in lines
    )
    # No ceiling of its own was measured: the float32 product is none.
    assert row[head.index("% of tf32 GEMM")] == "-"


def test_ceilings():
    single, half = timing.Times(20_000.0, 1.0, 9), timing.Times(2_000.0, 1.0, 9)
    copied = timing.Times(700.0, 1.0, 9)
    found = ceilings.describe({"fp16": half, "fp32": single, "copy": copied})
    assert list(found) == ["sgemm", "gemm_fp16", "copy"]
    assert ceilings.product(found, "fp16")["tflops"] == pytest.approx(2 * 8192**3 / 2e-3 / 1e12)
    assert found["gemm_fp16"]["what"] == "torch.mm, float16, 8192^3, float32 sums"
    assert ceilings.product(found, "tf32") is None
    assert ceilings.product(None, "fp32") is None
    tf32 = ceilings.describe({"tf32": half, "copy": copied})
    assert tf32["gemm_tf32"]["what"] == "torch.mm, float32, 8192^3, TF32 allowed"
    assert found["sgemm"]["tflops"] == pytest.approx(2 * 8192**3 / 20e-3 / 1e12)
    assert found["copy"]["gb_s"] == pytest.approx(2 * 2**30 / 700e-6 / 1e9)
    assert found["copy"]["times"]["n"] == 9
    assert found["sgemm"]["what"] == "torch.mm, float32, 8192^3, TF32 off"


@pytest.mark.parametrize(
    ("accuracy", "dtype"), [("fp32", "float32"), ("tf32", "float32"), ("bf16", "bfloat16")]
)
def test_a_product_of_a_class(accuracy, dtype):
    """Its dtype, TF32 in tf32 alone whoever had a turn before, and sums that stay in float32."""
    torch = pytest.importorskip("torch")
    matmul = torch.backends.cuda.matmul
    ceilings.float32_sums()
    call = ceilings._product_call(accuracy, 8, "cpu")
    for before in (True, False):
        matmul.allow_tf32 = before
        assert call().dtype == getattr(torch, dtype)
        assert matmul.allow_tf32 == (accuracy == "tf32")
    ceilings.float32_sums()
    assert not matmul.allow_tf32
    assert not matmul.allow_fp16_reduced_precision_reduction
    assert not matmul.allow_bf16_reduced_precision_reduction


def test_a_roofline_is_that_of_the_class(record, tmp_path):
    for layer in record["layers"]:
        layer["accuracy"] = "tf32"
    with pytest.raises(roofline.RooflineError, match="no measured product of tf32"):
        roofline.draw(record, tmp_path / "roofline.png")
    record["ceilings"]["gemm_tf32"] = {"what": "product", "tflops": 400.0}
    assert roofline.attainable(1000.0, record["ceilings"], "tf32") == pytest.approx(400.0)
    roofline.draw(record, tmp_path / "roofline.png")


def test_roofline(record, tmp_path):
    assert roofline.points(record) == [("one", 40.0, 20.0), ("two", 40.0, 20.0)]
    assert roofline.attainable(1.0, record["ceilings"]) == pytest.approx(3.0)
    assert roofline.attainable(1000.0, record["ceilings"]) == pytest.approx(50.0)
    path = tmp_path / "roofline.png"
    roofline.draw(record, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    without = copy.deepcopy(record) | {"ceilings": None}
    with pytest.raises(roofline.RooflineError, match="measured on cuda only"):
        roofline.draw(without, path)


def test_csv(record):
    head, first, *rest = rows.text(record).splitlines()
    assert head == (
        "layer,problem,dtype,layout,batch,implementation,family,accuracy,status,reason,"
        "cold_us,cold_iqr_us,cold_n,hot_us,hot_iqr_us,hot_n,warm_us,warm_iqr_us,warm_n,"
        "tflops,gb_s,workspace_bytes,relative_error,max_error"
    )
    assert first == (
        "one,mb1ic3ih8oc4kh3,float32,NCHW,1,simt,im2win,fp32,ok,,100.0,1.0,9,,,,,,,20,500,0,1e-07,"
    )
    named = {row.split(",")[5]: row for row in rest if row.startswith("one,")}
    start = "one,mb1ic3ih8oc4kh3,float32,NCHW,1,cudnn:DIRECT,cudnn,fp32,absent,Cudnn"
    assert named["cudnn:DIRECT"].startswith(start)
    assert ",torch,tf32,ok," in named["torch nchw tf32"]
    assert len(rest) == 15
