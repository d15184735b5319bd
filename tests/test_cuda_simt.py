"""The CUDA-core schedules on a machine without a GPU: values emulated, code through nvcc."""

import itertools
import math
import random
import re
from functools import cache

import numpy as np
import pytest
from problems import DTYPES, LAYOUTS, odd_problems, problem_id

import im2win_tvm
from im2win_tvm import ArgumentError, ArtifactError, emulate, lower, reference, tensors, toolchain
from im2win_tvm.cuda_driver import compute_capability
from im2win_tvm.epilogue import Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_simt import Config
from im2win_tvm.target import CudaTarget

TARGET = CudaTarget("sm_90")
FORMS = ("cuda_simt", "cuda_simt_explicit")
# No extent is a multiple of a tile: 66 pixels an image, 35 or 36 products, 11 channels a group.
RAGGED = ConvProblem(3, 6, (11, 13), 22, (3, 4), (2, 1), ((1, 2), (0, 1)), (1, 1), 2)
# Every extent is a whole number of vectors.
WHOLE = ConvProblem(2, 8, (8, 8), 16, 3, padding=1)
BASE = dict(block_m=32, block_p=64, block_k=8, thread_m=4, thread_p=4)

# Every switch alone, then tiles of all shapes: tall, flat, odd, larger than the problem.
SWITCHES = {
    "all on": {},
    "single buffer": dict(double_buffer=False),
    "no prefetch": dict(prefetch=False),
    "single buffer, no prefetch": dict(double_buffer=False, prefetch=False),
    "no shared memory": dict(shared=False, double_buffer=False, prefetch=False),
    "no shared memory, no vectors": dict(
        shared=False, double_buffer=False, prefetch=False, vector=1
    ),
    "vectors of two": dict(vector=2),
    "no vectors": dict(vector=1),
    "no micro-kernel": dict(block_m=16, block_p=16, thread_m=1, thread_p=1),
    "1x8 outputs a thread": dict(block_m=8, thread_m=1, thread_p=8),
    "8x1 outputs a thread": dict(block_m=64, block_p=32, thread_m=8, thread_p=1),
    "2x2 outputs a thread": dict(thread_m=2, thread_p=2),
    "8x8 outputs a thread": dict(block_m=64, block_p=128, thread_m=8, thread_p=8),
    "8x16 outputs a thread": dict(block_m=64, block_p=128, thread_m=8, thread_p=16),
    "128x128 tile": dict(block_m=128, block_p=128, thread_m=8, thread_p=8),
    "odd tile": dict(block_m=24, block_p=36, block_k=5, thread_m=3, thread_p=3, vector=1),
    "one product a tile": dict(block_k=1),
    "one channel a tile": dict(block_m=1, block_p=128, thread_m=1),
    "K in one tile": dict(block_k=48),
    "channels of a tap": dict(taps=True),
    "more channels of a tap than there are": dict(taps=True, block_k=16),
    "table": dict(table=True),
    "table, single buffer": dict(table=True, double_buffer=False),
    "table, no prefetch": dict(table=True, prefetch=False),
}
every_form = pytest.mark.parametrize("form", FORMS)


def config_of(**switches):
    return Config(**{**BASE, **switches})


def assert_right(form, problem, config=None, epilogue=None, kinds=tensors.KINDS):
    schedule, epilogue = SCHEDULES[form], epilogue or Epilogue()
    config = config or schedule.default(problem, TARGET)
    for kind in kinds:
        made = tensors.fill(problem, kind, 2, epilogue.bias, epilogue.residual)
        given = {name: array for name, array in made._asdict().items() if array is not None}
        actual = emulate.run(schedule, problem, config, TARGET, given, epilogue)
        expected = reference.conv2d(*made[:2], problem, *made[2:], epilogue.activation)
        result = tensors.check(actual, expected, problem, kind)
        assert result.ok, f"{config}: {result.message}"


@every_form
@pytest.mark.parametrize(
    "problem",
    [
        *odd_problems(3, 60, most_work=1_000_000),
        *(
            pytest.param(problem, marks=pytest.mark.slow)
            for problem in odd_problems(4, 240, most_work=1_000_000)
        ),
    ],
    ids=problem_id,
)
def test_odd_problems(problem, form):
    assert_right(form, problem)


def every_switch():
    """(form, layout, dtype, name): of the eight ways to run a switch every other one."""
    ways = list(itertools.product(FORMS, LAYOUTS, DTYPES))
    for number, name in enumerate(SWITCHES):
        for way, (form, layout, dtype) in enumerate(ways):
            if (way.bit_count() + number) % 2 == 0:
                yield form, layout, dtype, name


@pytest.mark.parametrize(("form", "layout", "dtype", "name"), list(every_switch()))
def test_switches(form, layout, dtype, name):
    config = config_of(**SWITCHES[name])
    for problem in (RAGGED, WHOLE):
        problem = problem.replace(dtype=dtype, layout=layout)
        if config.table:
            problem = problem.replace(padding=0)
        assert_right(form, problem, config, kinds=("integer",))


