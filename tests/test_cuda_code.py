"""Code of the CUDA-core schedules as nvcc sees it, on a machine without a GPU."""

import math
import re
from functools import cache

import numpy as np
import pytest
from problems import DTYPES, LAYOUTS
from simt_switches import FORMS, RAGGED, SWITCHES, TARGET, WHOLE, config_of

import im2win_tvm
from im2win_tvm import ArgumentError, ArtifactError, lower, suites, tensors, toolchain
from im2win_tvm.cuda_driver import compute_capability
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES
from im2win_tvm.target import CudaTarget

every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def _nvcc(request):
    if "nvcc" in request.keywords:
        try:
            toolchain.find_nvcc()
        except toolchain.ToolchainError as error:
            pytest.skip(str(error))


class Built:
    """CUDA source of a configuration, and what ptxas says its kernels take."""

    def __init__(self, folder, form, problem, config, arch="sm_90"):
        target = CudaTarget(arch)
        module = lower.lower(SCHEDULES[form].build(problem, config, target))
        source = lower.cuda_source(module, target)
        # The kernels stand before the host code, which takes nvcc as long again.
        self.device, include, _ = source.partition("#include <tvm/ffi/")
        assert include
        unit = folder / "kernel.cu"
        unit.write_text(self.device)
        report = toolchain.run([
            str(toolchain.find_nvcc().path), "-cubin", "-O3", "-std=c++17", f"-arch={arch}",
            "-Xptxas", "-v", "-diag-suppress", "174,177", "-o", str(folder / "kernel.cubin"),
            str(unit),
        ])  # fmt: skip
        self.kernels = {each.kernel: each for each in toolchain.parse_resources(report)}
        self.conv = self.kernels["im2win_conv_kernel"]
        # Every kernel is declared and then defined: this is the convolution's definition.
        self.body = next(
            text
            for text in self.device.split('extern "C" __global__ ')
            if re.match(r"[^(]*\(\d+\) im2win_conv_kernel\([^)]*\) *\{", text)
        )


@pytest.mark.nvcc
@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_defaults_compile_without_spills(dtype, layout, form, tmp_path):
    """A layer of everyday size, with the heuristic's configuration; architectures in turn."""
    arch = ("sm_80", "sm_90")[(DTYPES.index(dtype) + LAYOUTS.index(layout) + FORMS.index(form)) % 2]
    problem = ConvProblem(8, 64, (56, 56), 128, 3, padding=1, dtype=dtype, layout=layout)
    config = SCHEDULES[form].default(problem, CudaTarget(arch))
    built = Built(tmp_path, form, problem, config, arch)
    expected = {"im2win_prepare_kernel", "im2win_conv_kernel"}
    expected |= {"im2win_transform_kernel"} if form == "cuda_simt_explicit" else set()
    assert set(built.kernels) == expected
    for each in built.kernels.values():
        assert (each.spill_store_bytes, each.spill_load_bytes, each.stack_bytes) == (0, 0, 0), each
    assert 0 < built.conv.shared_bytes <= CudaTarget(arch).shared_bytes
    # More than one block fits on a multiprocessor: 65536 registers.
    assert built.conv.registers * config.threads <= 65536 // 2


@pytest.mark.nvcc
@pytest.mark.parametrize("name", SWITCHES)
def test_switches_show_in_the_code(name, tmp_path):
    config = config_of(**SWITCHES[name])
    problem = RAGGED.replace(padding=0) if config.table else RAGGED
    built = Built(tmp_path, "cuda_simt", problem, config)
    assert (built.conv.spill_store_bytes, built.conv.spill_load_bytes) == (0, 0)
    stages = 0 if not config.shared else 2 if config.double_buffer else 1
    words = config.block_k * (config.block_m + config.block_p)
    # A table holds 4 bytes for each of 36 products; whole tiles are 40, and arrays start at
    # multiples of 64 bytes.
    table = 192 if config.table else 0
    assert built.conv.shared_bytes == 4 * stages * words + table
    assert ("__shared__" in built.body) == config.shared
    assert ("__syncthreads()" in built.body) == config.shared
    assert built.body.startswith(f"void __launch_bounds__({config.threads}) ")
    assert f"float conv_local_ptr[{config.thread_m * config.thread_p}]" in built.body
    # A tile that waits in registers while another is multiplied.
    waiting = re.findall(r"\w+ (?:packed|window)_shared_local_ptr\[\d+\]", built.body)
    if config.prefetch:
        assert len(waiting) == 2
    # Fragments are as wide as `vector` and a thread's outputs allow, copies of filter tiles as
    # `vector` where it divides the tile's rows.
    widths = {min(config.vector, config.thread_m), min(config.vector, config.thread_p)}
    widths |= {config.vector} if config.block_m % config.vector == 0 else set()
    for width, vector in ((2, "float2"), (4, "float4")):
        assert (f"({vector}*)" in built.body) == (config.shared and width in widths)


@pytest.mark.nvcc
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whole_vectors_are_stored_as_vectors(layout, tmp_path):
    for problem, expected in ((WHOLE, True), (RAGGED, False)):
        built = Built(tmp_path, "cuda_simt", problem.replace(layout=layout), config_of())
        assert bool(re.search(r"\(float4\*\)\(y_ptr", built.body)) is expected


@cache
def compiled(form, **options):
    return im2win_tvm.compile(RAGGED, "cuda", arch="sm_90", schedule=form, **options)


