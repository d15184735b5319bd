"""Depthwise convolution on tensor cores without a GPU: simulated, and through nvcc."""

import random

import numpy as np
import pytest
from depthwise_cases import EPILOGUES, FULL, LARGE, LAST, MMA_CASES, SQUARE, TALL
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import problem_id

import im2win_tvm
from im2win_tvm import emulate, lower, reference, suites, tensors, toolchain
from im2win_tvm.epilogue import NONE, Epilogue
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules.cuda_depthwise_mma_tiles import Config
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget

FORM = "cuda_depthwise_mma"
SCHEDULE = SCHEDULES[FORM]
HOPPER, AMPERE = CudaTarget("sm_90a"), CudaTarget("sm_80")


@pytest.mark.parametrize(("problem", "config"), MMA_CASES.values(), ids=MMA_CASES)
def test_configurations(problem, config):
    assert_right(FORM, problem, config, FULL)


@pytest.mark.parametrize("turn", range(6))
def test_sampled_configurations(turn):
    problem = (SQUARE, LAST.replace(dtype="bfloat16"), TALL)[turn % 3]
    config = random.Random(turn).choice(list(SCHEDULE.configs(problem, HOPPER)))
    assert_right(FORM, problem, config, target=HOPPER, kinds=("integer",))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_epilogues(epilogue):
    problem = SQUARE if epilogue.bias else LAST
    assert_right(FORM, problem.replace(dtype="bfloat16"), None, epilogue, kinds=("integer",))


@pytest.mark.parametrize("problem", [SQUARE, LAST, TALL], ids=problem_id)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem):
    assert_nan_and_infinity_stay_local(FORM, problem)
    assert_nan_and_infinity_stay_local(FORM, problem.replace(dtype="bfloat16"))


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_nan_and_infinity_of_a_tap_reach_outputs_that_multiply_it_by_padding(value):
    """Parts of the Toeplitz matrix beyond the input's columns are not multiplied."""
    made = tensors.fill(LAST, "integer", 3)
    made.w[12, 0, 0, 0] = value
    expected = reference.conv2d(made.x, made.w, LAST)
    given = {"x": made.x, "w": made.w}
    actual = emulate.run(SCHEDULE, LAST, Config(8, 1, 2), HOPPER, given, NONE)
    np.testing.assert_array_equal(actual.astype("float64"), expected)
    assert np.isnan(actual[..., 12]).any() and np.isfinite(np.delete(actual, 12, -1)).all()


def test_an_infinite_input_leaves_its_neighbours_finite():
    """Without the second computation zeros of the Toeplitz matrix would make them NaN."""
    made = tensors.fill(LAST, "integer", 3)
    made.x[1, 4, 5, :] = np.inf
    expected = reference.conv2d(made.x, made.w, LAST)
    given = {"x": made.x, "w": made.w}
    actual = emulate.run(SCHEDULE, LAST, Config(8, 1, 2), HOPPER, given, NONE)
    np.testing.assert_array_equal(actual.astype("float64"), expected)
    assert np.isfinite(actual[[0, 2]]).all() and not np.isfinite(actual[1, 4, 5]).any()


def test_every_proposal_is_valid_and_so_is_the_default():
    for target in (HOPPER, AMPERE, CudaTarget("sm_86"), CudaTarget("sm_120")):
        for problem in (SQUARE, LAST, TALL, LARGE):
            proposed = list(SCHEDULE.configs(problem, target))
            assert len(set(proposed)) == len(proposed) > 1
            for config in (*proposed, SCHEDULE.default(problem, target)):
                assert SCHEDULE.check(config, problem, target) is None, config


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_what_the_largest_filters_get(layout, dtype):
    problem = suites.layer("depthwise", "replknet-128", 32, dtype, layout)
    for target in (HOPPER, AMPERE):
        chosen = select(problem, target)
        assert chosen.schedule is SCHEDULE
        assert "us predicted" in chosen.rejected["cuda_depthwise"]


