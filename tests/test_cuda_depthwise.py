"""Depthwise convolution on a machine without a GPU: simulated, and through nvcc."""

import random

import numpy as np
import pytest
from depthwise_cases import CASES, EPILOGUES, EVEN, FULL, GROUPS, ODD, STEPS, cases, drawn
from emulated import assert_nan_and_infinity_stay_local, assert_right
from problems import problem_id

import im2win_tvm
from im2win_tvm import lower, simulate, suites, toolchain
from im2win_tvm.epilogue import NONE
from im2win_tvm.problem import ConvProblem
from im2win_tvm.schedules import SCHEDULES, ScheduleError
from im2win_tvm.schedules import cuda_depthwise_nchw as nchw
from im2win_tvm.schedules.cuda_depthwise_tiles import Config
from im2win_tvm.select import select
from im2win_tvm.target import CudaTarget

FORM = "cuda_depthwise"
SCHEDULE = SCHEDULES[FORM]
HOPPER, AMPERE = CudaTarget("sm_90a"), CudaTarget("sm_80")


@pytest.mark.parametrize(
    "problem",
    [
        *drawn(1, 13),
        *(pytest.param(p, marks=pytest.mark.slow) for p in drawn(2, 150, most_work=1_000_000)),
    ],
    ids=problem_id,
)
def test_odd_problems(problem):
    assert_right(FORM, problem, epilogue=FULL, target=AMPERE)


@pytest.mark.parametrize(("name", "problem", "config"), list(cases()), ids=CASES)
def test_configurations(name, problem, config):
    assert_right(FORM, problem, config, FULL)


@pytest.mark.parametrize("turn", range(8))
def test_sampled_configurations(turn):
    problem = (ODD, EVEN, STEPS, GROUPS)[turn % 4]
    config = random.Random(turn).choice(list(SCHEDULE.configs(problem, HOPPER)))
    assert_right(FORM, problem, config, target=HOPPER, kinds=("integer",))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_epilogues(epilogue):
    assert_right(FORM, ODD, epilogue=epilogue, kinds=("integer",))
    assert_right(FORM, EVEN, Config(2, 3, 2), epilogue, kinds=("integer",))


@pytest.mark.parametrize("problem", [ODD, EVEN, STEPS, GROUPS], ids=problem_id)
def test_nan_and_infinity_reach_the_outputs_that_read_them_and_no_others(problem):
    assert_nan_and_infinity_stay_local(FORM, problem)