@pytest.mark.nvcc
@every_form
def test_compiled_and_exported_without_a_gpu(form, tmp_path):
    kernel = compiled(form)
    assert im2win_tvm.read_metadata(kernel.export(tmp_path / "kernel.so")) == kernel.metadata
    m = kernel.metadata
    assert (m["target"]["kind"], m["target"]["arch"]) == ("cuda", "sm_90")
    assert (m["schedule"]["name"], m["accuracy"], m["descriptor"]) == (form, "fp32", str(RAGGED))
    assert re.fullmatch(r"\d+\.\d+", m["versions"]["nvcc"])
    names = [call["function"] for call in m["calls"]]
    if form == "cuda_simt":
        assert (names, kernel.workspace_bytes, m["workspaces"]) == (["im2win_conv"], 0, [])
    else:
        assert names == ["im2win_transform", "im2win_conv"] and m["workspaces"] == ["im2win"]
        # |I'| = N * C * Ho * (columns that windows reach) * Hf: 13 + 1 columns, all reached.
        assert RAGGED.im2win_elements == 3 * 6 * 6 * 14 * 3
        assert kernel.workspace_bytes == 4 * RAGGED.im2win_elements
    assert m["scratch_bytes_per_thread"] == 0


@pytest.mark.nvcc
def test_cuda_kernels_are_not_loaded_without_a_gpu(tmp_path):
    if compute_capability() is not None:
        pytest.skip("there is a CUDA device here")
    path = compiled("cuda_simt").export(tmp_path / "kernel.so")
    message = r"kernel\.so: built for CUDA arch='sm_90': there is no CUDA device here"
    with pytest.raises(ArtifactError, match=message):
        im2win_tvm.load(path)


@pytest.mark.nvcc
def test_arrays_of_the_cpu_are_refused_by_name():
    kernel = compiled("cuda_simt")
    made = tensors.fill(RAGGED)
    out = tensors.poisoned(RAGGED.output_shape, "float32")
    with pytest.raises(ArgumentError, match=r"^x: is on 'cpu'; this kernel runs on 'cuda'"):
        kernel(made.x, made.w, out=out)
    with pytest.raises(ArgumentError, match=r"^w: is on 'cpu'; this kernel runs on 'cuda'"):
        kernel.prepare(made.w)
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(ArgumentError, match=r"^x: is on 'cpu'; this kernel runs on 'cuda'"):
        kernel(torch.from_numpy(made.x), made.w, out=out)
    assert np.isnan(out).all()


@pytest.mark.nvcc
def test_sources_are_the_same_when_compiled_in_threads(monkeypatch):
    """TVM is told by an environment variable to leave the source as it is, and threads share it."""
    import os
    from concurrent.futures import ThreadPoolExecutor

    name = "TVM_COMPILE_FORCE_FALLBACK"
    monkeypatch.delenv(name, raising=False)
    module = lower.lower(SCHEDULES["cuda_simt"].build(RAGGED, config_of(), TARGET))
    alone = lower.cuda_source(module, TARGET)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: lower.cuda_source(module, TARGET), range(24)))
    assert all(source == alone for source in together)
    assert name not in os.environ


@pytest.mark.nvcc
def test_a_source_that_does_not_compile_says_why(tmp_path):
    unit = tmp_path / "kernel.cu"
    unit.write_text("__global__ void broken() { undeclared = 1; }\n")
    with pytest.raises(toolchain.ToolchainError, match='identifier "undeclared" is undefined'):
        toolchain.build_cuda_library(tmp_path / "kernel.so", unit, "sm_90", [])


def test_no_nvcc_says_what_to_install(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain.os, "access", lambda path, mode: False)
    with pytest.raises(toolchain.ToolchainError, match=r"pip install 'im2win_tvm\[cuda\]'"):
        toolchain.find_nvcc.__wrapped__()


def test_resources_are_read_from_ptxas():
    report = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 63 registers, used 1 barriers, 8 bytes cumulative stack size, 6144 bytes smem
ptxas info    : Compiling entry function 'second' for 'sm_90'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""
    assert toolchain.parse_resources(report) == [
        ("first", 63, 6144, 8, 4, 12),
        ("second", 12, 0, 0, 0, 0),
    ]


def test_shared_memory_bound_is_no_smaller_than_what_is_taken():
    """The rounded bound of `check` and the literal one here, for the largest tiles proposed."""
    for config in SCHEDULES["cuda_simt"].configs(RAGGED, TARGET):
        stages = 2 if config.double_buffer else 1
        assert math.prod((stages, config.block_k, config.block_m + config.block_p, 4)) <= 49152


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("layer", "layout"),
    [("conv5", "NHWC"), pytest.param("conv11", "NCHW", marks=pytest.mark.slow)],
)
def test_layers_that_ptxas_would_spill_are_built_without(layer, layout, tmp_path):
    """nvcc 13.0 spills 12 and 8 bytes of these two in its first attempt."""
    problem, schedule = suites.suite("paper", 128, layout=layout)[layer], SCHEDULES["cuda_simt"]
    module = schedule.build(problem, schedule.default(problem, TARGET), TARGET)
    (tmp_path / "kernel.cu").write_text(lower.cuda_source(lower.lower(module), TARGET))
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", TARGET.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)


@pytest.mark.nvcc
@pytest.mark.parametrize(("spilled", "attempts"), [([0], 1), ([8, 0], 2), ([8, 4], 2)])
def test_a_spill_is_compiled_once_more_for_registers(spilled, attempts, tmp_path, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        stores = spilled[len(commands) - 1]
        return (
            "Compiling entry function 'k' for 'sm_90'\n"
            f"{stores} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads\n"
            "Used 128 registers, 64 bytes smem\n"
        )

    monkeypatch.setattr(toolchain, "run", run)
    report = toolchain.build_cuda_library(tmp_path / "k.so", tmp_path / "k.cu", "sm_90", [])
    assert toolchain.parse_resources(report)[0].spill_store_bytes == spilled[-1]
    asked = ["--register-usage-level=0" in command for command in commands]
    assert asked == [False, True][:attempts]