@pytest.mark.parametrize("turn", range(12))
def test_sampled_configurations(turn):
    """Proposals far apart, on a problem that none of them divides."""
    chance = random.Random(turn)
    problem = RAGGED.replace(layout=chance.choice(LAYOUTS), dtype=chance.choice(DTYPES))
    form = chance.choice(FORMS)
    config = chance.choice(list(SCHEDULES[form].configs(problem, TARGET)))
    assert_right(form, problem, config, Epilogue(True, True, "relu"))


@every_form
@pytest.mark.parametrize(
    ("bias", "residual", "activation"),
    list(itertools.product([False, True], [False, True], [None, "relu"])),
)
def test_epilogues(bias, residual, activation, form):
    epilogue = Epilogue(bias, residual, activation)
    assert_right(form, RAGGED.replace(layout="NHWC"), epilogue=epilogue)
    assert_right(form, WHOLE.replace(dtype="float16"), epilogue=epilogue)


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(layout, form):
    problem = RAGGED.replace(layout=layout)
    schedule = SCHEDULES[form]
    config = schedule.default(problem, TARGET)
    for seed, value in enumerate((np.nan, np.inf)):
        made = tensors.fill(problem, "integer", seed, True, True)
        chance = random.Random(seed)
        for array in (made.x, made.w):
            array.reshape(-1)[chance.randrange(array.size)] = value
        expected = reference.conv2d(
            made.x, made.w, problem, made.bias, made.residual, activation="relu"
        )
        actual = emulate.run(
            schedule, problem, config, TARGET, made._asdict(), Epilogue(True, True, "relu")
        )
        np.testing.assert_array_equal(actual, expected)
        assert 0 < np.isfinite(actual).sum() < actual.size


def test_every_proposal_is_valid_and_so_is_the_default():
    for problem in (RAGGED, WHOLE, *odd_problems(5, 4)):
        for schedule in (SCHEDULES[form] for form in FORMS):
            proposed = list(schedule.configs(problem, TARGET))
            assert len(set(proposed)) == len(proposed) > 100
            for config in (*proposed, schedule.default(problem, TARGET)):
                assert schedule.check(config, problem, TARGET) is None, config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_m=0), "block_m=0: allowed are whole numbers from 1"),
        (dict(block_k=8.0), "block_k=8.0: allowed are whole numbers from 1"),
        (dict(thread_p=True), "thread_p=True: allowed are whole numbers from 1"),
        (dict(shared=1), "shared=1: allowed are True and False"),
        (dict(prefetch="no"), "prefetch='no': allowed are True and False"),
        (dict(vector=3), "vector=3: allowed are 1, 2 and 4"),
        (dict(vector=8), "vector=8: allowed are 1, 2 and 4"),
        (dict(thread_m=5), "thread_m=5: a divisor of block_m=32"),
        (dict(block_p=60, thread_p=6), "thread_p=6: a divisor or a multiple of vector=4"),
        (
            dict(block_m=8, block_p=16),
            "block_m=8, block_p=16, thread_m=4, thread_p=4: 8 threads; allowed are 32 to 1024",
        ),
        (
            dict(block_m=256, block_p=256, thread_m=4, thread_p=4),
            "block_m=256, block_p=256, thread_m=4, thread_p=4: 4096 threads; "
            "allowed are 32 to 1024",
        ),
        (
            dict(block_m=128, block_p=256, thread_m=16, thread_p=16),
            "thread_m=16, thread_p=16: more than 128 accumulators",
        ),
        (dict(shared=False), "shared=False: double_buffer, prefetch and table need shared=True"),
        (
            dict(shared=False, double_buffer=False),
            "shared=False: double_buffer, prefetch and table need shared=True",
        ),
        (
            dict(table=True),
            "table=True: padding=((1, 2), (0, 1)) is read in the kernel, windows differ",
        ),
        (dict(block_k=64), "block_k=64: 51200 bytes of shared memory, 49152 allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(fields, message):
    schedule = SCHEDULES["cuda_simt"]
    assert schedule.check(config_of(), RAGGED, TARGET) is None
    assert schedule.check(config_of(**fields), RAGGED, TARGET) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(
            RAGGED, TARGET, schedule="cuda_simt", config={**vars(config_of()), **fields}
        )
    assert str(caught.value) == message


def test_refused_problems():
    many = ConvProblem(1, 65536, (1, 1), 65536, 1, groups=65536)
    for form in FORMS:
        with pytest.raises(ScheduleError, match=f"groups=65536: {form} takes up to 65535"):
            im2win_tvm.compile(many, TARGET, schedule=form)
        with pytest.raises(ScheduleError, match=rf"input_size=\(9,\): {form} takes two spatial"):
            im2win_tvm.compile(ConvProblem(1, 3, (9,), 4, 3), TARGET, schedule=form)
    large = ConvProblem(512, 64, (200, 200), 1, 7)
    with pytest.raises(ScheduleError, match=r"I' has 2\*\*31 elements or more"):
        im2win_tvm.compile(large, TARGET, schedule="cuda_simt_explicit")
    assert SCHEDULES["cuda_simt"].supports(large, TARGET) is None


# From here on nvcc runs.


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
        # The kernels stand before the host code, which takes nvcc several times longer.
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