def test_a_run_may_begin_and_end_within_a_vector():
    """Planes of 99 elements: a block's outputs share vectors of 16 bytes with other blocks'."""
    function = nchw.convolve(ODD, Config(9, 5, groups=3, threads=64), NONE)
    arrays = {p.name: np.ones([int(n) for n in p.shape], str(p.dtype)) for p in function.params}
    arrays["y"][:] = np.nan
    simulate.run(function, arrays)
    assert np.isfinite(arrays["y"]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_it_is_what_depthwise_problems_get(layout, dtype):
    problem = suites.layer("depthwise", "mobilenet-144-first", 32, dtype, layout)
    for target in (HOPPER, AMPERE):
        assert select(problem, target).schedule is SCHEDULE


def test_every_proposal_is_valid_and_so_is_the_default():
    for target in (HOPPER, AMPERE, CudaTarget("sm_86"), CudaTarget("sm_120")):
        for problem in (ODD, EVEN, STEPS, GROUPS, ODD.replace(input_size=(1, 1), kernel_size=1)):
            proposed = list(SCHEDULE.configs(problem, target))
            assert len(set(proposed)) == len(proposed) > 3
            for config in (*proposed, SCHEDULE.default(problem, target)):
                assert SCHEDULE.check(config, problem, target) is None, config


@pytest.mark.parametrize(
    ("problem", "fields", "message"),
    [
        (ODD, dict(rows=0), "rows=0: allowed are whole numbers from 1"),
        (ODD, dict(band=-1), "band=-1: allowed are whole numbers from 0"),
        (ODD, dict(blocks=True), "blocks=True: allowed are whole numbers from 1"),
        (ODD, dict(resident=1), "resident=1: allowed are True and False"),
        (ODD, dict(threads=48), "threads=48: allowed are multiples of 32 up to 1024"),
        (ODD, dict(blocks=17), "blocks=17: a multiprocessor takes 2048 threads"),
        (ODD, dict(vector=2), "vector=2: with NCHW it has to be 1"),
        (ODD, dict(band=2, groups=2), "groups=2: with a band of one group's rows it has to be 1"),
        (EVEN, dict(band=2), "band=2, groups=1: with NHWC they have to be 0 and 1"),
        (EVEN, dict(vector=16), "vector=16: allowed are powers of two up to 8"),
        (ODD.replace(layout="NHWC"), dict(vector=2), "vector=2: no divisor of out_channels=13"),
        (GROUPS, dict(vector=8), "vector=8: allowed are powers of two up to 4"),
        (
            EVEN.replace(out_channels=48),
            dict(vector=2),
            "vector=2: no divisor of out_channels/groups=3",
        ),
        (
            ODD,
            dict(groups=500),
            "band=0, groups=500: 196064 bytes of 167936, shared memory",
        ),
        (
            EVEN,
            dict(rows=32, columns=32),
            "rows=32, columns=32: 9216 products in a row; up to 6000 are allowed",
        ),
        (
            EVEN,
            dict(rows=14, columns=16),
            "rows=14, columns=16, vector=1: 255 registers or more; up to 232 are allowed",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_configurations(problem, fields, message):
    config = {**vars(Config(2, 2)), **fields}
    assert SCHEDULE.check(Config(**config), problem, AMPERE) == message
    with pytest.raises(ScheduleError) as caught:
        im2win_tvm.compile(problem, AMPERE, schedule=FORM, config=config)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("fields", "target", "message"),
    [
        ({}, CudaTarget("sm_75"), "arch=sm_75: cuda_depthwise takes sm_80 and later, for cp.async"),
        (
            dict(groups=1),
            HOPPER,
            "groups=1: cuda_depthwise takes two or more (cuda_simt takes any)",
        ),
        (
            dict(in_channels=208),
            HOPPER,
            "groups=13: cuda_depthwise takes groups of fewer than 16 channels, these have 16 "
            "(cuda_simt takes any)",
        ),
        (
            dict(stride=4000, padding=6000),
            HOPPER,
            "padding=((6000, 6000), (6000, 6000)): with it the input has 2**31 elements or more",
        ),
        (
            dict(batch=1, input_size=(40, 12000), kernel_size=(31, 1), padding=0),
            HOPPER,
            "band=1, groups=1: 769056 bytes of 233472, shared memory",
        ),
    ],
)
def test_refused_problems(fields, target, message):
    assert SCHEDULE.supports(ODD, HOPPER) is None
    assert SCHEDULE.supports(ODD.replace(**fields), target) == message


@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("problem", "arch", "wanted"),
    [
        (
            ConvProblem(128, 96, (112, 112), 96, 3, 2, 1, 1, 96, "float16", "NHWC"),
            "sm_90a",
            ["ld.global.nc.v2.u16", "st.global.v2.u16"],
        ),
        (
            ConvProblem(1, 960, (7, 7), 960, 3, 1, 1, 1, 960, "bfloat16", "NCHW"),
            "sm_80",
            ["cp.async.cg.shared.global", "st.global.v4"],
        ),
    ],
    ids=lambda value: problem_id(value) if isinstance(value, ConvProblem) else None,
)
def test_code(problem, arch, wanted, tmp_path):
    """No spills; loads, copies and stores by the instructions that they are for."""
    target = CudaTarget(arch)
    module = SCHEDULE.build(problem, SCHEDULE.default(problem, target), target)
    source = lower.cuda_source(lower.lower(module), target)
    (tmp_path / "kernel.cu").write_text(source)
    report = toolchain.build_cuda_library(
        tmp_path / "kernel.so", tmp_path / "kernel.cu", target.arch, []
    )
    kernels = toolchain.parse_resources(report)
    assert {k.kernel for k in kernels} == {"im2win_prepare_kernel", "im2win_conv_kernel"}
    assert all(k.stack_bytes == k.spill_store_bytes == k.spill_load_bytes == 0 for k in kernels)
    ptx = toolchain.compile_ptx(source, target.arch)
    for instruction in wanted:
        assert instruction in ptx, instruction


def test_the_suite():
    layers = suites.suite("depthwise", batch=1, dtype="float16")
    assert len(layers) == 18
    assert all(SCHEDULE.supports(problem, HOPPER) is None for problem in layers.values())