@pytest.mark.parametrize(
    ("problem", "fields", "message"),
    [
        (SQUARE, dict(lines=0), "lines=0: allowed are whole numbers from 1"),
        (SQUARE, dict(images=True), "images=True: allowed are whole numbers from 1"),
        (LAST, dict(channels=4), "channels=4: with NHWC a multiple of 8"),
        (SQUARE, dict(channels=64), "channels=64: 2048 threads, above 1024"),
        (SQUARE, dict(blocks=65), "blocks=65: a multiprocessor takes 2048 threads"),
        (
            LARGE,
            dict(images=8, lines=3),
            "images=8, lines=3: 288 sums a thread for rows of 40 outputs; up to 128 are allowed",
        ),
        (
            SQUARE,
            dict(channels=8, blocks=8),
            "blocks=8: 8 times 256 threads of some 48 registers; a multiprocessor has 65536",
        ),
        (
            SQUARE.replace(input_size=(120, 120), kernel_size=(41, 5), padding=(20, 2)),
            dict(channels=16),
            "channels=16, images=1, lines=1: 185360 bytes of 102400, shared memory",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(problem, fields, message):
    config = {**vars(Config(2, 1, 1)), **fields}
    target = CudaTarget("sm_86") if "102400" in message else HOPPER
    assert SCHEDULE.check(Config(**config), problem, target) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(problem, target, schedule=FORM, config=config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        (
            dict(dtype="float32"),
            HOPPER,
            "dtype=float32: cuda_depthwise_mma takes float16 and bfloat16",
        ),
        ({}, CudaTarget("sm_75"), "arch=sm_75: cuda_depthwise_mma takes sm_80 and later"),
        (
            dict(out_channels=26),
            HOPPER,
            "groups=13: cuda_depthwise_mma takes one channel a group, in and out "
            "(cuda_depthwise takes any)",
        ),
        (
            dict(stride=(1, 2)),
            HOPPER,
            "stride=(1, 2): cuda_depthwise_mma takes 1 (cuda_depthwise takes any)",
        ),
        (
            dict(dilation=(2, 1)),
            HOPPER,
            "dilation=(2, 1): cuda_depthwise_mma takes 1 (cuda_depthwise takes any)",
        ),
        (
            dict(layout="NHWC"),
            HOPPER,
            "in_channels=13: with NHWC cuda_depthwise_mma takes multiples of 8 "
            "(cuda_depthwise takes any)",
        ),
        (
            dict(kernel_size=3),
            HOPPER,
            "kernel_size=(3, 3): cuda_depthwise_mma takes windows of 25 taps or more "
            "(cuda_depthwise takes any)",
        ),
        (
            dict(batch=1, kernel_size=6000, padding=6500),
            HOPPER,
            "padding=((6500, 6500), (6500, 6500)): with it the input has 2**31 elements or more",
        ),
        (
            dict(input_size=(9, 600)),
            HOPPER,
            "images=1, lines=1: 152 sums a thread for rows of 600 outputs; up to 128 are allowed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_problems(fields, target, message):
    assert SCHEDULE.supports(SQUARE, HOPPER) is None
    assert SCHEDULE.supports(SQUARE.replace(**fields), target) == message


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("problem", "arch"),
    [
        (ConvProblem(128, 128, (56, 56), 128, 31, 1, 15, 1, 128, "bfloat16", "NCHW"), "sm_90a"),
        (ConvProblem(1, 192, (28, 28), 192, 7, 1, 3, 1, 192, "float16", "NCHW"), "sm_80"),
    ],
    ids=lambda value: problem_id(value) if isinstance(value, ConvProblem) else None,
)
def test_code(problem, arch, tmp_path):
    """No spills; operands and products by the instructions that they are for."""
    target = CudaTarget(arch)
    config = SCHEDULE.default(problem, target)
    module = SCHEDULE.build(problem, config, target, Epilogue(True, False, "relu"))
    source = lower.cuda_source(lower.lower(module), target)
    (tmp_path / "kernel.cu").write_text(source)
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", target.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)
    ptx = toolchain.compile_ptx(source, target.arch)
    kind = "f16" if problem.dtype == "float16" else "bf16"
    for instruction in (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32",
        "st.global.v4",
    ):
        assert instruction in ptx, instruction
